"""Models that textmill has no file for run through transformers, behind our engine: the same greedy tokens."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.models.tiny import random_checkpoint, sized
from textmill.config import Settings
from textmill.core import Emission, Finish, Request, RunnerLimits
from textmill.engine.engine import Engine
from textmill.engine.scheduler import EngineSettings
from textmill.errors import ConfigError, ModelError
from textmill.runner.build import build_runner
from textmill.runner.fallback import HubExecutor
from textmill.runner.hub_model import load_hub_model
from textmill.runner.runner import LocalRunner
from textmill.weights.source import Kind, ModelSource

STEPS = 20
# What transformers keeps of a sequence: a cache that grows by chunks, one with windows, a recurrent state, nothing.
SMALL: dict[str, Any] = {"vocab_size": 160, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LOCAL: dict[str, Any] = {"attention_types": [[["global", "local"], 1]], "window_size": 8}
HEADS: dict[str, Any] = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 16}
KINDS: dict[str, Any] = {
    "olmo": sized("olmo"),
    "gpt_neo": random_checkpoint(
        "gpt_neo", **SMALL, **LOCAL, hidden_size=64, num_layers=2, num_heads=4, max_position_embeddings=256
    ),
    "mamba2": random_checkpoint("mamba2", **SMALL, **HEADS, hidden_size=32, num_hidden_layers=2),
    "openai-gpt": random_checkpoint(
        "openai-gpt", vocab_size=160, embedding=0.3, n_embd=64, n_layer=2, n_head=4, n_positions=256
    ),
}
EXPECTED = {
    "olmo": ("past_key_values", True),
    "gpt_neo": ("past_key_values", True),
    "mamba2": ("cache_params", False),
    "openai-gpt": ("", False),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unknown") / str(request.param)
    KINDS[request.param](path)
    return path


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(3, 160, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_greedy(folder: Path, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> None:
    """Every token is transformers' first choice after all before it, the whole sequence computed at once."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, found in zip(prompts, tokens, strict=True):
        assert len(found) == STEPS
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *found[:-1]]])).logits[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == list(found)


def served(engine: Engine, prompts: Sequence[Sequence[int]], **fields: Any) -> tuple[list[list[int]], list[Emission]]:
    engine.start()
    tokens: list[list[int]] = [[] for _ in prompts]
    all_of_them: list[Emission] = []
    done = threading.Semaphore(0)

    def sink(_step: int, emissions: Sequence[Emission]) -> None:
        all_of_them.extend(emissions)
        for one in emissions:
            tokens[one.request_id] += [token.id for token in one.tokens]
            if one.finish is not Finish.NONE:
                done.release()

    for number, prompt in enumerate(prompts):
        engine.submit(Request(number, tuple(prompt), STEPS, **fields), sink)
    assert all(done.acquire(timeout=100) for _ in prompts)
    return tokens, all_of_them


def engine_of(folder: Path, blocks: int, chunk: int) -> tuple[Engine, HubExecutor]:
    model, c = load_hub_model(folder, trust_remote_code=False)
    executor = HubExecutor(model, 8, 128, 16)
    limits = RunnerLimits(16, blocks, 8, 512, 128, c.vocab_size, forward_only=True)
    return Engine(LocalRunner(executor, limits), EngineSettings(max_batch_prefill_tokens=chunk)), executor


def test_eight_at_once_in_chunks_and_preempted(folder: Path) -> None:
    prompts = [prompt_of(6 + 5 * number, number) for number in range(8)]
    engine, executor = engine_of(folder, blocks=11, chunk=24)
    assert (executor.state_name, executor.takes_chunks) == EXPECTED[folder.name]
    tokens, _ = served(engine, prompts)
    assert_greedy(folder, prompts, tokens)
    assert len({token for found in tokens for token in found}) > 4
    stats = engine.stats()
    assert stats["preemptions"] > 0
    assert stats["prefix_hit_tokens"] == 0
    engine.stop()


def test_prompt_logprobs_in_chunks(folder: Path) -> None:
    prompt = prompt_of(40, 1)
    engine, _ = engine_of(folder, blocks=64, chunk=13)
    _, emissions = served(engine, [prompt], prompt_logprobs=True)
    engine.stop()
    found = next(one.prompt_logprobs for one in emissions if one.prompt_logprobs is not None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        raw = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    expected = raw.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found[1:]), expected, atol=1e-4, rtol=1e-4)


