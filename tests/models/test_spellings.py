"""One checkpoint in several spellings gives one model: other names of tensors and settings, settings left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from tests.models.cases.layer_norm import bloom, falcon, gpt2, opt
from tests.models.cases.state import t5
from tests.models.parity import admit
from tests.models.respelled import (
    older_rope,
    renamed,
    respelled,
    with_copies,
    with_frequencies,
    with_masks,
    without_prefix,
)
from tests.models.tiny import Make, sized
from textmill.core import SlotWork
from textmill.errors import ModelError
from textmill.models.registry import build_model
from textmill.runner.hub_model import needs_hub_model
from textmill.runner.torch_executor import TorchExecutor
from textmill.weights.checkpoint import open_checkpoint
from textmill.weights.config import ModelConfig, read_config
from textmill.weights.view import View

FALCON = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "num_kv_heads": "n_head_kv"}
NEW_TO_FALCON = ("new_decoder_architecture", "activation", "ffn_hidden_size", "rope_parameters")
neox = sized("gpt_neox", num_key_value_heads=4, rope_parameters={"rope_theta": 500.0, "partial_rotary_factor": 0.5})
SPELLINGS: dict[str, Make] = {
    "gpt2 with masks": respelled(gpt2(), tensors=with_masks),
    "gpt_neox with frequencies": respelled(neox, tensors=with_frequencies),
    "gpt_neox of old": respelled(
        neox, config=older_rope(rope_theta="rotary_emb_base", partial_rotary_factor="rotary_pct")
    ),
    "phi of old": respelled(sized("phi"), config=older_rope()),
    "starcoder2 of old": respelled(sized("starcoder2"), config=older_rope()),
    "bloom's own": respelled(
        bloom(),
        tensors=without_prefix,
        config=renamed({"hidden_size": "n_embed"}, "apply_residual_connection_post_layernorm"),
    ),
    "t5 of old": respelled(
        t5(),
        tensors=with_copies,
        config=renamed({}, "scale_decoder_outputs", "tie_word_embeddings", "feed_forward_proj", "num_decoder_layers"),
    ),
    "opt's own": respelled(opt(), tensors=without_prefix),
    "RefinedWebModel": respelled(falcon(), config=renamed(FALCON, *NEW_TO_FALCON, model_type="RefinedWebModel")),
    "RefinedWeb": respelled(
        falcon(new_decoder_architecture=True, num_kv_heads=2),
        config=renamed(FALCON, *NEW_TO_FALCON, "multi_query", "parallel_attn", model_type="RefinedWeb"),
    ),
}
FAMILIES = ["bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "mpt", "opt", "phi", "starcoder2", "t5"]
# Sizes and ends, which no file leaves out.
SAID = {
    *("model_type", "vocab_size", "bos_token_id", "eos_token_id", "hidden_size", "n_embd", "d_model"),
    *("num_hidden_layers", "n_layer", "n_layers", "num_attention_heads", "n_head", "n_heads"),
    *("n_positions", "max_position_embeddings", "max_seq_len", "tie_word_embeddings"),
}


def logits(folder: Path) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    executor = TorchExecutor(build_model(checkpoint.config, View(checkpoint)), 1, 192, 16, 12)
    admit(executor, 0, range(3, 40), all_logits=True)
    executor.run([SlotWork(0, 0, 37, False)])
    assert checkpoint.unread() == []
    return executor.logits


@pytest.mark.parametrize("name", SPELLINGS)
def test_same_logits(tmp_path: Path, name: str) -> None:
    SPELLINGS[name](tmp_path)
    assert torch.equal(logits(tmp_path), logits(tmp_path / "plain"))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_the_familys_default(tmp_path: Path, family: str) -> None:
    """Files of some versions hold only what differs from transformers' defaults."""
    whole = AutoConfig.for_model(family).to_dict()
    kept = {key: value for key, value in whole.items() if key in SAID}

    def read(config: dict[str, object]) -> ModelConfig:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return replace(read_config(tmp_path), raw={})

    assert read(kept) == read(whole)


@pytest.mark.parametrize("model_type", ["RefinedWeb", "RefinedWebModel", "gpt2", "falcon"])
def test_no_spelling_is_taken_for_a_family_we_lack(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "attention_head_type": "multiquery"}))
    assert not needs_hub_model(tmp_path)


def test_a_table_of_positions_is_as_long_as_the_config_says(tmp_path: Path) -> None:
    respelled(gpt2(), config=renamed({}, n_positions=257))(tmp_path)
    with pytest.raises(ModelError, match=r"wpe\.weight: 256 rows, but the config needs 257"):
        logits(tmp_path)
