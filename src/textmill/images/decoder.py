"""The router's side of decoding: what may be decoded is decided here, by header; the work is a child process's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from dataclasses import dataclass
from typing import Any

from textmill.errors import InvalidRequest
from textmill.images.header import Header, read_header
from textmill.images.limits import MOST_BYTES, MOST_PIXELS, SECONDS
from textmill.images.recipe import Recipe
from textmill.images.worker import LENGTHS

log = logging.getLogger(__name__)

# How a process that is gone shows itself; the last is a transport that was closed under us.
ENDED = (asyncio.IncompleteReadError, OSError, RuntimeError)


@dataclass(frozen=True, slots=True)
class Tiles:
    """One run of `tokens` image tokens: what `core.Image` needs beside its place."""

    pixels: bytes
    shape: tuple[int, int, int, int]
    size: tuple[int, int]
    tokens: int
    digest: bytes


class Decoder:
    """One child process, started by the first picture; one picture at a time. Errors are for the client."""

    def __init__(self, recipe: Recipe, seconds: float = SECONDS, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._recipe = recipe.to_json()
        self._seconds = seconds
        self._process: Process | None = None
        self._turn = asyncio.Lock()

    async def tiles(self, name: str, data: bytes) -> list[Tiles]:
        """The parts of a picture. `name` is what errors call it. Raises InvalidRequest."""
        header = accepted(name, data, self._most_bytes)
        async with self._turn:
            try:
                async with asyncio.timeout(self._seconds):
                    described, pixels = await self._ask_again(header.kind, data)
            except TimeoutError:
                await self.close()
                raise InvalidRequest(f"invalid image: {name} took longer than {self._seconds:g} s to decode") from None
            except ENDED:
                raise InvalidRequest(f"invalid image: {name} cannot be decoded (its decoder ended)") from None
            except asyncio.CancelledError:
                await self.close()  # half a message would be left in the pipes
                raise
        if "error" in described:
            raise InvalidRequest(f"invalid image: {name}: {described['error']}")
        return split(described["parts"], pixels)

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _ask_again(self, kind: str, data: bytes) -> tuple[dict[str, Any], bytes]:
        """A decoder may have ended since the last picture, or be lost as it starts; only twice is it the picture."""
        try:
            return await self._ask(kind, data)
        except ENDED:
            return await self._ask(kind, data)

    async def _ask(self, kind: str, data: bytes) -> tuple[dict[str, Any], bytes]:
        try:
            return await self._exchange(await self._running(), kind, data)
        except ENDED as error:
            log.warning("the decoder of images ended: %r", error)
            await self.close()
            raise

    @staticmethod
    async def _exchange(process: Process, kind: str, data: bytes) -> tuple[dict[str, Any], bytes]:
        if process.stdin is None or process.stdout is None:
            raise BrokenPipeError
        text = json.dumps({"kind": kind}).encode()
        process.stdin.write(LENGTHS.pack(len(text), len(data)) + text + data)
        await process.stdin.drain()
        header, body = LENGTHS.unpack(await process.stdout.readexactly(LENGTHS.size))
        return json.loads(await process.stdout.readexactly(header)), await process.stdout.readexactly(body)

    async def _running(self) -> Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "textmill.images.worker", self._recipe),
                stdin=PIPE,
                stdout=PIPE,
                stderr=DEVNULL,
                env=environment(),
            )
        return self._process


def environment() -> dict[str, str]:
    """Where Python finds its modules, and nothing that a decoder could give away; one thread is enough for it."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "LANG") if name in os.environ}
    return kept | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def accepted(name: str, data: bytes, most_bytes: int = MOST_BYTES) -> Header:
    """The header of a picture that may be decoded; raises InvalidRequest, and nothing has been decoded."""
    if len(data) > most_bytes:
        raise InvalidRequest(
            f"invalid image: Image size {len(data)} bytes exceeds maximum allowed size of {most_bytes} bytes: {name}"
        )
    header = read_header(data)
    if header is None:
        raise InvalidRequest(f"invalid image: {name} is no PNG, JPEG, GIF or WebP, or its header is broken")
    if header.height < 1 or header.width < 1:
        raise InvalidRequest(f"invalid image: {name} is {header.width} x {header.height} pixels: it must have some")
    if header.height * header.width > MOST_PIXELS:
        size = f"{header.width} x {header.height} pixels"
        raise InvalidRequest(f"invalid image: {name} is {size}: the limit is {MOST_PIXELS} pixels")
    return header


def split(parts: list[dict[str, Any]], pixels: bytes) -> list[Tiles]:
    found, at = [], 0
    for part in parts:
        tiles, channels, height, width = part["shape"]
        end = at + tiles * channels * height * width
        size = (part["size"][0], part["size"][1])
        shape = (tiles, channels, height, width)
        found.append(Tiles(pixels[at:end], shape, size, part["tokens"], bytes.fromhex(part["digest"])))
        at = end
    return found
