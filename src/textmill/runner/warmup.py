"""The first steps, before anyone waits for them: touch every buffer, and refuse a model that computes garbage."""

from __future__ import annotations

import time

from textmill.core import Admission, RunnerLimits, Sampling, SlotWork, Step
from textmill.errors import ModelError
from textmill.runner.runner import Executor
from textmill.runner.slots import apply

PROMPT_TOKENS = 32


def warm_up(executor: Executor, limits: RunnerLimits) -> float:
    """Runs one prompt and one decode step in slot 0 and leaves the tables empty. Returns seconds.

    Raises ModelError when the model's logits are not finite.
    """
    started = time.perf_counter()
    count = max(1, min(PROMPT_TOKENS, limits.max_total_tokens - 1, limits.max_step_tokens))
    blocks = tuple(range(-(-(count + 1) // limits.block_size)))
    tokens = tuple(i % limits.vocab_size for i in range(count))
    sampling = Sampling(do_sample=True, top_k=4, top_p=0.9, seed=1)
    admission = Admission(0, tokens, sampling, encoder_tokens=tokens if limits.encodes else ())
    first = (SlotWork(0, 0, count, True),)
    second = (SlotWork(0, count, 1, True),)
    for step in (Step(0, first, (admission,), (), ((0, 0, blocks),)), Step(1, second)):
        apply(step, executor.tables)
        sampled = executor.run(step.work)[0]
        if sampled.error or sampled.token is None:
            raise ModelError(f"the model fails its first step: {sampled.error}; the file may be damaged")
    apply(Step(2, (), (), (0,)), executor.tables)
    return time.perf_counter() - started
