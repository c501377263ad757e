"""Idefics2: SigLIP at the picture's own proportions, resampled to a few latents a piece. Laurençon et al. 2024."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from textmill.models.registry import build_model
from textmill.models.vision import (
    Dense,
    RootNorm,
    SeeingLM,
    SiglipTower,
    Tick,
    activation,
    attend,
    embedding_pictures,
    section,
    tensor,
)
from textmill.weights.config import ModelConfig
from textmill.weights.part import Part, text_config
from textmill.weights.view import View

SIGLIP = {
    "hidden_act": "gelu_pytorch_tanh",
    "image_size": 224,
    "layer_norm_eps": 1e-6,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "patch_size": 32,
}
PERCEIVER = {
    "hidden_act": "silu",
    "num_key_value_heads": 4,
    "resampler_depth": 3,
    "resampler_n_heads": 16,
    "rms_norm_eps": 1e-6,
}


class GatedProjection:
    def __init__(self, w: View, hidden_act: str) -> None:
        self.gate, self.up, self.down = (Dense(w / name) for name in ("gate_proj", "up_proj", "down_proj"))
        self.activation = activation(hidden_act)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class PerceiverBlock:
    """Latents attend to the picture and to each other. Jaegle et al. 2021."""

    def __init__(self, w: View, heads: int, kv_heads: int, hidden_act: str, eps: float) -> None:
        self.heads, self.kv_heads = heads, kv_heads
        self.norm, self.context_norm = RootNorm(w / "input_latents_norm", eps), RootNorm(w / "input_context_norm", eps)
        self.q, self.k, self.v, self.out = (
            Dense(w / "self_attn" / name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        self.mlp_norm = RootNorm(w / "post_attention_layernorm", eps)
        self.mlp = GatedProjection(w / "mlp", hidden_act)

    def __call__(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.norm(x)
        everything = torch.cat((self.context_norm(context), y), dim=1)
        x = x + self.out(attend(self.q(y), self.k(everything), self.v(everything), self.heads, self.kv_heads))
        return x + self.mlp(self.mlp_norm(x))


class Encoder:
    """Features of one piece of a picture."""

    def __init__(self, c: ModelConfig, w: View) -> None:
        siglip, perceiver = section(c, "vision_config", **SIGLIP), section(c, "perceiver_config", **PERCEIVER)
        connector = w / "connector"
        resampler, eps = connector / "perceiver_resampler", perceiver["rms_norm_eps"]
        heads, kv_heads = perceiver["resampler_n_heads"], perceiver["num_key_value_heads"]
        self.tower = SiglipTower(
            w / "vision_model",
            layers=siglip["num_hidden_layers"],
            heads=siglip["num_attention_heads"],
            hidden_act=siglip["hidden_act"],
            eps=siglip["layer_norm_eps"],
        )
        self.projection = GatedProjection(connector / "modality_projection", c.hidden_act)
        self.latents = tensor(resampler, "latents")
        self.blocks = [
            PerceiverBlock(resampler / "layers" / i, heads, kv_heads, perceiver["hidden_act"], eps)
            for i in range(perceiver["resampler_depth"])
        ]
        self.norm = RootNorm(resampler / "norm", eps)

    def __call__(self, pixels: Tensor, size: tuple[int, int], tick: Tick) -> Tensor:
        context = self.projection(self.tower(pixels, tick))
        x = self.latents.expand(len(pixels), -1, -1)
        for block in self.blocks:
            x = block(x, context)
        return self.norm(x).flatten(0, 1)


class Model(SeeingLM):
    def __init__(self, c: ModelConfig, w: View) -> None:
        inner = text_config(c)
        part = Part(w.checkpoint, inner, {"model": "model.text_model", "lm_head": "lm_head"})
        text = build_model(inner, View(part, group=w.group))
        super().__init__(embedding_pictures(text, partial(Encoder, c, w / "model")))
