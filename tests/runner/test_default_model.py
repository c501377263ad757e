"""The default model, exactly: the float path equals transformers token for token, the packed path stays beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from textmill.config import Settings
from textmill.core import Admission, Sampling, SlotWork, Step
from textmill.kernels.dispatch import native_available
from textmill.models.registry import build_model
from textmill.runner.build import build_executor, shape_of
from textmill.runner.runner import Executor
from textmill.runner.slots import apply
from textmill.text.tokenizer import Tokenizer, load_tokenizer
from textmill.weights.checkpoint import open_checkpoint
from textmill.weights.view import View

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not native_available(), reason="the native kernels are not built"),
]
DATA = Path(__file__).parents[1] / "data"
TOKENS = 64
TIE = 1e-3  # two logits closer than this are a tie in float32


@pytest.fixture(scope="module")
def tokenizer(default_model: Path) -> Tokenizer:
    return load_tokenizer(default_model)


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(line).ids for line in (DATA / "prompts.txt").read_text(encoding="utf-8").splitlines()]


def executor(path: Path, *, dequantize: bool) -> Executor:
    settings = Settings(max_total_tokens=1024, max_concurrent_requests=2, max_batch_total_tokens=4096)
    checkpoint = open_checkpoint(path, dequantize=dequantize)
    c = checkpoint.config
    model = build_model(c, View(checkpoint))
    return build_executor(settings, model, c, shape_of(settings, c), packed=checkpoint.packed, native=True)[0]


def admit(executor: Executor, tokens: Sequence[int], *, score: bool = False) -> None:
    admission = Admission(0, tuple(tokens), Sampling(), prompt_logprobs=score)
    apply(Step(0, (), (admission,), (), ((0, 0, tuple(range(64))),)), executor.tables)


def greedy(executor: Executor, prompt: Sequence[int]) -> list[int]:
    admit(executor, prompt)
    out: list[int] = []
    start, count = 0, len(prompt)
    for _ in range(TOKENS):
        sampled = executor.run([SlotWork(0, start, count, True)])[0]
        assert sampled.token is not None
        out.append(sampled.token.id)
        start, count = start + count, 1
    return out


def perplexity(executor: Executor, tokens: Sequence[int]) -> float:
    admit(executor, tokens, score=True)
    scores: list[float] = []
    for start in range(0, len(tokens), 256):
        count = min(256, len(tokens) - start)
        scores += executor.run([SlotWork(0, start, count, False)])[0].prompt_logprobs
    assert len(scores) == len(tokens) - 1
    return math.exp(-sum(scores) / len(scores))


NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def oracle(default_model: Path) -> Any:
    """transformers' Llama with the same file's weights, read and dequantized by the gguf package, not by us."""
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    weights = {}
    for tensor in gguf.GGUFReader(default_model).tensors:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        parts = tensor.name.removesuffix(".weight").split(".")
        if parts[0] == "blk":
            heads = {"attn_q": 9, "attn_k": 3}.get(parts[2])
            if heads:  # llama.cpp stores rotary pairs side by side, transformers in halves
                values = values.view(heads, values.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(values.shape)
            weights[f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"] = values
        else:
            weights[{"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[parts[0]]] = values
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).float()
    assert model.load_state_dict(weights, strict=False).missing_keys == ["lm_head.weight"]
    model.tie_weights()
    return model.eval()


@pytest.fixture(scope="module")
def floats(default_model: Path, prompts: list[list[int]]) -> list[list[int]]:
    running = executor(default_model, dequantize=True)
    return [greedy(running, prompt) for prompt in prompts]


def test_the_float_path_equals_transformers(oracle: Any, prompts: list[list[int]], floats: list[list[int]]) -> None:
    ties = []
    for number, (prompt, ours) in enumerate(zip(prompts, floats, strict=True)):
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 : -1]
        theirs = logits.argmax(-1).tolist()
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a != b:
                gap = float(logits[step, b] - logits[step, a])
                assert gap < TIE, f"prompt {number}, step {step}: {a} instead of {b}, {gap} apart"
                ties.append((number, step, gap))
    print(f"\n{len(prompts)} prompts x {TOKENS} tokens equal to transformers; ties: {ties or 'none'}")
    assert len(ties) <= 2


def test_the_packed_path_stays_beside_the_float_path(
    default_model: Path, tokenizer: Tokenizer, prompts: list[list[int]], floats: list[list[int]]
) -> None:
    packed = executor(default_model, dequantize=False)
    answers = [greedy(packed, prompt) for prompt in prompts]
    whole = sum(a == b for a, b in zip(answers, floats, strict=True))
    common = sum(
        next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), TOKENS)
        for a, b in zip(answers, floats, strict=True)
    )
    text = tokenizer.encode((DATA / "passage.txt").read_text(encoding="utf-8")).ids
    packed_perplexity = perplexity(packed, text)
    float_perplexity = perplexity(executor(default_model, dequantize=True), text)
    print(
        f"\npacked: {whole} of {len(prompts)} answers equal over {TOKENS} tokens, {common / len(prompts):.1f} tokens "
        f"in common on average; perplexity of {len(text)} tokens {packed_perplexity:.4f}, float {float_perplexity:.4f}"
    )
    assert packed_perplexity <= 1.005 * float_perplexity
