"""Tokenizer: text to ids with byte offsets and back, from a model folder or a GGUF file; never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from textmill.errors import ModelError
from textmill.text import gguf_tokenizer, merges_files, sentencepiece_model
from textmill.text.marked_sequences import knows_marks, with_marks
from textmill.weights.config import read_json, token_ids
from textmill.weights.gguf import GgufFile
from textmill.weights.gguf_config import gguf_eos_ids


class Encoding:
    """The tokens of one text. `ids` at once; `offsets` and `texts` are worked out only if asked for.

    `origins`: where each character that the tokenizer saw was in the text, if these are not the same.
    """

    def __init__(self, text: str, encoding: tokenizers.Encoding, origins: Sequence[int] | None = None) -> None:
        self._text = text
        self._encoding = encoding
        self._origins = origins
        self.ids: list[int] = encoding.ids

    @cached_property
    def offsets(self) -> list[tuple[int, int]]:
        """Where each token lies in the text's UTF-8 bytes; (0, 0) for tokens that were added around it.

        Tokens that are parts of one character all have that character's range.
        """
        places = [
            (0, 0) if added else place
            for place, added in zip(self._encoding.offsets, self._encoding.special_tokens_mask, strict=True)
        ]
        if self._origins is not None:
            origins = self._origins
            places = [(origins[start], origins[stop - 1] + 1) if start < stop else (0, 0) for start, stop in places]
        if self._text.isascii():
            return places
        at = [0]
        for character in self._text:
            at.append(at[-1] + len(character.encode("utf-8", "surrogatepass")))
        return [(at[start], at[stop]) for start, stop in places]

    @cached_property
    def texts(self) -> list[str]:
        """The piece of the text that each token covers; "" for tokens that were added around it."""
        data = self._text.encode("utf-8", "surrogatepass")
        return [data[start:stop].decode("utf-8", "replace") for start, stop in self.offsets]


@dataclass(frozen=True, slots=True)
class Ends:
    """What the files around a tokenizer say about it."""

    bos_token: str | None = None
    eos_token: str | None = None
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None


class Tokenizer:
    """One model's tokenizer. `eos_ids` end a generation; `bos_token` and `eos_token` are texts for templates."""

    def __init__(self, backend: tokenizers.Tokenizer, ends: Ends) -> None:
        self.backend = backend
        self.bos_token = ends.bos_token
        self.eos_token = ends.eos_token
        self.chat_template = ends.chat_template
        self._special = frozenset(
            number for number, token in backend.get_added_tokens_decoder().items() if token.special
        )
        own_eos = None if ends.eos_token is None else backend.token_to_id(ends.eos_token)
        known = (*ends.eos_ids, *(() if own_eos is None else (own_eos,)))
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(known))
        self._bytes: dict[int, bytes] = {}
        self._marks = knows_marks(backend)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoding:
        """Special tokens spelled out in the text are recognized, as in TGI and transformers."""
        seen, origins = with_marks(text) if self._marks else (text, None)
        return Encoding(text, self.backend.encode(seen, add_special_tokens=add_special_tokens), origins)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token alone as text (fragments of characters show as U+FFFD)."""
        return self.backend.decode([token_id], skip_special_tokens=False)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    @cached_property
    def is_byte_level(self) -> bool:
        """True if a text is just its tokens' bytes one after the other, so that `token_bytes` can be used."""
        return type(self.backend.decoder) is tokenizers.decoders.ByteLevel

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token of a byte-level tokenizer; none for an id outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = _byte_level_bytes(self.backend.id_to_token(token_id) or "")
        return known


