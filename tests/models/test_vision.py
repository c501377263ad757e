"""Prompts with pictures against transformers: chunked through them, in a batch, preempted, from the prefix cache.

The pictures are real ones, cut by our own code (which tests/images compares with transformers' processors).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.images.pictures import picture
from tests.models.cases import vision
from tests.models.parity import BLOCK, SLOTS, TOLERANCE, Case, record
from tests.parallel.pair import Pair
from textmill.core import Admission, Emission, Finish, Image, Request, RunnerLimits, Sampling, SlotWork, Step
from textmill.engine.engine import Engine
from textmill.engine.scheduler import EngineSettings
from textmill.images.cutting import cut
from textmill.images.recipe import BICUBIC, BILINEAR, CLIP_MEAN, CLIP_STD, HALF, Recipe
from textmill.kernels.native import LOADED, Program
from textmill.models.registry import build_model
from textmill.runner.native_executor import NativeExecutor
from textmill.runner.runner import NOT_FINITE, Executor, LocalRunner
from textmill.runner.slots import apply
from textmill.runner.torch_executor import TorchExecutor
from textmill.weights.checkpoint import Checkpoint, open_checkpoint
from textmill.weights.view import View

TOTAL = 480
STEPS = 24
SPLIT = Recipe("split", HALF, HALF, BILINEAR, shortest=20, longest=61, splits=True, tokens=vision.LATENTS)
SQUARE = Recipe("square", CLIP_MEAN, CLIP_STD, BICUBIC, side=28, tokens=1)
GRID = Recipe("grid", CLIP_MEAN, CLIP_STD, BICUBIC, side=28, patch=7, choices=tuple(map(tuple, vision.CHOICES)))


@dataclass(frozen=True)
class Prompt:
    tokens: tuple[int, ...]
    images: tuple[Image, ...]


def pixels_of(image: Image) -> torch.Tensor:
    values = torch.from_numpy(np.frombuffer(image.pixels, np.uint8).copy()).reshape(image.shape).float() / 255
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in (image.mean, image.std))
    return (values - mean) / std


def grid_inputs(prompt: Prompt, tokens: Sequence[int]) -> dict[str, torch.Tensor]:
    """Pictures padded to the most tiles of any."""
    most = max(image.shape[0] for image in prompt.images)
    pixels = [
        torch.cat((one := pixels_of(image), torch.zeros(most - len(one), *one.shape[1:]))) for image in prompt.images
    ]
    return {"pixel_values": torch.stack(pixels), "image_sizes": torch.tensor([image.size for image in prompt.images])}


def padded_inputs(prompt: Prompt, tokens: Sequence[int]) -> dict[str, torch.Tensor]:
    """Pieces padded to the largest of any, with masks of what is not padding."""
    pieces = [pixels_of(image)[0] for image in prompt.images]
    height, width = (max(piece.shape[side] for piece in pieces) for side in (1, 2))
    pixels = torch.zeros(1, len(pieces), 3, height, width)
    mask = torch.zeros(1, len(pieces), height, width, dtype=torch.long)
    for place, piece in enumerate(pieces):
        pixels[0, place, :, : piece.shape[1], : piece.shape[2]] = piece
        mask[0, place, : piece.shape[1], : piece.shape[2]] = 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def masked_inputs(prompt: Prompt, tokens: Sequence[int]) -> dict[str, torch.Tensor]:
    """Which picture each token sees: the last one before it."""
    count = max(len(prompt.images), 1)
    mask = torch.zeros(1, len(tokens), count)
    for place, image in enumerate(prompt.images):
        mask[0, image.start :] = torch.eye(count)[place]
        if image.until:
            mask[0, image.until :] = 0
    pixels = [pixels_of(image) for image in prompt.images] or [torch.zeros(1, 3, 28, 28)]
    return {"pixel_values": torch.cat(pixels)[None], "image_attention_mask": mask}


@dataclass(frozen=True)
class Family:
    """How a family's prompts look: tokens around a picture's, and what transformers wants to be given."""

    case: Case
    recipe: Recipe
    image_token: int
    inputs: Callable[[Prompt, Sequence[int]], dict[str, torch.Tensor]]
    fake: int | None = None

    def prompt(self, *pieces: Sequence[int] | tuple[int, int, int]) -> Prompt:
        """Lists are tokens, tuples (height, width, seed) are pictures."""
        tokens: list[int] = []
        images: list[Image] = []
        around = [] if self.fake is None else [self.fake]
        for piece in pieces:
            if isinstance(piece, list):
                tokens += piece
                continue
            for part in cut(picture(*piece), self.recipe):
                tokens += [] if tokens[-1:] == around else around
                pixels = part.pixels.tobytes()
                digest = f"{piece}{part.pixels.shape}{hash(pixels)}".encode()
                shape, size = part.pixels.shape, part.size
                images.append(
                    Image(len(tokens), part.tokens, pixels, shape, size, self.recipe.mean, self.recipe.std, digest)  # type: ignore[arg-type]
                )
                tokens += [self.image_token] * part.tokens + around
        return Prompt(tuple(tokens), tuple(images))


def family_of(case: Case) -> Family:
    if case.family == "idefics2":
        return Family(case, SPLIT, vision.IMAGE, padded_inputs, vision.FAKE)
    if case.family == "idefics":
        return Family(case, SQUARE, vision.IMAGE, masked_inputs, vision.FAKE)
    return Family(case, GRID, vision.IMAGE, grid_inputs)


FAMILIES = [family_of(case) for case in vision.CASES]


class Seeing:
    """A family's checkpoint and its oracle; `kind` of executor: the native one, where the family can be recorded."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.kind = "native" if LOADED and not family.case.not_native else "torch"
        self.family = family
        self.folder = folder
        family.case.make(folder)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def words(self, length: int, seed: int) -> list[int]:
        """Random tokens without those that mean something."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, vision.IMAGE - 1, (length,), generator=generator).tolist()

    @torch.inference_mode()
    def expected(self, prompt: Prompt, continuation: Sequence[int] = ()) -> torch.Tensor:
        """Logits [tokens of both, vocabulary]."""
        tokens = (*prompt.tokens, *continuation)
        blind = not prompt.images and self.family.inputs is not masked_inputs
        inputs = {} if blind else self.family.inputs(prompt, tokens)
        found: torch.Tensor = self.model(torch.tensor([tokens]), use_cache=False, **inputs).logits
        return found[0]

    def assert_greedy(self, prompt: Prompt, tokens: Sequence[int]) -> None:
        logits = self.expected(prompt, tokens[:-1])[len(prompt.tokens) - 1 :]
        assert logits.argmax(-1).tolist() == list(tokens)

    def executor(self, blocks: int, kind: str | None = None) -> tuple[Executor, Checkpoint]:
        checkpoint = open_checkpoint(self.folder)
        c = checkpoint.config
        model = build_model(c, View(checkpoint))
        if (kind or self.kind) == "torch":
            return TorchExecutor(model, SLOTS, TOTAL, BLOCK, blocks), checkpoint
        sizes = {"max_rows": 512, "max_slots": SLOTS, "max_total_tokens": TOTAL, "block_size": BLOCK}
        program = Program(**sizes, vocab_size=c.vocab_size, kv_dtype="float32")
        native = NativeExecutor(model, program, "float32")
        program.allocate(blocks)
        return native, checkpoint


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.case.id)
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    return Seeing(request.param, tmp_path_factory.mktemp("case"))


def served(
    seeing: Seeing, waves: Sequence[Sequence[Prompt]], *, blocks: int, chunk: int = 512, fails: Sequence[int] = ()
) -> tuple[list[list[list[int]]], dict[str, float]]:
    """Greedy tokens of waves of prompts through the engine, each wave together, and what the engine counted.

    `fails`: which prompts of a wave give no finite numbers.
    """
    executor, _ = seeing.executor(blocks)
    vocabulary = open_checkpoint(seeing.folder).config.vocab_size
    limits = executor.memory.limited(RunnerLimits(BLOCK, blocks, SLOTS, 512, TOTAL, vocabulary))
    engine = Engine(LocalRunner(executor, limits), EngineSettings(max_batch_prefill_tokens=chunk))
    engine.start()
    done = threading.Semaphore(0)
    failed: list[tuple[int, str]] = []
    answers: list[list[list[int]]] = []
    for wave in waves:
        tokens: list[list[int]] = [[] for _ in wave]

        def sink(_step: int, emissions: Sequence[Emission], tokens: list[list[int]] = tokens) -> None:
            for one in emissions:
                tokens[one.request_id] += [token.id for token in one.tokens]
                if one.finish is not Finish.NONE:
                    failed.extend([(one.request_id, one.error)] if one.finish is Finish.FAILED else [])
                    done.release()

        for number, prompt in enumerate(wave):
            engine.submit(Request(number, prompt.tokens, STEPS, images=prompt.images), sink)
        assert all(done.acquire(timeout=100) for _ in wave)
        answers.append(tokens)
    engine.check()
    stats = dict(engine.stats())
    engine.stop()
    assert failed == [(number, NOT_FINITE) for number in fails]
    return answers, stats


def logits_of(executor: Executor, work: Sequence[SlotWork]) -> torch.Tensor:
    """The logits of the step that just ran (torch) or that runs for it (native)."""
    if isinstance(executor, TorchExecutor):
        return executor.logits
    assert isinstance(executor, NativeExecutor)
    rows = np.array([(w.slot, w.start, w.count, w.samples) for w in work], dtype=np.int32)
    return torch.from_numpy(executor.program.logits(rows, placed=executor.placed(work)))


@pytest.mark.parametrize("kind", ["torch", "native"])
def test_logits_in_chunks_that_end_inside_pictures(seeing: Seeing, kind: str) -> None:
    if kind == "native" != seeing.kind:
        return
    prompt = seeing.family.prompt(seeing.words(7, 1), (40, 70, 1), seeing.words(5, 2), (31, 30, 2), seeing.words(6, 3))
    expected = seeing.expected(prompt)
    assert float(expected.std()) > 0.5
    executor, checkpoint = seeing.executor(TOTAL // BLOCK, kind)
    blocks = tuple(range(TOTAL // BLOCK))
    admission = Admission(0, prompt.tokens, Sampling(), prompt_logprobs=True, images=prompt.images)
    apply(Step(0, (), (admission,), (), ((0, 0, blocks),)), executor.tables)
    start, largest = 0, 0.0
    for end in (8, 9, 15, 20, 33, len(prompt.tokens)):
        count = min(end, len(prompt.tokens)) - start
        if not count:
            break
        work = [SlotWork(0, start, count, False)]
        executor.run(work)
        found = logits_of(executor, work)
        largest = max(largest, float((found - expected[start : start + count]).abs().max()))
        torch.testing.assert_close(found, expected[start : start + count], atol=TOLERANCE, rtol=TOLERANCE)
        start += count
    assert checkpoint.unread() == []
    assert executor.progress_ns > 0  # a tower that takes long is seen to get on
    record(seeing.family.case, executor=kind, error=largest)


def mixed(seeing: Seeing) -> list[Prompt]:
    """Eight prompts: pictures at the beginning, at the end, several, none; shapes of all kinds."""
    words, prompt = seeing.words, seeing.family.prompt
    return [
        prompt(words(9, 1), (40, 70, 1), words(4, 2)),
        prompt(words(30, 3)),
        prompt(words(1, 4), (70, 40, 2), words(20, 5)),
        prompt(words(5, 6), (28, 28, 3), (30, 61, 4), words(2, 7)),
        prompt(words(17, 8), (20, 20, 5)),
        prompt(words(2, 9), (90, 25, 6), words(3, 10)),
        prompt(words(40, 11), (25, 90, 7), words(1, 12)),
        prompt(words(3, 13), (57, 58, 8), words(9, 14)),
    ]


@pytest.mark.parametrize("scarce", [False, True], ids=["together", "preempted"])
def test_greedy_tokens_of_eight(seeing: Seeing, scarce: bool) -> None:
    prompts = mixed(seeing)
    most = max(len(one.tokens) for one in prompts) + STEPS
    whole = sum(-(-(len(one.tokens) + STEPS) // BLOCK) for one in prompts)
    blocks = -(-most // BLOCK) + 3 if scarce else whole + 8
    [tokens], stats = served(seeing, [prompts], blocks=blocks, chunk=24)
    for prompt, found in zip(prompts, tokens, strict=True):
        seeing.assert_greedy(prompt, found)
    assert (stats["preemptions"] > 0) == scarce
    record(seeing.family.case, executor=seeing.kind, **{"preempted" if scarce else "together": True})


def test_the_prefix_cache_tells_pictures_apart(seeing: Seeing) -> None:
    """The same tokens with another picture of the same shape: nothing from its place on may be found again."""
    before, after = seeing.words(20, 1), seeing.words(9, 2)
    first, same, other = (seeing.family.prompt(before, (40, 70, seed), after) for seed in (1, 1, 2))
    assert first.tokens == other.tokens
    [[one], [again], [different]], stats = served(seeing, [[first], [same], [other]], blocks=60)
    seeing.assert_greedy(first, one)
    seeing.assert_greedy(other, different)
    assert again == one
    whole = (len(first.tokens) - 1) // BLOCK * BLOCK
    assert stats["prefix_hit_tokens"] == whole + first.images[0].start // BLOCK * BLOCK


def test_two_ranks(seeing: Seeing, pair: Pair) -> None:
    """Every rank encodes every picture; the text model is split between them."""
    blocks = TOTAL // BLOCK
    executor = pair.executor(seeing.folder, (SLOTS, TOTAL, BLOCK, 2 * blocks))
    prompts = [mixed(seeing)[3], mixed(seeing)[0]]
    admissions = tuple(Admission(n, one.tokens, Sampling(), images=one.images) for n, one in enumerate(prompts))
    tables = tuple((n, 0, tuple(range(n * blocks, (n + 1) * blocks))) for n in range(len(prompts)))
    apply(Step(0, (), admissions, (), tables), executor.tables)
    work = [SlotWork(n, 0, len(one.tokens), True) for n, one in enumerate(prompts)]
    tokens: list[list[int]] = [[] for _ in prompts]
    for step in range(STEPS):
        for sampled in executor.run(work):
            assert sampled.token is not None
            tokens[sampled.slot].append(sampled.token.id)
        work = [SlotWork(n, len(one.tokens) + step, 1, True) for n, one in enumerate(prompts)]
    for prompt, found in zip(prompts, tokens, strict=True):
        seeing.assert_greedy(prompt, found)
    assert pair.finish() == []


def test_a_picture_that_cannot_be_encoded_fails_alone(seeing: Seeing) -> None:
    good = seeing.family.prompt(seeing.words(5, 1), (40, 70, 1))
    [image, *rest] = good.images
    broken = replace(image, pixels=image.pixels[: 3 * 9], shape=(1, 3, 3, 3), digest=b"broken")
    bad = Prompt(good.tokens, (broken, *rest))
    words = Prompt(tuple(seeing.words(20, 2)), ())
    [tokens], _ = served(seeing, [[good, bad, words]], blocks=90, fails=[1])
    seeing.assert_greedy(good, tokens[0])
    seeing.assert_greedy(words, tokens[2])
