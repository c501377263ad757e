"""What a case must pass on two ranks: its oracle's logits and greedy tokens, with every tensor read by both."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.models.parity import BLOCK, ROOMY, SLOTS, STEPS, TOLERANCE, TOTAL, Prepared, admit, record
from tests.parallel.pair import Pair
from textmill.core import SlotWork
from textmill.runner.runner import Executor

SIZES = (SLOTS, TOTAL, BLOCK, ROOMY)


def check_two_ranks(prepared: Prepared, pair: Pair) -> None:
    """A prompt in three chunks, then three sequences decoded together."""
    prompt = prepared.prompt(100, 1)
    expected = prepared.prompt_logits(prompt)
    executor = pair.executor(prepared.folder, SIZES)
    admit(executor, 0, prompt, all_logits=True)
    for start, count in ((0, 37), (37, 50), (87, 13)):
        executor.run([SlotWork(0, start, count, False)])
        torch.testing.assert_close(executor.logits, expected[start : start + count], atol=TOLERANCE, rtol=TOLERANCE)
    prompts = [prepared.prompt(3 + 9 * number, 10 + number) for number in (0, 3, 7)]  # those of `check_together`
    for given, found in zip(prompts, greedy(executor, prompts), strict=True):
        prepared.assert_greedy(given, found)
    assert pair.finish() == []
    record(prepared.case, ranks=2)


def greedy(executor: Executor, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The tokens of all prompts, one step for all at a time."""
    for slot, prompt in enumerate(prompts):
        admit(executor, slot, prompt)
    work = [SlotWork(slot, 0, len(prompt), True) for slot, prompt in enumerate(prompts)]
    tokens: list[list[int]] = [[] for _ in prompts]
    for step in range(STEPS):
        for sampled in executor.run(work):
            assert sampled.token is not None
            tokens[sampled.slot].append(sampled.token.id)
        work = [SlotWork(slot, len(prompt) + step, 1, True) for slot, prompt in enumerate(prompts)]
    return tokens
