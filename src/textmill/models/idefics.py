"""Idefics: Llama with gated cross-attention to the last picture before each token. Laurençon et al. 2023."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from textmill.layers.causal_lm import Block
from textmill.layers.linear import replicated
from textmill.layers.mlp import GatedMLP
from textmill.layers.norm import RMSNorm
from textmill.layers.types import Context, Hidden
from textmill.models.registry import build_model
from textmill.models.vision import ClipTower, Dense, Later, Norm, RootNorm, SeeingLM, Tick, attend, section, tensor
from textmill.weights.config import ModelConfig
from textmill.weights.part import Part
from textmill.weights.view import View

CLIP = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 16, "num_hidden_layers": 32}
PERCEIVER = {"qk_layer_norms_perceiver": False, "resampler_depth": 6, "resampler_n_heads": 16}
EPS = 1e-5  # of the perceiver's norms


class PerceiverBlock:
    """Latents attend to the picture and to each other. Jaegle et al. 2021."""

    def __init__(self, w: View, heads: int, head_norms: bool) -> None:
        self.heads = heads
        attn, mlp = w / 0, w / 1
        self.norm, self.context_norm = Norm(attn / "latents_layer_norm", EPS), Norm(attn / "context_layer_norm", EPS)
        self.q, self.k, self.v, self.out = (
            Dense(attn / name) for name in ("q_proj", "k_proj", "v_proj", "output_proj")
        )
        self.q_norm = Norm(attn / "q_layer_norm", EPS) if head_norms else None
        self.k_norm = Norm(attn / "k_layer_norm", EPS) if head_norms else None
        self.mlp_norm, self.up, self.down = Norm(mlp / "ln", EPS), Dense(mlp / "fc"), Dense(mlp / "c_proj")

    def __call__(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.norm(x)
        everything = torch.cat((self.context_norm(context), y), dim=1)
        q, k = per_head(self.q(y), self.heads, self.q_norm), per_head(self.k(everything), self.heads, self.k_norm)
        x = x + self.out(attend(q, k, self.v(everything), self.heads, self.heads))
        return x + self.down(self.up(self.mlp_norm(x)).relu())


def per_head(x: Tensor, heads: int, norm: Norm | RootNorm | None) -> Tensor:
    """x [..., heads x d] with every head normed by itself."""
    return x if norm is None else norm(x.reshape(*x.shape[:-1], heads, -1)).flatten(-2)


class Encoder:
    """Keys and values of a picture for every cross-attention: [layers, latents, k | v]."""

    def __init__(self, c: ModelConfig, w: View, layers: int) -> None:
        clip, perceiver = section(c, "vision_config", **CLIP), section(c, "perceiver_config", **PERCEIVER)
        depth, tower, resampler = clip["num_hidden_layers"], w / "vision_model", w / "perceiver_resampler"
        act, eps = clip["hidden_act"], clip["layer_norm_eps"]
        self.tower = ClipTower(
            tower, depth=depth, layers=depth, heads=clip["num_attention_heads"], hidden_act=act, eps=eps
        )
        tower.leave_out("post_layernorm")
        blocks = perceiver["resampler_depth"] if c.switch("use_resampler", False) else 0
        heads, head_norms = perceiver["resampler_n_heads"], perceiver["qk_layer_norms_perceiver"]
        self.perceiver = [PerceiverBlock(resampler / "blocks" / i, heads, head_norms) for i in range(blocks)]
        self.latents = tensor(resampler, "latents") if blocks else None
        self.norm = Norm(resampler / "layer_norm", EPS) if blocks else None
        self.heads = c.heads
        cross = [w / "gated_cross_attn_layers" / i / "cross_attn" for i in range(layers)]
        self.cross = [
            (Dense(one / "k_proj"), head_norm(c, one, "k_layer_norm"), Dense(one / "v_proj")) for one in cross
        ]

    def __call__(self, pixels: Tensor, size: tuple[int, int], tick: Tick) -> Tensor:
        *_, x = self.tower.states(pixels, tick)
        if self.latents is not None and self.norm is not None:
            context, x = x, self.latents[None]
            for block in self.perceiver:
                x = block(x, context)
            x = self.norm(x)
        return torch.stack(
            [torch.cat((per_head(k(x[0]), self.heads, norm), v(x[0])), dim=-1) for k, norm, v in self.cross]
        )


def head_norm(c: ModelConfig, w: View, name: str) -> RootNorm | None:
    return RootNorm(w / name, c.norm_eps) if c.switch("qk_layer_norms", False) else None


class CrossBlock:
    """Attention to the picture that a token sees, then an MLP; both come in through gates that training opens."""

    def __init__(self, c: ModelConfig, w: View, layer: int, encoder: Later) -> None:
        attn = w / "cross_attn"
        self.norm, self.mlp_norm = (
            RMSNorm(w / name, c.norm_eps) for name in ("input_layernorm", "post_attention_layernorm")
        )
        self.q, self.out = replicated(attn, "q_proj"), replicated(attn, "o_proj")
        self.q_norm = head_norm(c, attn, "q_layer_norm")
        self.mlp = GatedMLP(w / "mlp", "gate_proj", "up_proj", "down_proj", c.hidden_act)
        self.gate, self.mlp_gate = (tensor(w, name).flatten().tanh() for name in ("alpha_cross_attn", "alpha_dense"))
        self.layer, self.heads, self.encoder = layer, c.heads, encoder

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        attend_images = ctx.attend_images  # which a recording does not have, before anything is done in vain
        q = per_head(self.q(self.norm(x)), self.heads, self.q_norm)
        x = x + self.gate * self.out(attend_images(q, self.layer, self.heads, self.encoder))
        return x + self.mlp_gate * self.mlp(self.mlp_norm(x))


class Model(SeeingLM):
    def __init__(self, c: ModelConfig, w: View) -> None:
        body = w / "model"
        added = {
            "model.embed_tokens.weight": "model.embed_tokens.additional_embedding.weight",
            "lm_head.weight": "lm_head.additional_fc.weight",
        }
        part = Part(w.checkpoint, replace(c, model_type="llama"), {"model": "model", "lm_head": "lm_head"}, added)
        text = build_model(part.config, View(part, group=w.group))
        interval: Any = c.raw.get("cross_layer_interval", 1)
        layers = len(text.blocks) // interval
        encoder = Later(partial(Encoder, c, body, layers))
        crosses = [CrossBlock(c, body / "gated_cross_attn_layers" / i, i, encoder) for i in range(layers)]
        blocks: list[Block] = []
        for i, block in enumerate(text.blocks):
            blocks += [crosses[i // interval], block] if i % interval == 0 else [block]
        text.blocks = blocks
        super().__init__(text)
