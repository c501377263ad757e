"""Families with layer norms; positions learned, rotary or ALiBi."""

from __future__ import annotations

from typing import Any

from tests.models.parity import Case
from tests.models.tiny import Make, random_checkpoint, sized

LEARNED = "learned positions"

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


def gpt2(model_type: str = "gpt2", **changes: Any) -> Make:
    return random_checkpoint(model_type, **(GPT2_SIZES | changes))


CASES = [
    Case("gpt2", "plain", gpt2(), not_native=LEARNED),
    Case("gpt2", "scaled by layer", gpt2(scale_attn_by_inverse_layer_idx=True, n_inner=96), not_native=LEARNED),
    Case("gpt_bigcode", "one key head", gpt2("gpt_bigcode"), not_native=LEARNED),
    Case("gpt_bigcode", "multi-head", gpt2("gpt_bigcode", multi_query=False), not_native=LEARNED),
    Case("gpt_neox", "parallel", sized("gpt_neox", num_key_value_heads=4)),
    Case("gpt_neox", "sequential", sized("gpt_neox", num_key_value_heads=4, use_parallel_residual=False)),
    Case("phi", "plain", sized("phi")),
    Case("starcoder2", "plain", sized("starcoder2")),
    Case("starcoder2", "window", sized("starcoder2", sliding_window=24)),
]
