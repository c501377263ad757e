"""Guessing changes no bit of an answer: tokens, log-probabilities, alternatives; greedy and seeded; in any company."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.runner.test_independence import Answers, ask, start
from textmill.config import Settings
from textmill.core import Admission, Request, RunnerLimits, Sampled, Sampling, SlotWork, Step, TokenChoice
from textmill.kernels.dispatch import native_available
from textmill.models.registry import build_model
from textmill.runner.build import build_executor, shape_of
from textmill.runner.runner import LocalRunner
from textmill.runner.slots import SlotTables
from textmill.text.tokenizer import Tokenizer, load_tokenizer
from textmill.weights.checkpoint import open_checkpoint
from textmill.weights.view import View

needs_native = pytest.mark.skipif(not native_available(), reason="the native kernels are not built")

GREEDY = Sampling()
COOL = Sampling(do_sample=True, temperature=0.5, top_p=0.9, frequency_penalty=0.1, seed=2**60 + 7)
KINDS = {"greedy": GREEDY, "seeded": COOL}
OUTPUT_TOKENS = 72


@pytest.fixture(scope="module")
def tokenizer(default_model: Path) -> Tokenizer:
    return load_tokenizer(default_model)


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Four requests to repeat a paragraph."""
    paragraphs = (Path(__file__).parents[1] / "data" / "passage.txt").read_text(encoding="utf-8").split("\n\n")[:4]
    form = "<|im_start|>user\nRepeat the following text word for word.\n\n{}<|im_end|>\n<|im_start|>assistant\n"
    return [tuple(tokenizer.encode(form.format(text), False).ids) for text in paragraphs]


def repeat(prompts: Sequence[tuple[int, ...]], sampling: Sampling) -> list[Request]:
    return [
        Request(number, tokens, OUTPUT_TOKENS, sampling, top_n_tokens=3, prompt_logprobs=number == 1)
        for number, tokens in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def plain(prompts: list[tuple[int, ...]]) -> dict[str, Answers]:
    """Every request by itself, without guesses."""
    engine = start(prefix=False)
    found = {}
    for kind, sampling in KINDS.items():
        found[kind] = Answers()
        for request in repeat(prompts, sampling):
            answers = ask(engine, [request])
            found[kind].tokens |= answers.tokens
    assert engine.stats()["speculated_tokens_accepted"] == 0
    engine.stop()
    return found


@needs_native
@pytest.mark.parametrize("kind", KINDS)
def test_alone(kind: str, prompts: list[tuple[int, ...]], plain: dict[str, Answers]) -> None:
    engine = start(speculate=6)
    for number in (0, 1):
        assert ask(engine, [repeat(prompts, KINDS[kind])[number]]).tokens[number] == plain[kind].tokens[number]
    stats = engine.stats()
    engine.stop()
    assert stats["speculated_tokens_accepted"] > OUTPUT_TOKENS
    assert stats["speculated_tokens_accepted"] > stats["speculated_tokens_rejected"]
    assert stats["steps"] < 1.5 * OUTPUT_TOKENS


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [7, 512])
def test_among_others_who_guess(
    kind: str, chunk: int, prompts: list[tuple[int, ...]], plain: dict[str, Answers]
) -> None:
    engine = start(chunk=chunk, speculate=8)
    answers = ask(engine, repeat(prompts, KINDS[kind]))
    stats = engine.stats()
    engine.stop()
    assert answers.tokens == plain[kind].tokens
    assert stats["speculated_tokens_accepted"] > OUTPUT_TOKENS


@needs_native
def test_with_preemptions(prompts: list[tuple[int, ...]], plain: dict[str, Answers]) -> None:
    engine = start(kv_tokens=16 * 32, prefix=False, speculate=6)
    answers = ask(engine, repeat(prompts, COOL))
    stats = engine.stats()
    engine.stop()
    assert stats["preemptions"] > 0
    assert stats["speculated_tokens_accepted"] > 0
    assert answers.tokens == plain["seeded"].tokens


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_native)])
@pytest.mark.parametrize("sampling", [GREEDY, replace(COOL, repetition_penalty=1.2, top_k=9)])
def test_executors_verify_drafts(native: bool, sampling: Sampling, tiny_llama: Callable[..., Path]) -> None:
    """The native step and the torch one, which is the meaning: right guesses, a wrong one, guesses after a chunk."""
    settings = Settings(max_total_tokens=128, max_concurrent_requests=2, max_batch_total_tokens=256)
    checkpoint = open_checkpoint(tiny_llama(), dequantize=False)
    c = checkpoint.config
    model = build_model(c, View(checkpoint))
    executor, _ = build_executor(settings, model, c, shape_of(settings, c), packed=False, native=native)
    runner = LocalRunner(executor, RunnerLimits(16, 16, 2, 64, 128, c.vocab_size))
    tokens = tuple((7 * i) % 300 + 3 for i in range(20))

    def step(number: int, work: SlotWork, slot: int | None = None) -> list[TokenChoice]:
        admissions = () if slot is None else (Admission(slot, tokens, sampling, 2),)
        blocks = () if slot is None else ((slot, 0, tuple(range(8 * slot, 8 * slot + 8))),)
        runner.submit(Step(number, (work,), admissions, (), blocks))
        sampled = runner.collect().sampled[0]
        assert sampled.token is not None, sampled.error
        return [sampled.token, *sampled.more]

    alone = step(1, SlotWork(0, 0, 20, True), slot=0)
    for length in range(20, 31):
        alone += step(length, SlotWork(0, length, 1, True))
    ids = [choice.id for choice in alone]
    wrong = (ids[8] + 1) % 300
    found = step(40, SlotWork(1, 0, 23, True, tuple(ids[:3])), slot=1)
    found += step(41, SlotWork(1, 23, 4, True, tuple(ids[4:7])))
    found += step(42, SlotWork(1, 27, 4, True, (wrong, ids[9], ids[10])))
    found += step(43, SlotWork(1, 28, 1, True))
    runner.close()
    assert [len(one.top) for one in found] == [2] * len(found)
    assert [one.id for one in found] == ids[: len(found)]
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in alone[: len(found)]], abs=1e-4)
    if native:
        assert found == alone[: len(found)]
    assert len(found) == 10


def test_a_row_whose_guesses_break_it_is_computed_without_them() -> None:
    asked: list[SlotWork] = []

    class Fragile:
        """Fails whoever guesses."""

        weight_bytes = buffer_bytes = 0
        compute_seconds = 0.0
        progress_ns = 0
        dtype = "float32"
        tables = SlotTables(2, 16, 4)

        def run(self, work: Sequence[SlotWork]) -> list[Sampled]:
            asked.extend(work)
            return [
                Sampled(w.slot, None, error="not finite") if w.draft else Sampled(w.slot, TokenChoice(4, 0.0))
                for w in work
            ]

    runner = LocalRunner(Fragile(), RunnerLimits(4, 8, 2, 8, 16, 10))
    admissions = (Admission(0, (1, 2), Sampling()), Admission(1, (1, 2), Sampling()))
    runner.submit(Step(1, (SlotWork(0, 1, 3, True, (7, 8)), SlotWork(1, 1, 1, True)), admissions))
    result = runner.collect()
    runner.close()
    assert [sampled.token for sampled in result.sampled] == [TokenChoice(4, 0.0)] * 2
    assert asked[-1] == SlotWork(0, 1, 1, True)
