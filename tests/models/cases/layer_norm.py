"""Families with layer norms; positions learned, rotary or ALiBi."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.models.baichuan import baichuan, reference
from tests.models.parity import TRANSFORMERS, Case, Oracle, transformers_oracle
from tests.models.respelled import respelled
from tests.models.tiny import SIZES, Make, random_checkpoint, sized

EAGER = transformers_oracle("eager")

# What GPT-2 and its children call their sizes.
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# Falcon's.
FALCON_SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def mpt(*, heads: int = 4, d_model: int = 64, **attention: Any) -> Make:
    sizes: dict[str, Any] = {"vocab_size": 160, "n_layers": 2, "n_heads": heads, "expansion_ratio": 2}
    ends: dict[str, Any] = {"max_seq_len": 256, "bos_token_id": 1, "eos_token_id": 2}
    return random_checkpoint("mpt", d_model=d_model, **sizes, **ends, attn_config=attention)


def steep(model: Any, folder: Path) -> None:
    """Transformers reads `alibi_bias_max` but does not use it."""
    own, largest = model.transformer.build_mpt_alibi_tensor, model.config.attn_config.alibi_bias_max
    model.transformer.build_mpt_alibi_tensor = partial(own, alibi_bias_max=largest)


def mpt_config(**attention: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda config: config | {"attn_config": config["attn_config"] | attention}


def with_norms(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    names = [f"transformer.blocks.{layer}.attn.{part}_ln.weight" for layer in range(2) for part in "qk"]
    return tensors | {name: torch.empty(64).uniform_(0.5, 1.5, generator=generator) for name in names}


def norms(model: Any, folder: Path) -> None:
    """Transformers leaves out the layer norms over all of a token's queries and over all its keys."""
    weights = load_file(folder / "model.safetensors")
    for layer, block in enumerate(model.transformer.blocks):
        q, k = (weights[f"transformer.blocks.{layer}.attn.{part}_ln.weight"] for part in "qk")

        def normed(_module: Any, _inputs: Any, qkv: torch.Tensor, q: Any = q, k: Any = k) -> torch.Tensor:
            parts = qkv.chunk(3, -1)
            return torch.cat((F.layer_norm(parts[0], (64,), q), F.layer_norm(parts[1], (64,), k), parts[2]), -1)

        block.attn.Wqkv.register_forward_hook(normed)


