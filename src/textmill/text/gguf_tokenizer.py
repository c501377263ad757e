"""Builds a `tokenizers.Tokenizer` from a GGUF file's own vocabulary, equal to what llama.cpp does with it.

Byte-level BPE ("gpt2") with the pre-tokenizers that files name, and sentencepiece's BPE ("llama") and unigrams ("t5").
Sources: llama.cpp's llama-vocab.cpp for what the keys mean; checked against its test vectors and sentencepiece.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from textmill.errors import ModelError
from textmill.text.pre_tokenizers import ADDS_BEGIN, IGNORE_MERGES, SPLITS, unnamed

log = logging.getLogger(__name__)

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_MAX_TOKEN = 1 << 20


class _Vocabulary:
    """The tokenizer part of the metadata, checked."""

    def __init__(self, metadata: dict[str, Any], path: Path) -> None:
        self.metadata = metadata
        self.path = path
        self.tokens: list[str] = self.strings("tokens")
        if not self.tokens:
            raise self.fail("tokens", "the file has no vocabulary")
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            raise self.fail("tokens", f"{len(self.tokens) - len(self.ids)} tokens occur twice")
        if max(map(len, self.tokens)) > _MAX_TOKEN:
            raise self.fail("tokens", f"a token is longer than {_MAX_TOKEN} characters")
        self.types: list[int] = self.column("token_type", int, _NORMAL)

    def fail(self, key: str, problem: str) -> ModelError:
        return ModelError(f"{self.path}: tokenizer.ggml.{key}: {problem}")

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def strings(self, key: str) -> list[str]:
        value = self.get(key, [])
        if not isinstance(value, list) or (value and not isinstance(value[0], str)):
            raise self.fail(key, "is not a list of strings")
        return value

    def column(self, key: str, kind: type, default: Any) -> list[Any]:
        """One value per token."""
        value = self.get(key)
        if value is None:
            return [default] * len(self.tokens)
        if not isinstance(value, list) or len(value) != len(self.tokens) or not isinstance(value[0], kind):
            raise self.fail(key, f"is not a list of {len(self.tokens)} numbers")
        return value

    def switch(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, f"{value!r} is not true or false")
        return value

    def token(self, key: str) -> str | None:
        """The text of the token whose id the metadata names."""
        number = self.get(f"{key}_token_id")
        if number is None:
            return None
        if type(number) is not int or not 0 <= number < len(self.tokens):
            raise self.fail(f"{key}_token_id", f"{number!r} is not in the vocabulary")
        return self.tokens[number]


def special_token(metadata: dict[str, Any], key: str, path: Path) -> str | None:
    """The text of the `bos` or `eos` token."""
    return _Vocabulary(metadata, path).token(key)


def build(metadata: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file; ModelError for a kind that is not supported."""
    vocabulary = _Vocabulary(metadata, path)
    kind = vocabulary.get("model")
    if kind == "gpt2":
        tokenizer = _byte_level(vocabulary)
    elif kind == "llama":
        tokenizer = _sentencepiece(vocabulary)
    elif kind == "t5":
        tokenizer = _unigram(vocabulary)
    else:
        raise vocabulary.fail("model", f"{kind!r} is not supported (gpt2, llama and t5 are)")
    _add_special(tokenizer, vocabulary)
    return tokenizer


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    pre = vocabulary.get("pre")
    if pre is None:
        pre = unnamed(vocabulary.metadata)
        log.warning("%s: the file names no pre-tokenizer (it is old); taken for %s's", vocabulary.path, pre)
    splits = SPLITS.get(pre) if isinstance(pre, str) else None
    if splits is None:
        raise vocabulary.fail("pre", f"the pre-tokenizer {pre!r} is not supported (known: {', '.join(SPLITS)})")
    merges = [_pair(vocabulary, merge) for merge in vocabulary.strings("merges")]
    tokenizer = _bpe(vocabulary, merges, ignore_merges=pre in IGNORE_MERGES)
    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    _add_ends(tokenizer, vocabulary, bos=pre in ADDS_BEGIN)
    return tokenizer


def _pair(vocabulary: _Vocabulary, merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not space or " " in right:
        raise vocabulary.fail("merges", f"{merge[:80]!r} is not a pair of tokens")
    return left, right


def _bpe(vocabulary: _Vocabulary, merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, **options))
    except Exception as error:  # the Rust library raises plain Exception, for a merge outside the vocabulary
        raise vocabulary.fail("merges", str(error)[:200]) from error


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    unknown = vocabulary.token("unknown")
    options: dict[str, Any] = {} if unknown is None else {"unk_token": unknown, "fuse_unk": True}
    tokenizer = _bpe(vocabulary, _merges_by_score(vocabulary), byte_fallback=True, **options)
    _mark_spaces(tokenizer, vocabulary, [])
    _add_ends(tokenizer, vocabulary, bos=True)
    return tokenizer


