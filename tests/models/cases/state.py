"""Families whose memory is not all keys and values of the paged cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from tests.models.parity import Case, Oracle, source_of, transformers_oracle
from tests.models.tiny import Make, random_checkpoint

PLAIN = transformers_oracle("eager")
STATE = "a state per sequence is in no block"


def lively(model: Any) -> None:
    """Steps and decays of useful size: random ones would forget at once or blow up."""
    generator = torch.Generator().manual_seed(1)
    for layer in model.backbone.layers:
        layer.mixer.A_log.uniform_(-1.0, 1.0, generator=generator)
        layer.mixer.D.uniform_(0.5, 1.5, generator=generator)
        layer.mixer.dt_proj.bias.uniform_(-2.0, 0.5, generator=generator)


def mamba(**changes: Any) -> Make:
    fields = {"vocab_size": 160, "hidden_size": 48, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 5}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    return random_checkpoint("mamba", adjust=lively, **(fields | special | changes))


def as_the_authors_name_it(make: Make) -> Make:
    """The layout of the first releases: no model_type, `embedding`, a vocabulary that is filled up; hub's beside it."""

    def written(folder: Path) -> None:
        hub = folder / "hub"
        make(hub)
        c = json.loads((hub / "config.json").read_text())
        old = {"d_model": c["hidden_size"], "n_layer": c["num_hidden_layers"], "vocab_size": c["vocab_size"] - 3}
        old |= {"ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "pad_vocab_size_multiple": 8}
        (folder / "config.json").write_text(json.dumps(old))
        tensors = load_file(hub / "model.safetensors")
        save_file(
            {name.replace("embeddings", "embedding"): t for name, t in tensors.items()}, folder / "model.safetensors"
        )

    return written


def t5(**changes: Any) -> Make:
    fields = {"vocab_size": 160, "d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    buckets = {"relative_attention_num_buckets": 16, "relative_attention_max_distance": 48}
    given = fields | special | buckets | changes
    return random_checkpoint("t5", model_class=AutoModelForSeq2SeqLM, adjust=sharp_distances, **given)


def sharp_distances(model: Any) -> None:
    """Distances that matter; and scores of usual size, which T5 does not scale down."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            parameter.normal_(0, 2.0, generator=generator)
        elif name.endswith((".q.weight", ".k.weight")):
            parameter.mul_(0.5)
        elif name.endswith("EncDecAttention.o.weight"):  # or all that follows would be the source's
            parameter.mul_(0.3)


def decoder_of(folder: Path) -> Oracle:
    """The decoder's logits, beside what `source_of` lets the encoder read."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(prompt: Sequence[int], continuation: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            source, target = (torch.tensor([[*ids]]) for ids in (source_of(prompt), (*prompt, *continuation)))
            found = model(input_ids=source, decoder_input_ids=target, use_cache=False).logits
        return found[0, len(prompt) - 1 :].float()

    return logits


NO_ENCODER = "the native program has no encoder, nor a bias by distance"

CASES = [
    Case("t5", "v1.0: tied, scaled, ReLU", t5(embedding=0.1, final=10.0), decoder_of, not_native=NO_ENCODER),
    Case(
        "t5",
        "v1.1: gated, own head, 3 + 2 layers",
        t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_layers=3, num_decoder_layers=2),
        decoder_of,
        not_native=NO_ENCODER,
    ),
    Case("mamba", "tied", mamba(), PLAIN, no_prefix_cache=STATE),
    Case(
        "mamba",
        "own head, biases",
        mamba(tie_word_embeddings=False, use_bias=True, conv_kernel=3, expand=3),
        PLAIN,
        no_prefix_cache=STATE,
    ),
    Case(
        "mamba",
        "first releases",
        as_the_authors_name_it(mamba()),
        lambda folder: PLAIN(folder / "hub"),
        no_prefix_cache=STATE,
    ),
]
