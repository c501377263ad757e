"""What a case must pass on two ranks: its oracle's logits, and its oracle's greedy tokens through the whole engine."""

from __future__ import annotations

import torch

from tests.models.parity import BLOCK, ROOMY, SLOTS, TOLERANCE, TOTAL, Prepared, admit, record, served
from tests.parallel.pair import Pair
from textmill.core import SlotWork

SIZES = (SLOTS, TOTAL, BLOCK, ROOMY)


def check_two_ranks(prepared: Prepared, pair: Pair) -> None:
    """A prompt in three chunks, then five sequences at once in small chunks; both ranks read every tensor."""
    prompt = prepared.prompt(100, 1)
    expected = prepared.prompt_logits(prompt)
    executor = pair.executor(prepared.folder, *SIZES)
    admit(executor, 0, prompt, all_logits=True)
    for start, count in ((0, 37), (37, 50), (87, 13)):
        executor.run([SlotWork(0, start, count, False)])
        torch.testing.assert_close(executor.logits, expected[start : start + count], atol=TOLERANCE, rtol=TOLERANCE)
    prompts = [prepared.prompt(3 + 9 * number, 10 + number) for number in range(0, 8, 2)]
    tokens, _ = served(executor, prepared.vocabulary, prompts, chunk=24)
    for given, found in zip((*prompts, prompts[-1]), tokens, strict=True):
        prepared.assert_greedy(given, found)
    assert pair.finish() == []
    record(prepared.case, ranks=2)
