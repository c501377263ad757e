"""Vision towers in torch, and how what they see takes the place of tokens: a picture is encoded once, whole.

Towers are not cut between ranks: every rank computes all of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from textmill.errors import ModelError
from textmill.layers.causal_lm import CausalLM
from textmill.layers.memory import Memory
from textmill.layers.types import Context, Encoder, Hidden
from textmill.weights.config import ModelConfig
from textmill.weights.view import View

Tick = Callable[[], None]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


def section(c: ModelConfig, name: str, **defaults: Any) -> dict[str, Any]:
    """A part of the config as a dict that has every field of `defaults`, of its type; ModelError otherwise."""
    found = c.raw.get(name, {})
    if not isinstance(found, dict):
        raise ModelError(f"config.json: {name}: not an object")
    known = {field: found[field] if found.get(field) is not None else value for field, value in defaults.items()}
    for field, value in known.items():
        kind = type(defaults[field])
        fits = isinstance(value, int | float) if kind is float else type(value) is kind
        if not fits or (kind in (int, float) and not 0 < value < 1e6):
            raise ModelError(f"config.json: {name}.{field}: {value!r} makes no sense")
    return known


def activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATIONS:
        raise ModelError(f"config.json: hidden_act {name!r} of a vision model is not supported")
    return ACTIVATIONS[name]


def tensor(w: View, leaf: str) -> Tensor:
    return torch.as_tensor(w.tensor(leaf)).float()


class Dense:
    """y = x W^T (+ bias), whole on every rank."""

    def __init__(self, w: View) -> None:
        self.weight = tensor(w, "weight")
        self.bias = tensor(w, "bias") if w.has("bias") else None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Norm:
    """Layer norm over the last dimension."""

    def __init__(self, w: View, eps: float) -> None:
        self.weight, self.bias, self.eps = tensor(w, "weight"), tensor(w, "bias"), eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RootNorm:
    """RMS norm over the last dimension."""

    def __init__(self, w: View, eps: float) -> None:
        self.weight, self.eps = tensor(w, "weight"), eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Every query sees every key: q [batch, rows, heads x d], k and v [batch, keys, kv_heads x d]; like q."""
    split = ((q, heads), (k, kv_heads), (v, kv_heads))
    q, k, v = (x.reshape(*x.shape[:2], n, -1).transpose(1, 2) for x, n in split)
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class EncoderBlock:
    """Pre-norm self-attention and MLP of CLIP and SigLIP alike."""

    def __init__(self, w: View, heads: int, hidden_act: str, eps: float) -> None:
        self.heads = heads
        self.norm, self.mlp_norm = Norm(w / "layer_norm1", eps), Norm(w / "layer_norm2", eps)
        self.q, self.k, self.v, self.out = (
            Dense(w / "self_attn" / name) for name in ("q_proj", "k_proj", "v_proj", "out_proj")
        )
        self.up, self.down = Dense(w / "mlp" / "fc1"), Dense(w / "mlp" / "fc2")
        self.activation = activation(hidden_act)

    def __call__(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.out(attend(self.q(y), self.k(y), self.v(y), self.heads, self.heads))
        return x + self.down(self.activation(self.up(self.mlp_norm(x))))


class ClipTower:
    """CLIP's vision transformer (Radford et al. 2021) as far as `depth` blocks; class token first."""

    def __init__(self, w: View, *, depth: int, layers: int, heads: int, hidden_act: str, eps: float) -> None:
        embeddings = w / "embeddings"
        self.class_token = tensor(embeddings, "class_embedding")
        self.patches = tensor(embeddings / "patch_embedding", "weight")
        self.positions = tensor(embeddings / "position_embedding", "weight")
        self.norm = Norm(w / "pre_layrnorm", eps)  # the name is misspelt in every file
        self.blocks = [EncoderBlock(w / "encoder" / "layers" / i, heads, hidden_act, eps) for i in range(depth)]
        for i in range(depth, layers):
            w.leave_out(f"encoder.layers.{i}")

    def states(self, pixels: Tensor, tick: Tick) -> Iterator[Tensor]:
        """After the embeddings and after each block: [tiles, 1 + patches, columns]."""
        patches = F.conv2d(pixels, self.patches, stride=self.patches.shape[-1]).flatten(2).transpose(1, 2)
        first = self.class_token.expand(len(patches), 1, -1)
        x = self.norm(torch.cat((first, patches), dim=1) + self.positions)
        yield x
        for block in self.blocks:
            x = block(x)
            tick()
            yield x


class SiglipTower:
    """SigLIP's vision transformer (Zhai et al. 2023) for pictures of any shape (Dehghani et al. 2023, NaViT).

    A patch's position is its place in the picture as a fraction, put onto the grid that the tower was trained with.
    """

    def __init__(self, w: View, *, layers: int, heads: int, hidden_act: str, eps: float) -> None:
        embeddings = w / "embeddings"
        self.patches = tensor(embeddings / "patch_embedding", "weight")
        self.bias = tensor(embeddings / "patch_embedding", "bias")
        self.positions = tensor(embeddings / "position_embedding", "weight")
        self.blocks = [EncoderBlock(w / "encoder" / "layers" / i, heads, hidden_act, eps) for i in range(layers)]
        self.norm = Norm(w / "post_layernorm", eps)

    def __call__(self, pixels: Tensor, tick: Tick) -> Tensor:
        """Pixels [tiles, 3, height, width] of at least one patch to [tiles, patches, columns]."""
        x = F.conv2d(pixels, self.patches, self.bias, stride=self.patches.shape[-1])
        side = round(len(self.positions) ** 0.5)
        rows, columns = (places(count, side) for count in x.shape[-2:])
        x = x.flatten(2).transpose(1, 2) + self.positions[(rows[:, None] * side + columns).flatten()]
        for block in self.blocks:
            x = block(x)
            tick()
        return self.norm(x)


def places(count: int, side: int) -> Tensor:
    """Where `count` patches in a row lie on a grid of `side`; in the checkpoints' own float32 arithmetic."""
    fractions = torch.arange(count, dtype=torch.float32) * (1.0 / torch.tensor(count))
    borders = torch.arange(1 / side, 1.0, 1 / side)
    return torch.bucketize(fractions.clamp(max=1.0 - 1e-6), borders, right=True)


class Later:
    """An encoder that reads its weights when it is first wanted, so not for a recording that fails before."""

    def __init__(self, build: Callable[[], Encoder]) -> None:
        self._build = build
        self._encoder: Encoder | None = None

    def __call__(self) -> Encoder:
        if self._encoder is None:
            self._encoder = self._build()
        return self._encoder


class SeeingEmbedding:
    """A text model's embeddings, with features in the rows that stand for pictures."""

    def __init__(self, embed: Callable[[Context], Hidden], encoder: Later) -> None:
        self._embed = embed
        self._encoder = encoder

    def __call__(self, ctx: Context) -> Hidden:
        return ctx.place_images(self._embed, self._encoder)


class SeeingLM(CausalLM):
    """A text model that sees: its own forward pass, over what a family has changed in it."""

    def __init__(self, text: CausalLM) -> None:
        super().__init__(text.embed, text.blocks, text.norm, text.head)
        self.text = text

    def __call__(self, ctx: Context) -> Hidden:
        return self.text(ctx)

    @property
    def memory(self) -> Memory:
        return replace(self.text.memory, sees=True)


def embedding_pictures(text: CausalLM, build: Callable[[], Encoder]) -> CausalLM:
    """The text model with pictures among its embeddings."""
    text.embed = SeeingEmbedding(text.embed, Later(build))
    return text