def _mark_spaces(tokenizer: Tokenizer, vocabulary: _Vocabulary, before: list[normalizers.Normalizer]) -> None:
    """Spaces become U+2581, one more stands before the text unless the file says otherwise, and all that back."""
    prefixed = vocabulary.switch("add_space_prefix", True)
    first = [normalizers.Prepend("▁")] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*before, *first, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(back)


def _unigram(vocabulary: _Vocabulary) -> Tokenizer:
    """Sentencepiece's unigrams: the likeliest way to cut each word; spaces are marked and extra ones dropped first."""
    scores = vocabulary.column("scores", float, 0.0)
    unknown = vocabulary.get("unknown_token_id", 2)
    pieces = list(zip(vocabulary.tokens, scores, strict=True))
    try:
        model = models.Unigram(pieces, unk_id=unknown, byte_fallback=_BYTE in vocabulary.types)
    except Exception as error:  # the Rust library raises plain Exception, for an unknown token outside the vocabulary
        raise vocabulary.fail("unknown_token_id", str(error)[:200]) from error
    tokenizer = Tokenizer(model)
    _mark_spaces(tokenizer, vocabulary, cleaning(vocabulary))
    if not any("▁" in token[1:] for token in vocabulary.tokens):  # no piece goes over a word's end: fewer ways to cut
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="never")
    _add_ends(tokenizer, vocabulary, bos=False, eos=True)
    return tokenizer


def cleaning(vocabulary: _Vocabulary) -> list[normalizers.Normalizer]:
    """What sentencepiece does to a text before it marks spaces, as far as the file says it."""
    steps: list[normalizers.Normalizer] = []
    charsmap = vocabulary.get("precompiled_charsmap")
    if charsmap:
        try:
            steps.append(normalizers.Precompiled(bytes(number & 0xFF for number in charsmap)))
        except Exception as error:  # the Rust library raises plain Exception
            raise vocabulary.fail("precompiled_charsmap", str(error)[:200]) from error
    if vocabulary.switch("remove_extra_whitespaces", False):
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    return steps


def _merges_by_score(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Sentencepiece keeps no merges: every split of a token into two known ones is one, the best scores first."""
    scores = vocabulary.column("scores", float, 0.0)
    known = {token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == _NORMAL}
    found: list[tuple[float, int, int, str, str]] = []
    for number, token in enumerate(vocabulary.tokens):
        if vocabulary.types[number] != _NORMAL or len(token) > 256:
            continue  # a token longer than any word: its splits would only cost quadratic time
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in known and right in known:
                found.append((-scores[number], -cut, number, left, right))
    found.sort(key=lambda merge: merge[:3])
    return [(left, right) for _, _, _, left, right in found]


def _add_ends(tokenizer: Tokenizer, vocabulary: _Vocabulary, bos: bool, eos: bool = False) -> None:
    """Puts the begin and end tokens around a text where the file says so (`bos`, `eos`: what it means if not)."""
    wanted = {"bos": vocabulary.switch("add_bos_token", bos), "eos": vocabulary.switch("add_eos_token", eos)}
    texts = {key: vocabulary.token(key) for key, on in wanted.items() if on}
    around = [(key, text) for key, text in texts.items() if text is not None]
    if around:
        ends(tokenizer, {key: (text, vocabulary.ids[text]) for key, text in around})


def ends(tokenizer: Tokenizer, around: dict[str, tuple[str, int]]) -> None:
    """Sets the post-processor that puts `bos` before and `eos` after a text."""
    start = [around["bos"][0]] if "bos" in around else []
    stop = [around["eos"][0]] if "eos" in around else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*start, "$A", *stop],
        pair=[*start, "$A", *stop, *start, "$B:1", *stop],
        special_tokens=list(around.values()),
    )


def _add_special(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Control tokens become special, user-defined ones whole words; their ids stay, as they are in the vocabulary.

    Runs of equal kinds are added together, so that ids keep their order.
    """
    kinds = {_CONTROL: True, _UNKNOWN: True, _USER_DEFINED: False}
    added = [
        AddedToken(token, special=kinds[kind], normalized=False)
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in kinds and token
    ]
    tokenizer.add_tokens([token for token in added if not token.special])
    tokenizer.add_special_tokens([token for token in added if token.special])
