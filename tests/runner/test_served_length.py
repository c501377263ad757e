"""The longest sequence that a server allows decides what a rope with two lengths turns by, from the first token on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.models.cases.rms import LONGROPE, always_long
from tests.models.parity import TRANSFORMERS, Oracle, load, logits_from
from tests.models.tiny import random_checkpoint, sized
from textmill.config import Settings
from textmill.core import Admission, Sampling, SlotWork, Step
from textmill.errors import ConfigError
from textmill.runner.build import build_runner
from textmill.weights.source import ModelSource

PROMPT = torch.randint(3, 160, (40,), generator=torch.Generator().manual_seed(1)).tolist()


def prompt_logprobs(folder: Path, longest: int | None, **flags: Any) -> torch.Tensor:
    """Of PROMPT's tokens but the first, as a server of sequences up to `longest` computes them."""
    source = ModelSource("m", folder, "local", "")
    runner, _ = build_runner(Settings(max_total_tokens=longest, **flags), source, lambda *_, **__: None)
    admission = Admission(0, tuple(PROMPT), Sampling(), prompt_logprobs=True)
    work = SlotWork(0, 0, len(PROMPT), True)
    runner.submit(Step(0, (work,), (admission,), (), ((0, 0, (0, 1, 2)),)))
    found = runner.collect().sampled[0].prompt_logprobs
    runner.close()
    return torch.tensor(found)


def logprobs_of(oracle: Oracle) -> torch.Tensor:
    scores = oracle(PROMPT[:1], PROMPT[1:])[:-1].log_softmax(-1)
    return scores.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]


@pytest.mark.parametrize(("longest", "oracle"), [(64, TRANSFORMERS), (65, always_long), (None, always_long)])
def test_longrope(tmp_path: Path, longest: int | None, oracle: Callable[[Path], Oracle]) -> None:
    sized("phi3", pad_token_id=0, original_max_position_embeddings=64, rope_parameters=LONGROPE)(tmp_path)
    torch.testing.assert_close(prompt_logprobs(tmp_path, longest), logprobs_of(oracle(tmp_path)), atol=1e-4, rtol=1e-4)


def test_a_dynamic_rope_serves_more_than_it_was_trained_on(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    sized("llama", max_position_embeddings=64, rope_parameters=rope)(tmp_path)
    exact = logprobs_of(TRANSFORMERS(tmp_path))
    torch.testing.assert_close(prompt_logprobs(tmp_path, None), exact, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(prompt_logprobs(tmp_path, 128), exact, atol=1e-2)
    with pytest.raises(ConfigError, match=r"129.* 128 tokens"):
        prompt_logprobs(tmp_path, 129)


@pytest.mark.parametrize(
    ("flags", "rope"),
    [
        ({"rope_factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope_scaling": "linear"}, {"rope_type": "linear", "factor": 1.0}),
        ({"rope_scaling": "dynamic", "rope_factor": 4.0}, {"rope_type": "dynamic", "factor": 4.0}),
    ],
)
def test_flags_replace_the_rope_of_the_config(tmp_path: Path, flags: dict[str, Any], rope: dict[str, Any]) -> None:
    """A model of 64 tokens is served with up to 4 x 64, with the same numbers as one whose config says so."""
    for name, stretched in (("plain", {"rope_type": "linear", "factor": 2.0}), ("said", rope)):
        changes = {"max_position_embeddings": 64, "rope_parameters": stretched | {"rope_theta": 10000.0}}
        sized("llama", **changes)(tmp_path / name)
    longest = 64 * int(rope["factor"])
    found = prompt_logprobs(tmp_path / "plain", longest, **flags)
    torch.testing.assert_close(found, logprobs_of(stretched_to(tmp_path / "said", longest)), atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match=f"{longest} tokens"):
        prompt_logprobs(tmp_path / "plain", longest + 1, **flags)


def test_flags_need_rotary_positions(tmp_path: Path) -> None:
    random_checkpoint("gpt2", vocab_size=160, n_embd=64, n_layer=1, n_head=4, n_positions=64)(tmp_path)
    with pytest.raises(ConfigError, match="not rotary"):
        prompt_logprobs(tmp_path, None, rope_factor=2.0)


def stretched_to(folder: Path, longest: int) -> Oracle:
    """Transformers with the frequencies it has for a sequence of `longest` tokens."""
    model = load(folder)
    turning = model.model.rotary_emb
    frequencies, _ = ROPE_INIT_FUNCTIONS[turning.rope_type](model.config, torch.device("cpu"), seq_len=longest)
    for own in (turning.inv_freq, turning.original_inv_freq):
        own.copy_(frequencies)
    return logits_from(model)
