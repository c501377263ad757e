"""What a native step brings, column by column: as arrays, or as plain lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

ResultColumns: TypeAlias = tuple[
    NDArray[np.int32],
    NDArray[np.float32],
    NDArray[np.uint8],
    NDArray[np.int32],
    NDArray[np.int32],
    NDArray[np.float32],
    NDArray[np.float32],
]


@dataclass(frozen=True, slots=True)
class StepArrays:
    """What a step brought; the arrays belong to the caller.

    One entry per work item; several, side by side, where several rows sample. token: -1 where none was chosen or
    where a guess before it was wrong. error: 1 = the row's logits hold NaN or +Inf, 2 = its sampling parameters are
    senseless. top_ids, top_logprobs [n, widest top_n], the first top_count[i] of a row are filled.
    prompt_logprobs: per row of the step, NaN where not asked for or where the next token was not known; empty if
    nobody asked.
    """

    token: NDArray[np.int32]
    logprob: NDArray[np.float32]
    error: NDArray[np.uint8]
    top_count: NDArray[np.int32]
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]
    prompt_logprobs: NDArray[np.float32]

    def lists(self) -> StepLists:
        """The same as steps of a queue bring it."""
        tops = zip(self.top_ids, self.top_logprobs, self.top_count.tolist(), strict=True)
        return StepLists(
            self.token.tolist(),
            self.logprob.tolist(),
            self.error.tolist(),
            [list(zip(i[:n].tolist(), v[:n].tolist(), strict=True)) for i, v, n in tops] if self.top_ids.size else [],
            self.prompt_logprobs.tolist(),
        )

    def columns(self) -> ResultColumns:
        """All of them, as the native calls take them."""
        return (
            self.token,
            self.logprob,
            self.error,
            self.top_count,
            self.top_ids,
            self.top_logprobs,
            self.prompt_logprobs,
        )


class StepLists(NamedTuple):
    """As StepArrays. tops: (id, log-probability) of the likeliest tokens, place by place; empty if nobody asked."""

    token: list[int]
    logprob: list[float]
    error: list[int]
    tops: list[list[tuple[int, float]]]
    prompt_logprobs: list[float]
