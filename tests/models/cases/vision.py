"""Models that see, given text only; tests/models/test_vision.py shows them pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from tests.models.parity import Case, Oracle, load, transformers_oracle
from tests.models.tiny import SIZES, Make, random_checkpoint

ORACLE = transformers_oracle(model_class=AutoModelForImageTextToText)
CROSS = "attention to pictures is not recorded"
IMAGE = SIZES["vocab_size"] - 1
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
CHOICES = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


def text(model_type: str, **changes: Any) -> dict[str, Any]:
    return SIZES | {"model_type": model_type} | changes


def silent(model: Any) -> None:
    """The image token is never the first choice: transformers would want a picture for it."""
    model.get_output_embeddings().weight[IMAGE].zero_()


def llava_next(text_config: dict[str, Any], **changes: Any) -> Make:
    fields = {"image_token_index": IMAGE, "image_grid_pinpoints": CHOICES, "vision_config": CLIP}
    return random_checkpoint(
        "llava_next",
        model_class=AutoModelForImageTextToText,
        adjust=silent,
        text_config=text_config,
        **(fields | changes),
    )


FAKE = IMAGE - 1
LATENTS = 5
SIGLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 7,
}
PERCEIVER: dict[str, Any] = {
    "hidden_size": 64,
    "resampler_n_latents": LATENTS,
    "resampler_depth": 2,
    "resampler_n_heads": 4,
    "resampler_head_dim": 12,
    "num_key_value_heads": 2,
}


def idefics2(text_config: dict[str, Any], **changes: Any) -> Make:
    fields = {"image_token_id": IMAGE, "vision_config": SIGLIP, "perceiver_config": PERCEIVER}
    return random_checkpoint(
        "idefics2",
        model_class=AutoModelForImageTextToText,
        adjust=silent,
        text_config=text_config,
        **(fields | changes),
    )


PERCEIVER_1: dict[str, Any] = {
    "use_resampler": True,
    "resampler_n_latents": LATENTS,
    "resampler_depth": 2,
    "resampler_n_heads": 4,
    "resampler_head_dim": 8,
}


def idefics(**changes: Any) -> Make:
    """The image token and the one around it are rows of their own tables."""
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"} | {
        "vocab_size": FAKE,
        "additional_vocab_size": 2,
        "num_hidden_layers": 4,
        "cross_layer_interval": 2,
        "use_resampler": True,
    }
    clip = CLIP | {"model_type": "idefics_vision", "embed_dim": 32}
    del clip["hidden_size"]
    fields = sizes | {"vision_config": clip, "perceiver_config": PERCEIVER_1} | changes
    return random_checkpoint("idefics", model_class=AutoModelForImageTextToText, adjust=silent_addition, **fields)


def silent_addition(model: Any) -> None:
    model.lm_head.additional_fc.weight[IMAGE - FAKE].zero_()


def blind(folder: Path) -> Oracle:
    """Transformers wants a picture even where no token sees one."""
    model = load(folder, "sdpa", AutoModelForImageTextToText)

    def logits(prompt: Sequence[int], continuation: Sequence[int]) -> torch.Tensor:
        tokens = torch.tensor([[*prompt, *continuation]])
        pixels, mask = torch.zeros(1, 1, 3, 28, 28), torch.zeros(1, tokens.shape[1], 1)
        with torch.inference_mode():
            found = model(tokens, pixel_values=pixels, image_attention_mask=mask, use_cache=False).logits
        return found[0, len(prompt) - 1 :].float()

    return logits


CASES = [
    Case("llava_next", "of llama", llava_next(text("llama")), ORACLE),
    Case(
        "llava_next",
        "of mistral, two layers of the tower",
        llava_next(text("mistral", sliding_window=24), vision_feature_layer=[-2, 1], multimodal_projector_bias=False),
        ORACLE,
    ),
    Case("idefics2", "of mistral", idefics2(text("mistral", sliding_window=None)), ORACLE),
    Case("idefics", "perceiver", idefics(), blind, not_native=CROSS),
    Case(
        "idefics",
        "no perceiver, norms of heads, a gate per column",
        idefics(
            use_resampler=False, qk_layer_norms=True, alpha_type="vector", cross_layer_interval=1, num_hidden_layers=2
        ),
        blind,
        not_native=CROSS,
    ),
    Case(
        "idefics",
        "norms of heads in the perceiver",
        idefics(qk_layer_norms=True, perceiver_config=PERCEIVER_1 | {"qk_layer_norms_perceiver": True}),
        blind,
        not_native=CROSS,
    ),
]
