"""Stop strings, found wherever they end, also inside a token; the output includes the stop string and ends with it."""

from __future__ import annotations

from collections.abc import Sequence

from textmill.text.detokenize import Piece


class StopMatcher:
    """Fed with text as it is made. Nothing is held back: the stop string belongs to the output (TGI's contract)."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._reach = max((len(stop) for stop in self._stops), default=1) - 1
        self._tail = ""
        self.matched = False

    def push(self, text: str) -> tuple[str, bool]:
        """The part of `text` up to the end of the first stop string to end in it, and whether there was one."""
        if self.matched:
            return "", True
        seen = self._tail + text
        ends = [at + len(stop) for stop in self._stops if (at := seen.find(stop)) >= 0]
        if ends:
            self.matched = True
            return text[: min(ends) - len(self._tail)], True
        self._tail = seen[-self._reach :] if self._reach else ""
        return text, False

    def push_piece(self, piece: Piece) -> tuple[Piece, bool]:
        """The same for a token's piece. Stop strings may name special tokens, so `text` is what is searched."""
        text, matched = self.push(piece.text)
        visible = text if piece.visible == piece.text else piece.visible
        return Piece(text, visible), matched
