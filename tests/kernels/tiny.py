"""A tiny decoder over random weights, once as torch and once recorded: what the tests of the runtime compare."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from textmill.kernels import dispatch, reference
from textmill.kernels.native import Program, dense_weight, pack_weight
from textmill.kernels.spec import AttentionSpec

VOCABULARY = 97


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Satisfies spec.PackedMatrix."""

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None
    zero: int
    bits: int
    group: int


def random_packed(n: int, k: int, bits: int, group: int, offsets: bool) -> Packed:
    scales = (torch.rand(n, k // group) * 0.02 + 0.001).half().float()
    shift = (torch.randn(n, k // group) * 0.05).half().float() if offsets else None
    return Packed(torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8), scales, shift, 1 << (bits - 1), bits, group)


def rope(dim: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(torch.arange(positions).float(), 1.0 / 10000.0 ** (torch.arange(0, dim, 2) / dim))
    return angles.cos(), angles.sin()


@dataclass
class Tiny:
    """Sizes and weights of a decoder; `native` picks the form of a matrix."""

    packed: bool = False
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    hidden: int = 96
    layers: int = 2
    positions: int = 320
    seed: int = 0
    attention: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        cos, sin = rope(self.head_dim, self.positions)
        self.spec = AttentionSpec(
            self.heads, self.kv_heads, self.head_dim, self.head_dim**-0.5,
            **{"rope_cos": cos, "rope_sin": sin, **self.attention},
        )  # fmt: skip
        self.embedding = torch.randn(VOCABULARY, self.width)
        self.blocks = [self.block() for _ in range(self.layers)]
        self.final_norm = torch.rand(self.width) + 0.5
        self.head = self.matrix(VOCABULARY, self.width)
        self.forms: dict[int, Any] = {}

    def matrix(self, n: int, k: int) -> Any:
        return random_packed(n, k, 4, 32, True) if self.packed else torch.randn(n, k) / k**0.5

    def block(self) -> dict[str, Any]:
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return {
            "norm1": torch.rand(self.width) + 0.5,
            "qkv": self.matrix(qkv, self.width),
            "qkv_bias": torch.randn(qkv) * 0.1,
            "out": self.matrix(self.width, self.heads * self.head_dim),
            "norm2": torch.rand(self.width) + 0.5,
            "up": self.matrix(2 * self.hidden, self.width),
            "down": self.matrix(self.width, self.hidden),
        }

    def form(self, matrix: Any, native: bool) -> Any:
        if not native:
            return matrix
        if id(matrix) not in self.forms:
            self.forms[id(matrix)] = (
                dense_weight(matrix)
                if isinstance(matrix, torch.Tensor)
                else pack_weight(matrix.codes, matrix.scales, matrix.offsets, matrix.zero, matrix.bits, matrix.group)
            )
        return self.forms[id(matrix)]

    def forward(self, x: Any, attend: Any, outputs: Any, native: bool) -> Any:
        """The model itself: the same lines for tensors and for a recording."""
        for i, b in enumerate(self.blocks):
            h = dispatch.rms_norm(x, b["norm1"], 1e-5)
            qkv = dispatch.matmul(h, self.form(b["qkv"], native), bias=b["qkv_bias"])
            x = dispatch.add(x, dispatch.matmul(attend(qkv, i), self.form(b["out"], native)))
            h = dispatch.rms_norm(x, b["norm2"], 1e-5)
            h = dispatch.matmul(h, self.form(b["up"], native), activation="silu", gated=True)
            x = dispatch.add(x, dispatch.matmul(h, self.form(b["down"], native)))
        x = dispatch.rms_norm(outputs(x), self.final_norm, 1e-5)
        return dispatch.softcap(dispatch.matmul(x, self.form(self.head, native)), 30.0)

    def program(self, *, slots: int = 8, blocks: int = 96, half: bool = False, **limits: Any) -> Program:
        sizes = {"max_rows": 300, "max_total_tokens": 300, "max_outputs": 4, **limits}
        p = Program(max_slots=slots, vocab_size=VOCABULARY, kv_dtype="float16" if half else "float32", **sizes)
        x = p.embed(dense_weight(self.embedding), 1.5)
        p.finish(self.forward(x, lambda qkv, i: p.attend(qkv, i, self.spec), p.outputs, native=True))
        p.allocate(blocks)
        return p

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Reference logits of every position of one sequence [tokens]."""
        shape = (64, self.kv_heads, 16, self.head_dim)
        caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in self.blocks]
        table = torch.arange(64).unsqueeze(0)

        def attend(qkv: torch.Tensor, i: int) -> torch.Tensor:
            return reference.attend(qkv, *caches[i], table, [(0, 0, len(tokens))], self.spec)

        return self.forward(self.embedding[tokens] * 1.5, attend, lambda x: x, native=False)


def put(p: Program, slot: int, tokens: Any, first_block: int | None = None) -> None:
    """Gives a slot its known tokens and a run of cache blocks of its own."""
    p.tokens[slot, : len(tokens)] = tokens
    p.length[slot] = len(tokens)
    per_slot = p.block_table.shape[1]
    start = slot * (per_slot - 1) if first_block is None else first_block
    p.block_table[slot] = np.arange(start, start + per_slot)


def work(*items: tuple[int, int, int, int]) -> np.ndarray:
    return np.array(items, dtype=np.int32).reshape(-1, 4)