def with_positions(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A table of positions, and only two key heads."""
    table = torch.empty(256, 64).normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    found = {name: tensor[: 64 + 2 * 32] if "Wqkv" in name else tensor for name, tensor in tensors.items()}
    return found | {"transformer.wpe.weight": table}


def positions(model: Any, folder: Path) -> None:
    """Transformers leaves out learned positions and grouped keys, and never leaves out ALiBi."""
    table = load_file(folder / "model.safetensors")["transformer.wpe.weight"]
    model.transformer.wte.register_forward_hook(lambda _m, _i, x: x + table[: x.shape[1]])
    model.transformer.build_mpt_alibi_tensor = lambda *_, **__: torch.zeros(4, 1, 256)
    for block in model.transformer.blocks:
        stored = block.attn.Wqkv.weight.data
        grouped = stored[64:128].view(2, 2, 16, 64)  # keys, then values, of two heads
        block.attn.Wqkv.weight.data = torch.cat((stored[:64], grouped.repeat_interleave(2, 1).reshape(128, 64)))


def corrected(change: Callable[[Any, Path], None], under: str = ".") -> Callable[[Path], Oracle]:
    """Transformers' model with something put right that it leaves out."""

    def load(folder: Path) -> Oracle:
        model: Any = AutoModelForCausalLM.from_pretrained(folder / under, dtype=torch.float32)
        model.eval()
        change(model, folder)

        def logits(prompt: Sequence[int], continuation: Sequence[int]) -> torch.Tensor:
            with torch.inference_mode():
                found: torch.Tensor = model(torch.tensor([[*prompt, *continuation]]), use_cache=False).logits
            return found[0, len(prompt) - 1 :]

        return logits

    return load


def falcon(**changes: Any) -> Make:
    return random_checkpoint("falcon", **(FALCON_SIZES | changes))


def quiet(model: Any) -> None:
    """The norm of the embeddings keeps them small, or a tied model would only repeat its last token."""
    model.transformer.word_embeddings_layernorm.weight.mul_(0.1)
    model.transformer.word_embeddings_layernorm.bias.mul_(0.1)


def bloom(**changes: Any) -> Make:
    sizes = {"vocab_size": 160, "hidden_size": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    return random_checkpoint("bloom", adjust=quiet, **(sizes | changes))


def opt(**changes: Any) -> Make:
    sizes = SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 0, "num_key_value_heads": 4}
    return random_checkpoint("opt", **(sizes | changes))


def plain(folder: Path) -> Oracle:
    return TRANSFORMERS(folder / "plain")


def santacoder(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Queries apart from key and value, all matrices of blocks transposed."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.T if ".h." in name and tensor.ndim == 2 else tensor
        if ".c_attn." in name:
            found[name.replace("c_attn", "q_attn")] = value[..., :64]
            found[name.replace("c_attn", "kv_attn")] = value[..., 64:]
        else:
            found[name] = value
    return found


def santacoder_config(config: dict[str, Any]) -> dict[str, Any]:
    own = {"model_type": "gpt2", "attention_head_type": "multiquery", "activation_function": "gelu_fast"}
    return {key: value for key, value in config.items() if key not in ("multi_query", "num_key_value_heads")} | own


def gpt2(model_type: str = "gpt2", **changes: Any) -> Make:
    return random_checkpoint(model_type, **(GPT2_SIZES | changes))


CASES = [
    Case("gpt2", "plain", gpt2()),
    Case("gpt2", "scaled by layer", gpt2(scale_attn_by_inverse_layer_idx=True, n_inner=96)),
    Case("gpt_bigcode", "one key head", gpt2("gpt_bigcode")),
    Case("gpt_bigcode", "multi-head", gpt2("gpt_bigcode", multi_query=False)),
    Case(
        "santacoder",
        "own layout",
        respelled(gpt2("gpt_bigcode"), config=santacoder_config, tensors=santacoder),
        plain,
    ),
    Case("gpt_neox", "parallel", sized("gpt_neox", num_key_value_heads=4)),
    Case("gpt_neox", "sequential", sized("gpt_neox", num_key_value_heads=4, use_parallel_residual=False)),
    Case("phi", "plain", sized("phi")),
    Case("phi", "normed queries and keys", sized("phi", qk_layernorm=True)),
    Case("starcoder2", "plain", sized("starcoder2")),
    Case("starcoder2", "window", sized("starcoder2", sliding_window=24)),
    Case("falcon", "7b", falcon()),
    Case("falcon", "40b", falcon(new_decoder_architecture=True, num_kv_heads=2, bias=True)),
    Case("falcon", "11b", falcon(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1)),
    Case(
        "falcon",
        "rw",
        falcon(alibi=True, multi_query=False, parallel_attn=False, bias=True, num_attention_heads=8, seed=1),
        not_native="bias of keys",
    ),
    Case("mpt", "plain", mpt(), EAGER),
    Case("mpt", "clipped and steep", mpt(heads=6, d_model=48, clip_qkv=1.0, alibi_bias_max=16), corrected(steep)),
    Case(
        "mpt",
        "normed queries and keys",
        respelled(mpt(), config=mpt_config(qk_ln=True), tensors=with_norms),
        corrected(norms, "plain"),
        no_ranks="a norm over all heads together cannot be split between ranks",
    ),
    Case(
        "mpt",
        "learned positions",
        respelled(mpt(), config=mpt_config(alibi=False, kv_n_heads=2), tensors=with_positions),
        corrected(positions, "plain"),
    ),
    Case("baichuan", "7B", baichuan(heads=4, alibi=False, normed_head=False), reference),
    Case("baichuan", "13B", baichuan(heads=4, alibi=True, normed_head=False), reference),
    Case("baichuan", "2 7B", baichuan(heads=4, alibi=False, normed_head=True), reference),
    Case("baichuan", "2 13B", baichuan(heads=6, alibi=True, normed_head=True, seed=1), reference),
    Case("bloom", "plain", bloom(), EAGER),
    Case(
        "bloom",
        "six heads",
        bloom(seed=3, hidden_size=48, n_head=6, apply_residual_connection_post_layernorm=True),
        EAGER,
    ),
    Case("opt", "plain", opt()),
    Case("opt", "350m", opt(seed=1, do_layer_norm_before=False, word_embed_proj_dim=32)),
    Case(
        "galactica",
        "no biases",
        opt(activation_function="gelu", enable_bias=False, layer_norm_elementwise_affine=False),
    ),
]
