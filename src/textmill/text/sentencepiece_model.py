"""A tokenizer.model (sentencepiece's own file) as a `tokenizers.Tokenizer`, for folders without a tokenizer.json.

The file is a protocol buffer (sentencepiece_model.proto); its few fields of use are read here. What they mean is what
GGUF files mean by theirs, so `gguf_tokenizer` builds the tokenizer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import AddedToken, Regex, Tokenizer, normalizers

from textmill.errors import ModelError
from textmill.text import gguf_tokenizer

_LARGEST = 64 << 20
_UNIGRAM, _BPE = 1, 2
_KINDS = {_UNIGRAM: "t5", _BPE: "llama"}  # as GGUF calls them

Value: TypeAlias = "int | bytes"


def load(path: Path, config: dict[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of a file, and its `bos` and `eos` as texts; `config` is the tokenizer_config.json beside it.

    ModelError for what is no such file or of a kind that is not supported.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ModelError(f"{path}: larger than {_LARGEST >> 20} MiB")
        metadata = metadata_of(path.read_bytes())
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{path}: cannot be read as a sentencepiece model: {error}") from error
    for key in ("add_bos_token", "add_eos_token"):
        if isinstance(config.get(key), bool):
            metadata[f"tokenizer.ggml.{key}"] = config[key]
    tokenizer = gguf_tokenizer.build(metadata, path)
    if metadata["tokenizer.ggml.model"] == _KINDS[_BPE]:
        tokenizer.normalizer = normalizers.Sequence([*_cleaning(metadata), tokenizer.normalizer])
    _add_others(tokenizer, config)
    texts = {key: gguf_tokenizer.special_token(metadata, key, path) for key in ("bos", "eos")}
    return tokenizer, {key: text for key, text in texts.items() if text is not None}


def metadata_of(data: bytes) -> dict[str, Any]:
    """The model's pieces and settings under the names of GGUF metadata; ValueError for other data."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Value] = {}
    normalizer: dict[int, Value] = {}
    for number, value in fields(data):
        if number == 1 and isinstance(value, bytes):
            pieces.append(piece_of(dict(fields(value))))
        elif number == 2 and isinstance(value, bytes):
            trainer = dict(fields(value))
        elif number == 3 and isinstance(value, bytes):
            normalizer = dict(fields(value))
    kind = _KINDS.get(trainer.get(3, _UNIGRAM))  # type: ignore[arg-type]
    if kind is None or not pieces:
        raise ValueError("no pieces, or neither a BPE nor a unigram model")
    ids = {"unknown": trainer.get(40, 0), "bos": trainer.get(41, 1), "eos": trainer.get(42, 2)}
    settings: dict[str, Any] = {f"{key}_token_id": signed(number) for key, number in ids.items() if signed(number) >= 0}
    columns = {"tokens": [p[0] for p in pieces], "scores": [p[1] for p in pieces], "token_type": [p[2] for p in pieces]}
    settings |= {
        "model": kind,
        "add_space_prefix": bool(normalizer.get(3, 1)),
        "remove_extra_whitespaces": bool(normalizer.get(4, 1)),
        "precompiled_charsmap": normalizer.get(2, b""),
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (settings | columns).items()}


def piece_of(piece: dict[int, Value]) -> tuple[str, float, int]:
    """Text, score and type (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte) of a piece."""
    text, score, kind = piece.get(1, b""), piece.get(2, b"\0\0\0\0"), piece.get(3, 1)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
        raise ValueError("a piece is malformed")
    return text.decode("utf-8"), struct.unpack("<f", score)[0], kind


def fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """Numbers and values of a message's fields: integers, or the bytes of everything else; ValueError if cut short."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = varint(data, at)
            yield key >> 3, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire}")
        size, at = varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        if at + size > len(data):
            raise ValueError("the file ends too early")
        yield key >> 3, data[at : at + size]
        at += size


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("the file ends too early")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number is too long")


def signed(value: Value) -> int:
    """An int32 field: -1 means that there is no such token."""
    if not isinstance(value, int):
        raise ValueError("a token's id is no number")
    return value - (1 << 64) if value >> 63 else value


def _cleaning(metadata: dict[str, Any]) -> list[normalizers.Normalizer]:
    """What sentencepiece does to a text before it marks spaces."""
    steps: list[normalizers.Normalizer] = []
    charsmap = metadata["tokenizer.ggml.precompiled_charsmap"]
    if charsmap:
        steps.append(normalizers.Precompiled(charsmap))
    if metadata["tokenizer.ggml.remove_extra_whitespaces"]:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    return steps


def _add_others(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """Tokens beyond the file's own, which tokenizer_config.json lists by id."""
    listed = config.get("added_tokens_decoder")
    for number, token in sorted((listed if isinstance(listed, dict) else {}).items(), key=lambda item: int(item[0])):
        text = token.get("content") if isinstance(token, dict) else None
        if isinstance(text, str) and tokenizer.token_to_id(text) is None and int(number) == tokenizer.get_vocab_size():
            added = AddedToken(text, special=token.get("special") is True, normalized=False)
            (tokenizer.add_special_tokens if added.special else tokenizer.add_tokens)([added])
