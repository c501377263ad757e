"""How many prompt tokens a step may compute beside running streams, learned from what earlier steps took.

A step is taken to cost what a quiet one of as many decode tokens costs, plus a constant for each prompt token. Both are
running averages, so they follow the machine, the model and the length of the contexts.
"""

from __future__ import annotations

STRETCH = 2.8  # a step with prompts in it may take so many times what a quiet one takes
FEWEST = 16  # prompt tokens that every step may have: a prompt always gets on
WEIGHT = 0.3  # of the newest measurement in an average
WILDEST = 4.0  # a measurement counts as at most so many times the average: the machine had a hiccup


class Pacing:
    """Learns with `observe`, answers with `allowance`. Without a measurement there is no bound."""

    def __init__(self) -> None:
        self._quiet: dict[int, float] = {}  # seconds of a step without prompts, by its tokens
        self._prompt_token = 0.0  # seconds

    def observe(self, decode_tokens: int, prompt_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        if seconds <= 0 or decode_tokens + prompt_tokens < 1:
            return
        if not prompt_tokens:
            self._quiet[decode_tokens] = average(self._quiet.get(decode_tokens, 0.0), seconds)
        elif prompt_tokens >= FEWEST:  # fewer say little: most of such a step's time is there without them
            more = max(seconds - self.quiet_seconds(decode_tokens), seconds / 10)
            self._prompt_token = average(self._prompt_token, more / prompt_tokens)

    def quiet_seconds(self, decode_tokens: int) -> float:
        """What a step without prompts takes; 0: not known. The nearest known step speaks for others: each token more
        or less costs what a prompt's does, but a smaller step at least its share."""
        if not self._quiet:
            return 0.0
        nearest = min(self._quiet, key=lambda tokens: abs(tokens - decode_tokens))
        known = self._quiet[nearest]
        guess = known + (decode_tokens - nearest) * self._prompt_token
        return max(guess, known * min(1.0, decode_tokens / nearest))

    def allowance(self, decode_tokens: int, decoding: int, newcomers: int) -> int | None:
        """The most prompt tokens beside `decoding` streams; None: no bound.

        A burst goes first: where half as many sequences as are decoding, and more than one, wait for their first
        token, holding these back would cost more than the pause.
        """
        quiet = self.quiet_seconds(decode_tokens)
        if not decoding or newcomers >= max(decoding / 2, 2) or not quiet or not self._prompt_token:
            return None
        return max(FEWEST, int((STRETCH - 1) * quiet / self._prompt_token))


def average(known: float, new: float) -> float:
    """The running average; the first measurement is one by itself."""
    return known + WEIGHT * (min(new, WILDEST * known) - known) if known else new
