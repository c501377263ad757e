"""The process that decodes pictures from strangers: bounded in memory and time, with nothing else in it to lose.

`python -m textmill.images.worker RECIPE`: reads pictures from standard input, writes their parts to standard output;
each message is two lengths, a JSON header and bytes. It ends with its input, and is killed if it takes too long.
"""

from __future__ import annotations

import io
import json
import resource
import struct
import sys
import warnings
from hashlib import blake2b
from typing import IO, TYPE_CHECKING, Any

from textmill.images.limits import CPU_SECONDS, MEMORY_BYTES, MOST_PIXELS
from textmill.images.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

LENGTHS = struct.Struct(">II")


class Undecodable(ValueError):
    """The picture is broken; the message is for the client."""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    recipe = Recipe.from_json(sys.argv[1])
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while (message := read(source)) is not None:
        header, data = message
        bound_next_job()
        write(sink, *answer(header["kind"], data, recipe))


def bound_next_job() -> None:
    """The kernel ends us if one picture takes too long, even if nobody is left to do so."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))


def answer(kind: str, data: bytes, recipe: Recipe) -> tuple[dict[str, Any], bytes]:
    from textmill.images.cutting import CannotCut, cut

    try:
        parts = cut(decoded(kind, data), recipe)
    except (Undecodable, CannotCut) as error:
        return {"error": str(error)}, b""
    except MemoryError:
        return {"error": f"decoding it takes more than {MEMORY_BYTES >> 20} MiB"}, b""
    pixels = [part.pixels.tobytes() for part in parts]
    described = [
        {"shape": part.pixels.shape, "size": part.size, "tokens": part.tokens, "digest": digest(part, one)}
        for part, one in zip(parts, pixels, strict=True)
    ]
    return {"parts": described}, b"".join(pixels)


def digest(part: Any, pixels: bytes) -> str:
    """Of everything that features depend on: equal bytes in another shape are another picture."""
    named = json.dumps([part.pixels.shape, part.size, part.tokens]).encode()
    return blake2b(named + b"\0" + pixels, digest_size=32).hexdigest()


def decoded(kind: str, data: bytes) -> Picture:
    """The upright RGB picture: of an animation its first frame, without transparency, as transformers loads it."""
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = MOST_PIXELS
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Undecodable(f"it has more than {MOST_PIXELS} pixels") from None
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, struct.error, OverflowError) as error:
        raise Undecodable(f"it is broken or cut off ({type(error).__name__})") from None


def read(source: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """The next message; None at the end of the input."""
    lengths = source.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    header, body = LENGTHS.unpack(lengths)
    return json.loads(source.read(header)), source.read(body)


def write(sink: IO[bytes], header: dict[str, Any], body: bytes) -> None:
    text = json.dumps(header).encode()
    sink.write(LENGTHS.pack(len(text), len(body)) + text)
    sink.write(body)
    sink.flush()


if __name__ == "__main__":
    main()
