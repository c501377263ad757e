"""LLaVA-NeXT: tiles of a picture through CLIP and a projector, in a grid without its padding. Liu et al. 2024."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from textmill.errors import ModelError
from textmill.images.grids import best_grid, grid_choices, unpadded
from textmill.models.registry import build_model
from textmill.models.vision import ClipTower, Dense, SeeingLM, Tick, activation, embedding_pictures, section, tensor
from textmill.weights.config import ModelConfig
from textmill.weights.part import Part, text_config
from textmill.weights.view import View

CLIP = {
    "hidden_act": "quick_gelu",
    "image_size": 336,
    "layer_norm_eps": 1e-5,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
}


class Encoder:
    """Features of one picture: those of the whole, then the grid of its tiles, row by row, each row with a newline."""

    def __init__(self, c: ModelConfig, w: View) -> None:
        clip = section(c, "vision_config", **CLIP)
        layers, tower = clip["num_hidden_layers"], w / "vision_tower"
        tower = tower / "vision_model" if tower.has("vision_model.embeddings.class_embedding") else tower
        self.wanted = [layer if layer >= 0 else layers + 1 + layer for layer in feature_layers(c)]
        self.tower = ClipTower(
            tower,
            depth=max(self.wanted),
            layers=layers,
            heads=clip["num_attention_heads"],
            hidden_act=clip["hidden_act"],
            eps=clip["layer_norm_eps"],
        )
        tower.leave_out("post_layernorm")
        self.up, self.down = (Dense(w / "multi_modal_projector" / f"linear_{i}") for i in (1, 2))
        self.activation = activation(c.raw.get("projector_hidden_act", "gelu"))
        self.newline = tensor(w, "image_newline")
        if c.raw.get("vision_feature_select_strategy", "default") != "default":
            raise ModelError("config.json: vision_feature_select_strategy: only default can be laid out as a grid")
        self.side = clip["image_size"]
        self.patches = clip["image_size"] // clip["patch_size"]
        self.pinpoints = grid_choices(c.raw)

    def __call__(self, pixels: Tensor, size: tuple[int, int], tick: Tick) -> Tensor:
        states = list(self.tower.states(pixels, tick))
        # Without the class token.
        seen = torch.cat([states[layer][:, 1:] for layer in self.wanted], dim=-1)
        features = self.down(self.activation(self.up(seen)))
        height, width = (length // self.side for length in best_grid(size, self.pinpoints))
        # [tiles down, tiles across, patches down, patches across, columns] to rows and columns of patches
        grid = features[1:].reshape(height, width, self.patches, self.patches, -1).transpose(1, 2)
        grid = grid.reshape(height * self.patches, width * self.patches, -1)
        rows, columns = unpadded(size, (grid.shape[0], grid.shape[1]))
        grid = grid[rows, columns]
        grid = torch.cat((grid, self.newline.expand(len(grid), 1, -1)), dim=1)
        return torch.cat((features[0], grid.flatten(0, 1)))


def feature_layers(c: ModelConfig) -> list[int]:
    """Which states of the tower are read, side by side."""
    layers = c.raw.get("vision_feature_layer", -2)
    layers = layers if isinstance(layers, list) else [layers]
    if not layers or not all(type(layer) is int for layer in layers):
        raise ModelError(f"config.json: vision_feature_layer: {layers} are not numbers of layers")
    return layers


class Model(SeeingLM):
    def __init__(self, c: ModelConfig, w: View) -> None:
        inner = text_config(c)
        part = Part(w.checkpoint, inner, {name: f"language_model.{name}" for name in ("model", "lm_head")})
        text = build_model(inner, View(part, group=w.group))
        super().__init__(embedding_pictures(text, partial(Encoder, c, w)))
