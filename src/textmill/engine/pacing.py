"""How many prompt tokens a step may compute beside running streams, learned from what earlier steps took.

A step is taken to cost what a quiet one of as many decode tokens costs, plus a constant for each prompt token. Only the
ratio of the two matters. If quiet steps were seen a moment ago, a step that takes longer than expected tells what a
prompt's tokens cost now (more and more, the further on in a long prompt); else both are scaled, and a machine that is
slower for a while changes nothing.
"""

from __future__ import annotations

STRETCH = 2.8  # a step with prompts in it may take so many times what a quiet one takes
FEWEST = 16  # prompt tokens that every step may have: a prompt always gets on
BURST_SECONDS = 0.125  # of prompts in a step while several sequences wait for their first token
BURST_FEWEST = 128  # prompt tokens of such a step at least: about where larger ones compute no faster
TELLING = 64  # prompt tokens in a step without decodes from which on it tells what one costs
FRESH = 64  # steps with prompts in a row, for which the quiet steps before them still count as of a moment ago
WEIGHT = 0.15  # of the newest measurement in an average
WILDEST = 4.0  # a measurement counts as at most so many times the average, or as little: the machine had a hiccup


class Pacing:
    """Learns with `observe`, answers with `allowance`. Without measurements only bursts are bounded."""

    def __init__(self) -> None:
        self._quiet: dict[int, float] = {}  # seconds of a step without prompts, by its tokens
        self._prompt_token = 0.0  # seconds
        self._age = 0  # steps with both since the last quiet one

    def observe(self, decode_tokens: int, prompt_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        if seconds <= 0 or decode_tokens + prompt_tokens < 1:
            return
        if not prompt_tokens:
            self._quiet[decode_tokens] = average(self._quiet.get(decode_tokens, 0.0), seconds)
            self._age = 0
        elif not decode_tokens:
            if prompt_tokens >= TELLING:
                self._prompt_token = average(self._prompt_token, seconds / prompt_tokens)
        elif self._prompt_token and self._quiet:
            self._age += 1
            quiet = self.quiet_seconds(decode_tokens)
            if self._age <= FRESH:
                least = self._prompt_token / WILDEST
                self._prompt_token = average(self._prompt_token, max((seconds - quiet) / prompt_tokens, least))
            else:
                self._scale(seconds / (quiet + prompt_tokens * self._prompt_token))

    def _scale(self, surprise: float) -> None:
        """A step with both took `surprise` times what was expected: nobody knows which of the two it was."""
        factor = min(max(surprise, 1 / WILDEST), WILDEST) ** WEIGHT
        self._prompt_token *= factor
        for tokens in self._quiet:
            self._quiet[tokens] *= factor

    def quiet_seconds(self, decode_tokens: int) -> float:
        """What a step without prompts takes, rather too much than too little where none was seen; 0: not known."""
        if decode_tokens in self._quiet or not self._quiet:
            return self._quiet.get(decode_tokens, 0.0)
        larger = min((tokens for tokens in self._quiet if tokens > decode_tokens), default=0)
        if larger:
            return self._quiet[larger]
        largest = max(self._quiet)
        return self._quiet[largest] * decode_tokens / largest

    def allowance(self, decode_tokens: int, decoding: int, newcomers: int) -> int | None:
        """The most prompt tokens beside `decoding` streams (or none); None: no bound.

        A burst goes first: where half as many sequences as are decoding, and more than one, wait for their first
        token, holding these back would cost more than the pause. It goes in pieces, though, so that whoever came
        first is answered first, not all of them together at the end.
        """
        cost = self._prompt_token
        if newcomers >= max(decoding / 2, 2):
            return max(BURST_FEWEST, int(BURST_SECONDS / cost)) if cost else BURST_FEWEST
        quiet = self.quiet_seconds(decode_tokens)
        if not decoding or not quiet or not cost:
            return None
        # A decode token never costs less than a prompt's.
        worth = max(quiet / cost, decode_tokens)
        return max(FEWEST, int((STRETCH - 1) * worth))


def average(known: float, new: float) -> float:
    """The running average; the first measurement is one by itself."""
    return known + WEIGHT * (min(new, WILDEST * known) - known) if known else new
