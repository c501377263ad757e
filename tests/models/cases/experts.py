"""Mixtures of experts: Mixtral and DBRX, in every layout that checkpoints store experts in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.models.parity import Case
from tests.models.tiny import Make, random_checkpoint, sized


def mixtral(**changes: Any) -> Make:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48, "sliding_window": None}
    return sized("mixtral", **(sizes | changes))


def fused(make: Make) -> Make:
    """The same checkpoint with all experts of a layer in two tensors, as transformers 5 holds them in memory."""

    def write(folder: Path) -> None:
        make(folder)
        tensors = load_file(folder / "model.safetensors")
        experts = {name: tensors.pop(name) for name in list(tensors) if ".experts." in name}
        for name in [name for name in tensors if name.endswith("block_sparse_moe.gate.weight")]:
            block = name.removesuffix("block_sparse_moe.gate.weight")
            tensors[block + "mlp.gate.weight"] = tensors.pop(name)
            gate, down, up = (
                torch.stack([experts[f"{block}block_sparse_moe.experts.{e}.w{part}.weight"] for e in range(4)])
                for part in (1, 2, 3)
            )
            tensors[block + "mlp.experts.gate_up_proj"] = torch.cat((gate, up), 1)
            tensors[block + "mlp.experts.down_proj"] = down
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return write


def dbrx(clip: float | None = 1.5, norm: float | None = 1.0, theta: float = 10000.0) -> Make:
    return random_checkpoint(
        "dbrx",
        vocab_size=160,
        d_model=64,
        n_heads=4,
        n_layers=2,
        max_seq_len=256,
        bos_token_id=1,
        eos_token_id=2,
        attn_config={"clip_qkv": clip, "kv_n_heads": 2, "rope_theta": theta},
        ffn_config={
            "ffn_hidden_size": 48,
            "moe_num_experts": 8,
            "moe_top_k": 4,
            "moe_normalize_expert_weights": norm,
        },
        rope_parameters={"rope_type": "default", "rope_theta": theta},  # transformers reads it here only
    )


CASES = [
    Case("mixtral", "an expert's matrices on their own", mixtral()),
    Case("mixtral", "window, one expert a row", mixtral(sliding_window=24, num_experts_per_tok=1)),
    Case("mixtral", "experts in two tensors", fused(mixtral(num_hidden_layers=1))),
    Case("dbrx", "clipped", dbrx(theta=500000.0)),
    Case("dbrx", "weights normed by their squares", dbrx(norm=2.0)),
    Case("dbrx", "weights as they are", dbrx(norm=None)),
]
