"""vocab.json and merges.txt (GPT-2's own files) as a `tokenizers.Tokenizer`, for folders without a tokenizer.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from textmill.errors import ModelError
from textmill.text import gguf_tokenizer
from textmill.text.pre_tokenizers import SPLITS
from textmill.weights.config import read_json

_LARGEST = 64 << 20
# How the classes that tokenizer_config.json names cut a text; all others are not of this kind, or not known.
_CUTS = {"GPT2Tokenizer": "gpt-2", "CodeGenTokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}
_DEFAULT = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def load(folder: Path, config: dict[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and its `bos` and `eos` as texts; `config` is the tokenizer_config.json beside the files.

    ModelError for files that do not fit together or of a class that cuts texts in a way we do not know.
    """
    vocabulary = read_json(folder / "vocab.json")
    if not all(type(number) is int and number >= 0 for number in vocabulary.values()):
        raise ModelError(f"{folder / 'vocab.json'}: its values are not token ids")
    cut = cut_of(folder, config)
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges_of(folder / "merges.txt")))
    except Exception as error:  # the Rust library raises plain Exception, for a merge outside the vocabulary
        raise ModelError(f"{folder / 'merges.txt'}: {str(error)[:200]}") from error
    prefixed = config.get("add_prefix_space") is True
    steps = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[cut]] if cut != "gpt-2" else []
    words = pre_tokenizers.ByteLevel(add_prefix_space=prefixed, use_regex=cut == "gpt-2")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, words]) if steps else words
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    texts = special_texts(folder, config)
    add_tokens(tokenizer, folder, config, texts)
    ends: dict[str, tuple[str, int]] = {}
    for key in ("bos", "eos"):
        number = tokenizer.token_to_id(texts[f"{key}_token"])
        if number is not None:
            ends[key] = (texts[f"{key}_token"], number)
    around = {key: end for key, end in ends.items() if config.get(f"add_{key}_token") is True}
    if around:
        gguf_tokenizer.ends(tokenizer, around)
    return tokenizer, {key: text for key, (text, _) in ends.items()}


def cut_of(folder: Path, config: dict[str, Any]) -> str:
    name = str(config.get("tokenizer_class") or "GPT2Tokenizer")
    cut = _CUTS.get(name.removesuffix("Fast"))
    if cut is None:
        raise ModelError(f"{folder}: {name} is not read from vocab.json and merges.txt; a tokenizer.json is missing")
    return cut


def merges_of(path: Path) -> list[tuple[str, str]]:
    """The pairs, best first; ModelError naming the line that is none."""
    try:
        if path.stat().st_size > _LARGEST:
            raise ModelError(f"{path}: larger than {_LARGEST >> 20} MiB")
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    found: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.rstrip("\r").partition(" ")
        if not space or " " in right:
            raise ModelError(f"{path}: line {number} is not a pair of tokens")
        found.append((left, right))
    return found


def special_texts(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The texts of special tokens by their names, from tokenizer_config.json or special_tokens_map.json."""
    path = folder / "special_tokens_map.json"
    listed = read_json(path) if path.is_file() else {}
    values = {key: config.get(key) or listed.get(key) for key in _SPECIAL}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in values.items()}
    return _DEFAULT | {key: text for key, text in texts.items() if isinstance(text, str)}


def add_tokens(tokenizer: Tokenizer, folder: Path, config: dict[str, Any], texts: dict[str, str]) -> None:
    """Tokens beyond the vocabulary, by their ids, then the special ones."""
    beyond: dict[int, AddedToken] = {}
    path = folder / "added_tokens.json"
    for text, number in (read_json(path) if path.is_file() else {}).items():
        if type(number) is int:
            beyond[number] = AddedToken(text, special=False, normalized=False)
    decoder = config.get("added_tokens_decoder")
    for key, token in (decoder if isinstance(decoder, dict) else {}).items():
        if key.isdigit() and isinstance(token, dict) and isinstance(token.get("content"), str):
            special = token.get("special") is True
            beyond[int(key)] = AddedToken(token["content"], special=special, normalized=False)
    for number, added in sorted(beyond.items()):
        own = tokenizer.token_to_id(added.content)
        if own not in (None, number):
            raise ModelError(f"{folder}: the token {added.content!r} is {own} in vocab.json and {number} beside it")
        (tokenizer.add_special_tokens if added.special else tokenizer.add_tokens)([added])
    known = [text for text in dict.fromkeys(texts.values()) if tokenizer.token_to_id(text) is not None]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in known])
