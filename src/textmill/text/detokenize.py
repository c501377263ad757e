"""Incremental decoding: each token's own text as it comes, nothing while a character is incomplete (TGI's contract)."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from textmill.text.tokenizer import Tokenizer

_PREFIX_WINDOW = 5  # prompt tokens that a decoder with context sees before the first new one (TGI's number)
_LONGEST_HOLD = 8  # tokens: a character has at most four bytes, so what is still undecodable then is broken for good
_REPLACEMENT = "\ufffd"


class Piece(NamedTuple):
    """What one token added: `text` with special tokens spelled out, `visible` without them (generated_text)."""

    text: str
    visible: str


class _Decoder(Protocol):
    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...

    @property
    def holds(self) -> bool:
        """True while something pushed has not come out."""
        ...


class StreamDecoder:
    """Decodes one generated sequence. The visible pieces and `flush()` add up to the whole generated text."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._all, self._visible = self._decoders(prompt_ids)
        self._whole = tokenizer.is_byte_level  # nothing is held back, and tokens' bytes are their text

    def _decoders(self, prompt_ids: Sequence[int]) -> tuple[_Decoder, _Decoder]:
        tokenizer = self._tokenizer
        if tokenizer.is_byte_level:
            return _ByteDecoder(tokenizer), _ByteDecoder(tokenizer)
        tail = list(prompt_ids[-_PREFIX_WINDOW:])
        shown = [number for number in tail if not tokenizer.is_special(number)]
        return _WindowDecoder(tokenizer, tail), _WindowDecoder(tokenizer, shown)

    def push(self, token_id: int) -> Piece:
        if self._whole:
            try:
                text = self._tokenizer.token_bytes(token_id).decode()
            except UnicodeDecodeError:  # a part of a character
                return self._push(token_id)
            return Piece(text, "" if self._tokenizer.is_special(token_id) else text)
        return self._push(token_id)

    def _push(self, token_id: int) -> Piece:
        text = self._all.push(token_id)
        visible = "" if self._tokenizer.is_special(token_id) else self._visible.push(token_id)
        self._whole = self._tokenizer.is_byte_level and not (self._all.holds or self._visible.holds)
        return Piece(text, visible)

    def flush(self) -> str:
        """At the end: the visible text still held back (a broken character, as U+FFFD), or ""."""
        self._all.flush()
        return self._visible.flush()


class _ByteDecoder:
    """For byte-level tokenizers, whose text is their tokens' bytes: exact for any ids, and cheap."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    @property
    def holds(self) -> bool:
        return bool(self._held or self._utf8.getstate()[0])

    def push(self, token_id: int) -> str:
        text = self._held + self._utf8.decode(self._bytes_of(token_id))
        if self._utf8.getstate()[0]:  # the last character is incomplete: TGI gives nothing of this token yet
            self._held = text
            return ""
        self._held = ""
        return text

    def flush(self) -> str:
        text = self._held + self._utf8.decode(b"", final=True)
        self._held = ""
        return text


class _WindowDecoder:
    """For any other decoder: the new token's text is what it adds to the text of a short window before it."""

    def __init__(self, tokenizer: Tokenizer, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._window = context
        self._before = self._decode()
        self._held = 0

    @property
    def holds(self) -> bool:
        return bool(self._held)

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        self._held += 1
        text = self._decode()
        incomplete = text.endswith(_REPLACEMENT) or len(text) <= len(self._before)
        return "" if incomplete and self._held < _LONGEST_HOLD else self._emit(text)

    def _emit(self, text: str) -> str:
        new = text[len(self._before) :]
        self._window = self._window[-max(self._held, 1) :]  # the tokens just shown are the next one's context
        self._held = 0
        self._before = self._decode()
        return new

    def flush(self) -> str:
        return self._emit(self._decode()) if self._held else ""
