"""From a body's bytes to a typed request, or to the plain-text refusals that TGI's clients know (tgi.md 3.2)."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

BodyT = TypeVar("BodyT")
RAW = msgspec.json.Decoder(msgspec.Raw)
PLACE = re.compile(r"^(?P<what>.*?)(?: - at `(?P<where>\$.*)`)?$", re.DOTALL)
MISMATCH = re.compile(r"^Expected `(?P<wanted>[^`]*)`, got `(?P<got>[^`]*)`$")
MISSING = re.compile(r"^Object missing required field (?P<name>`[^`]*`)$")
TYPES = {"int": "integer", "float": "floating point", "str": "string", "array": "sequence", "object": "map"}


class Refusal(Exception):
    """A request that no handler saw: a status and a plain-text body (empty for 401, 404, 405)."""

    def __init__(self, status: int, text: str = "", headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = headers


def shape_error(message: str, path: str = "") -> Refusal:
    """A body that is JSON, but not of the right shape."""
    where = f"{path}: " if path else ""
    return Refusal(422, f"Failed to deserialize the JSON body into the target type: {where}{message}")


def decode(decoder: msgspec.json.Decoder[BodyT], body: bytes) -> BodyT:
    """The body as the decoder's type; raises `Refusal`."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        shape = _wrong_shape(str(error))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise _not_json(error) from None
    try:  # a body that is broken further on is not JSON at all, whatever its shape
        RAW.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise _not_json(error) from None
    raise shape


def _not_json(error: Exception) -> Refusal:
    reason = str(error)
    if isinstance(error, RecursionError):
        reason = "recursion limit exceeded"
    elif isinstance(error, UnicodeDecodeError):
        reason = "invalid unicode code point"
    return Refusal(400, f"Failed to parse the request body as JSON: {reason}")


def _wrong_shape(text: str) -> Refusal:
    """msgspec's sentence turned into serde's: path first, then what is wrong."""
    match = PLACE.match(text)
    what, where = (match["what"], match["where"] or "") if match else (text, "")
    if found := MISSING.match(what):
        what = f"missing field {found['name']}"
    elif found := MISMATCH.match(what):
        got = TYPES.get(found["got"], found["got"])
        what = f"invalid type: {got}, expected {_wanted(found['wanted'])}"
    return shape_error(what, where.removeprefix("$").removeprefix("."))


def _wanted(types: str) -> str:
    return " or ".join(TYPES.get(one, one) for one in types.split(" | "))
