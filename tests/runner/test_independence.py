"""The packed default model answers a request with the same bits whatever happens around it.

Alone, among 15 others, in chunks of 7, 64 and 512 tokens, from a cold and a warm prefix cache, after a preemption;
for greedy and for seeded sampling, tokens and log-probabilities. (Streamed or not is one code path above the engine.)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from textmill.config import Settings
from textmill.core import Emission, Finish, Request, Sampling, TokenChoice
from textmill.engine.engine import Engine
from textmill.engine.scheduler import EngineSettings
from textmill.kernels.dispatch import native_available
from textmill.runner.build import build_runner
from textmill.text.tokenizer import Tokenizer, load_tokenizer
from textmill.weights.source import resolve

pytestmark = pytest.mark.skipif(not native_available(), reason="the native kernels are not built")

GREEDY = Sampling()
SEEDED = Sampling(do_sample=True, temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=2**60 + 7)
NEIGHBOURS = 15
OUTPUT_TOKENS = 24


@dataclass
class Answers:
    """Collects the emissions of several requests and waits for their ends."""

    def __post_init__(self) -> None:
        self.tokens: dict[int, list[TokenChoice]] = {}
        self.ends: dict[int, Emission] = {}
        self.cached: dict[int, int] = {}
        self._changed = threading.Condition()

    def sink(self, step: int, emissions: list[Emission]) -> None:
        with self._changed:
            for one in emissions:
                if one.tokens and one.request_id not in self.tokens:
                    self.cached[one.request_id] = one.cached_tokens
                self.tokens.setdefault(one.request_id, []).extend(one.tokens)
                if one.finish is not Finish.NONE:
                    self.ends[one.request_id] = one
            self._changed.notify_all()

    def wait(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.ends) == count, timeout=100)


@pytest.fixture(scope="module")
def tokenizer(default_model: Path) -> Tokenizer:
    return load_tokenizer(default_model)


@pytest.fixture(scope="module")
def prompt(tokenizer: Tokenizer) -> tuple[int, ...]:
    text = (Path(__file__).parents[1] / "data" / "passage.txt").read_text(encoding="utf-8")
    return tuple(tokenizer.encode(text).ids[:150])


def start(chunk: int | None = None, kv_tokens: int = 8192, prefix: bool = True, speculate: int = 0) -> Engine:
    settings = Settings(
        max_total_tokens=min(1024, kv_tokens), max_batch_total_tokens=kv_tokens, max_concurrent_requests=32
    )
    runner, _ = build_runner(settings, resolve(None), lambda *_, **__: None)
    engine = Engine(runner, EngineSettings(max_batch_prefill_tokens=chunk, prefix_caching=prefix, speculate=speculate))
    engine.start()
    return engine


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine made with the test's `engine` marker arguments."""
    running = start(**getattr(request, "param", {}))
    yield running
    running.stop()


def ask(engine: Engine, requests: list[Request]) -> Answers:
    answers = Answers()
    for one in requests:
        engine.submit(one, answers.sink)
    answers.wait(len(requests))
    assert {end.finish for end in answers.ends.values()} <= {Finish.LENGTH}, answers.ends
    return answers


def request(number: int, tokens: tuple[int, ...], sampling: Sampling, count: int = OUTPUT_TOKENS) -> Request:
    return Request(number, tokens, count, sampling, top_n_tokens=3)


def neighbours(prompt: tuple[int, ...]) -> list[Request]:
    """Requests of other lengths, contents and knobs than the one that is watched."""
    return [
        request(100 + i, prompt[i : 20 + 7 * i], replace(SEEDED, seed=i) if i % 2 else GREEDY, 8 + 2 * i)
        for i in range(NEIGHBOURS)
    ]


@pytest.fixture(scope="module")
def alone(prompt: tuple[int, ...], default_model: Path) -> dict[str, list[TokenChoice]]:
    """The watched request's answers from an engine that never saw anything else, without a prefix cache."""
    engine = start(prefix=False)
    found = {
        name: ask(engine, [request(1, prompt, sampling)]).tokens[1]
        for name, sampling in (("greedy", GREEDY), ("seeded", SEEDED))
    }
    engine.stop()
    assert found["greedy"] != found["seeded"]
    return found


KINDS = pytest.mark.parametrize(("kind", "sampling"), [("greedy", GREEDY), ("seeded", SEEDED)])


@KINDS
@pytest.mark.parametrize("engine", [{"chunk": 7}, {"chunk": 64}, {"chunk": 512}], indirect=True, ids=str)
def test_among_others_in_chunks(
    engine: Engine, kind: str, sampling: Sampling, prompt: tuple[int, ...], alone: dict[str, list[TokenChoice]]
) -> None:
    others = neighbours(prompt)
    crowd = [*others[:8], request(1, prompt, sampling), *others[8:]]
    assert ask(engine, crowd).tokens[1] == alone[kind]


@KINDS
def test_from_a_warm_prefix_cache(
    engine: Engine, kind: str, sampling: Sampling, prompt: tuple[int, ...], alone: dict[str, list[TokenChoice]]
) -> None:
    cold = ask(engine, [request(1, prompt, sampling)])
    warm = ask(engine, [request(1, prompt, sampling)])
    assert (cold.cached[1], warm.cached[1]) == (0, len(prompt) // 16 * 16)
    assert cold.tokens[1] == warm.tokens[1] == alone[kind]


@KINDS
@pytest.mark.parametrize("engine", [{"kv_tokens": 16 * 24, "prefix": False}], indirect=True, ids=["small cache"])
def test_after_a_preemption(
    engine: Engine, kind: str, sampling: Sampling, prompt: tuple[int, ...], alone: dict[str, list[TokenChoice]]
) -> None:
    """Two older requests grow until the youngest, the watched one, has to give its blocks back."""
    older = [request(2, prompt[:100], GREEDY, 80), request(3, prompt[40:100], GREEDY, 100)]
    answers = ask(engine, [*older, request(1, prompt, sampling)])
    assert engine.stats()["preemptions"] > 0
    assert answers.tokens[1] == alone[kind]