def build(folder: Path, kind: Kind = "safetensors", **changes: Any) -> tuple[LocalRunner, Any, list[str]]:
    said: list[str] = []
    source = ModelSource("m", folder, kind, "")
    settings = Settings(max_total_tokens=64, max_batch_size=2, **changes)
    runner, info = build_runner(settings, source, lambda phase, message, **fields: said.append(message))
    return runner, info, said


def test_what_the_model_cannot_compute_fails_alone(tmp_path: Path) -> None:
    KINDS["olmo"](tmp_path)
    prompts = [prompt_of(9, number) for number in range(3)]
    prompts[1][4] = 159
    engine, executor = engine_of(tmp_path, blocks=64, chunk=64)
    call = executor._call

    def failing(ids: torch.Tensor, *rest: Any) -> Any:
        if ids.shape[1] > 1 and 159 in ids:
            raise RuntimeError("no such token")
        return call(ids, *rest)

    executor._call = failing  # type: ignore[method-assign]
    tokens, emissions = served(engine, prompts)
    engine.stop()
    assert_greedy(tmp_path, [prompts[0], prompts[2]], [tokens[0], tokens[2]])
    assert [one.request_id for one in emissions if one.finish is Finish.FAILED] == [1]
    assert next(one.error for one in emissions if one.error) == "RuntimeError in the model's code"


def test_pytorchs_own_files_are_read_too(tmp_path: Path) -> None:
    KINDS["olmo"](tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    runner, info, _ = build(tmp_path, kind="torch")
    runner.close()
    assert info.model_type == "olmo"


def test_a_runner_is_built_and_says_how(folder: Path) -> None:
    runner, info, said = build(folder)
    runner.close()
    assert (info.model_type, info.vocab_size, info.max_total_tokens) == (folder.name, 160, 64)
    assert runner.limits.forward_only
    assert any("transformers runs it" in line for line in said)
    assert any("nothing paged" in line for line in said)


def broken(tmp_path: Path, **fields: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


def test_what_cannot_be_served_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="transformers cannot load model_type 'unheard-of'"):
        build(broken(tmp_path, model_type="unheard-of"))
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        build(broken(tmp_path, model_type="unheard-of", auto_map={"AutoModelForCausalLM": "code.Model"}))
    with pytest.raises(ModelError, match="encoder-decoder"):
        build(broken(tmp_path, model_type="unheard-of", is_encoder_decoder=True))
    with pytest.raises(ConfigError, match="no file for this model_type"):
        build(broken(tmp_path, model_type="unheard-of"), kernels="native")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'textmill\[fallback\]'"):
        build(broken(tmp_path, model_type="olmo"))


REMOTE = """
from transformers import OlmoConfig, OlmoForCausalLM
class MyConfig(OlmoConfig):
    model_type = "my-own"
class MyModel(OlmoForCausalLM):
    config_class = MyConfig
"""


def test_code_from_the_folder_runs_only_where_it_is_trusted(tmp_path: Path) -> None:
    KINDS["olmo"](tmp_path)
    path = tmp_path / "config.json"
    auto_map = {"AutoConfig": "modeling_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyModel"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "my-own", "auto_map": auto_map}))
    (tmp_path / "modeling_my.py").write_text(REMOTE)
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        build(tmp_path)
    runner, info, _ = build(tmp_path, trust_remote_code=True)
    runner.close()
    assert info.model_type == "my-own"