def _byte_table() -> dict[str, int]:
    """GPT-2's letters for bytes: printable bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_table()


def _byte_level_bytes(token: str) -> bytes:
    """As the `tokenizers` decoder does it: a token with any other letter (an added one) stands for its own text."""
    try:
        return bytes(BYTES[letter] for letter in token)
    except KeyError:
        return token.encode()


def load_tokenizer(path: str | Path, *, tokenizer_config_path: str | Path | None = None) -> Tokenizer:
    """From a model folder (tokenizer.json and the files around it) or a .gguf file.

    `tokenizer_config_path` is TGI's flag: that file takes the place of tokenizer_config.json. Raises ModelError.
    """
    path = Path(path)
    override = None if tokenizer_config_path is None else read_json(Path(tokenizer_config_path))
    if path.suffix == ".gguf":
        return _from_gguf(GgufFile(path), override or {})
    return _from_folder(path, override)


def _from_gguf(file: GgufFile, config: dict[str, Any]) -> Tokenizer:
    metadata = file.metadata
    backend = gguf_tokenizer.build(metadata, file.path)
    template = metadata.get("tokenizer.chat_template")
    ends = Ends(
        bos_token=_token_text(config.get("bos_token")) or gguf_tokenizer.special_token(metadata, "bos", file.path),
        eos_token=_token_text(config.get("eos_token")) or gguf_tokenizer.special_token(metadata, "eos", file.path),
        eos_ids=gguf_eos_ids(file),
        chat_template=_template(config.get("chat_template")) or _template(template),
    )
    return Tokenizer(backend, ends)


def _from_folder(folder: Path, override: dict[str, Any] | None) -> Tokenizer:
    config = override if override is not None else _json_if_there(folder / "tokenizer_config.json")
    backend, own = _backend(folder, config)
    ends = Ends(
        bos_token=_token_text(config.get("bos_token")) or own.get("bos"),
        eos_token=_token_text(config.get("eos_token")) or own.get("eos"),
        eos_ids=_eos_ids(folder),
        chat_template=_template((override or {}).get("chat_template")) or _folder_template(folder, config),
    )
    _set_llama_ends(backend, config, ends)
    return Tokenizer(backend, ends)


def _backend(folder: Path, config: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """tokenizer.json, or what else there is, and what `bos` and `eos` are if those files say so."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return _other_backend(folder, config)
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises plain Exception for a file it cannot read
        raise ModelError(f"{file}: {str(error)[:300]}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend, {}


def _other_backend(folder: Path, config: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    for name in ("tokenizer.model", "spiece.model"):
        if (folder / name).is_file():
            return sentencepiece_model.load(folder / name, config)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return merges_files.load(folder, config)
    raise ModelError(f"{folder / 'tokenizer.json'}: missing, and no tokenizer.model, nor vocab.json and merges.txt")


def _set_llama_ends(backend: tokenizers.Tokenizer, config: dict[str, Any], ends: Ends) -> None:
    """TGI's rule: files of these classes carry an unreliable post-processor; the config's switches decide."""
    if config.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return
    wanted = {"bos": (config.get("add_bos_token", True), ends.bos_token)}
    wanted["eos"] = (config.get("add_eos_token", False), ends.eos_token)
    around = {}
    for key, (on, text) in wanted.items():
        number = None if text is None else backend.token_to_id(text)
        if on and text is not None and number is not None:
            around[key] = (text, number)
    gguf_tokenizer.ends(backend, around)


def _eos_ids(folder: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        value = _json_if_there(folder / name).get("eos_token_id")
        if value is not None:
            return token_ids(value, folder / name, "eos_token_id")
    return ()


def _folder_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, chat_template.json, tokenizer_config.json, processor_config.json: the first that has one."""
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        return plain.read_text(encoding="utf-8", errors="replace")
    return (
        _template(_json_if_there(folder / "chat_template.json").get("chat_template"))
        or _template(config.get("chat_template"))
        or _template(_json_if_there(folder / "processor_config.json").get("chat_template"))
    )


def _json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _template(value: Any) -> str | None:
    """A template, or the one called `default` of a list of named ones."""
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _token_text(value: Any) -> str | None:
    """A special token is written as its text or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
