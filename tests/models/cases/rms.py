"""Families with RMS norms and rotary positions."""

from __future__ import annotations

from tests.models.parity import Case
from tests.models.tiny import sized

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CASES = [
    Case("llama", "grouped", sized("llama", num_hidden_layers=3)),
    Case("llama", "multi-head", sized("llama", num_key_value_heads=4)),
    Case("llama", "one key head", sized("llama", num_key_value_heads=1)),
    Case("llama", "tied", sized("llama", tie_word_embeddings=True)),
    Case("llama", "biases", sized("llama", attention_bias=True, mlp_bias=True)),
    Case("llama", "own head_dim", sized("llama", head_dim=32)),
    Case("llama", "rope llama3", sized("llama", rope_parameters=LLAMA3)),
]
