"""The meaning of every kernel in a few lines of torch, on any device; the fast kernels are tested against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from textmill.kernels.spec import ACTIVATIONS, CHUNK, Array, AttentionSpec, ExpertsSpec, PackedMatrix

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_erf": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def floats(values: Array) -> torch.Tensor:
    """Weights as a float32 tensor, whatever they were read as."""
    return torch.as_tensor(values).float()


def rms_norm(x: torch.Tensor, weight: Array, eps: float, plus_one: bool = False) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (or * (1 + weight)), computed in float32."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * (floats(weight) + 1.0 if plus_one else floats(weight))).to(x.dtype)


def layer_norm(x: torch.Tensor, weight: Array, bias: Array | None, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias."""
    wide_bias = None if bias is None else floats(bias)
    return F.layer_norm(x.float(), (x.shape[-1],), floats(weight), wide_bias, eps).to(x.dtype)


def activation(x: torch.Tensor, name: str) -> torch.Tensor:
    """The function called `name` (spec.ACTIVATIONS) of every element."""
    return FUNCTIONS[ACTIVATIONS[name]](x)


def gated_activation(x: torch.Tensor, name: str) -> torch.Tensor:
    """activation(first half of the columns) * second half."""
    gate, up = x.chunk(2, dim=-1)
    return activation(gate, name) * up


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(x / cap): bounded by cap, nearly x where x is small."""
    return torch.tanh(x / cap) * cap


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations as the packed product sees them: codes [rows, chunks, 32] and scales [rows, chunks], in float32.

    Per row and chunk of 32 inputs: s = max|x| / 127, a = round(x / s), a in -127..127; the last chunk is padded with 0.
    """
    padded = F.pad(x.float(), (0, -x.shape[-1] % CHUNK)).reshape(*x.shape[:-1], -1, CHUNK)
    scales = padded.abs().amax(-1) / 127.0
    codes = torch.round(padded / torch.where(scales > 0, scales, 1.0).unsqueeze(-1))
    return codes, scales


def dequantize(matrix: PackedMatrix) -> torch.Tensor:
    """The float32 [n, k] matrix that the codes stand for."""
    codes = (floats(matrix.codes) - matrix.zero).reshape(*matrix.scales.shape, matrix.group)
    grouped = codes * floats(matrix.scales).unsqueeze(-1)
    if matrix.offsets is not None:
        grouped = grouped + floats(matrix.offsets).unsqueeze(-1)
    return grouped.flatten(-2)


def matmul(
    x: torch.Tensor,
    matrix: Array | PackedMatrix,
    *,
    bias: Array | None = None,
    activation: str | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """x W^T (+ bias), then the activation; `gated`: W is [gate; up] and the result act(gate) * up, half as wide.

    A packed W multiplies quantized activations (quantize_rows); a float W multiplies x itself.
    """
    if isinstance(matrix, torch.Tensor | np.ndarray):
        y = F.linear(x, torch.as_tensor(matrix))
    else:
        codes, scales = quantize_rows(x)
        approximate = (codes * scales.unsqueeze(-1)).flatten(-2)[..., : x.shape[-1]]
        y = (approximate @ dequantize(matrix).T).to(x.dtype)
    if bias is not None:
        y = y + torch.as_tensor(bias)
    if gated:
        return gated_activation(y, activation) if activation else torch.mul(*y.chunk(2, dim=-1))
    return FUNCTIONS[ACTIVATIONS[activation]](y) if activation else y


def route(scores: torch.Tensor, spec: ExpertsSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32 and numbers int64 of each row's experts, the best first: [rows, top_k] from [rows, experts]."""
    weights, chosen = scores.float().softmax(-1).topk(spec.top_k, dim=-1)
    if spec.norm is not None:
        weights = weights / weights.norm(spec.norm, dim=-1, keepdim=True)
    return weights, chosen


def experts(
    x: torch.Tensor,
    scores: torch.Tensor,
    gate_up: Sequence[Array | PackedMatrix],
    down: Sequence[Array | PackedMatrix],
    spec: ExpertsSpec,
) -> torch.Tensor:
    """Sum over a row's experts, the best first, of weight * down(act(gate(x)) * up(x)); experts see only their rows."""
    weights, chosen = route(scores, spec)
    answers = x.new_zeros(*chosen.shape, x.shape[-1])
    for number in sorted(set(chosen.flatten().tolist())):
        rows, ranks = (chosen == number).nonzero(as_tuple=True)
        inner = matmul(x[rows], gate_up[number], activation=spec.activation, gated=True)
        answers[rows, ranks] = matmul(inner, down[number])
    return (answers * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def rotate(x: torch.Tensor, positions: torch.Tensor, cos: Array, sin: Array, interleaved: bool) -> torch.Tensor:
    """Turns the first 2 * cos.shape[-1] numbers of every head of x [rows, heads, head_dim] by its position's angles."""
    half = cos.shape[-1]
    cos, sin = (floats(table)[positions].unsqueeze(1) for table in (cos, sin))
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    first, second = (
        (turning[..., 0::2], turning[..., 1::2]) if interleaved else (turning[..., :half], turning[..., half:])
    )
    turned = first * cos - second * sin, second * cos + first * sin
    together = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((together, rest), dim=-1)


def head_norm(x: torch.Tensor, weight: Array, bias: Array | None, spec: AttentionSpec) -> torch.Tensor:
    """The norm of x [rows, heads, head_dim]; one whose weight is a vector longer than a head is over all heads."""
    if weight.ndim == 1 and len(weight) != x.shape[-1]:
        return head_norm(x.flatten(1), weight, bias, spec).view_as(x)
    if spec.head_norm == "rms":
        return rms_norm(x, weight, spec.norm_eps)
    normed = F.layer_norm(x, (x.shape[-1],), eps=spec.norm_eps) * floats(weight)
    return normed if bias is None else normed + floats(bias)


def split_qkv(
    qkv: torch.Tensor, positions: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys (normed and rotated) and values of the rows: [rows, heads or kv_heads, head_dim] each, float32."""
    heads = qkv.float().reshape(qkv.shape[0], -1, spec.head_dim)
    q, k, v = torch.split(heads, [spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
    if spec.q_norm is not None:
        q = head_norm(q, spec.q_norm, spec.q_norm_bias, spec)
    if spec.k_norm is not None:
        k = head_norm(k, spec.k_norm, spec.k_norm_bias, spec)
    if spec.rope_cos is not None and spec.rope_sin is not None:
        q = rotate(q, positions, spec.rope_cos, spec.rope_sin, spec.rope_interleaved)
        k = rotate(k, positions, spec.rope_cos, spec.rope_sin, spec.rope_interleaved)
    return q, k, v


def attend_one(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, spec: AttentionSpec, first: int = 0
) -> torch.Tensor:
    """Attention of queries [count, heads, head_dim] at positions start.. over keys [tokens, kv_heads, head_dim].

    `first`: the position of the first key.
    """
    repeat = spec.heads // spec.kv_heads
    keys, values = (x.float().repeat_interleave(repeat, dim=1) for x in (keys, values))
    scores = torch.einsum("ihd,jhd->hij", q * spec.scale, keys)
    if spec.softcap > 0:
        scores = softcap(scores, spec.softcap)
    i = torch.arange(start, start + q.shape[0], device=q.device).unsqueeze(1)
    j = torch.arange(first, first + keys.shape[0], device=q.device)
    if spec.alibi is not None:
        scores = scores + floats(spec.alibi).view(-1, 1, 1) * (j - i)
    if spec.key_bias is not None:
        scores = scores + floats(spec.key_bias)[:, None, j]
    if spec.relative is not None:
        scores = scores + floats(spec.relative)[:, (i - j).clamp(0, spec.relative.shape[1] - 1)]
    hidden = (j > i) | (i - j >= spec.window) if spec.window else j > i
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)


def attend(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_table: torch.Tensor,
    work: Sequence[tuple[int, int, int]],
    spec: AttentionSpec,
) -> torch.Tensor:
    """Paged attention of one layer: stores the rows' keys and values, then every row reads the cache only.

    qkv: [rows, (heads + 2 kv_heads) head_dim], the rows of `work` one after the other. keys, values (written in place):
    [blocks, kv_heads, block_size, head_dim], any float type. block_table: [slots, blocks of a slot] integers.
    work: (slot, start, count): rows of `slot` at positions start .. start + count. Returns [rows, heads * head_dim].
    """
    size = keys.shape[2]
    ranges = [torch.arange(start, start + count, device=qkv.device) for _, start, count in work]
    q, k, v = split_qkv(qkv, torch.cat(ranges), spec)
    outputs = []
    row = 0
    for (slot, start, count), positions in zip(work, ranges, strict=True):
        own = slice(row, row + count)
        blocks = block_table[slot, positions // size].long()
        keys[blocks, :, positions % size] = k[own].to(keys.dtype)
        values[blocks, :, positions % size] = v[own].to(values.dtype)
        # Blocks behind the window may be another sequence's by now.
        first = max(0, start - spec.window + 1) // size if spec.window else 0
        read = block_table[slot, first : (start + count + size - 1) // size].long()
        past = [x[read].transpose(1, 2).flatten(0, 1)[: start + count - first * size] for x in (keys, values)]
        outputs.append(attend_one(q[own], past[0], past[1], start, spec, first * size))
        row += count
    return torch.cat(outputs).flatten(1).to(qkv.dtype)


def attend_both(qkv: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Every row of one text over all of them: [rows, heads * head_dim]; `relative` [heads, 2 n - 1] by key - query."""
    q, k, v = split_qkv(qkv, torch.arange(qkv.shape[0]), spec)
    scores = torch.einsum("ihd,jhd->hij", q * spec.scale, k)
    if spec.relative is not None:
        place = torch.arange(qkv.shape[0])
        furthest = spec.relative.shape[1] // 2
        scores = scores + floats(spec.relative)[:, (place - place[:, None]).clamp(-furthest, furthest) + furthest]
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1).to(qkv.dtype)


def attend_encoded(q: torch.Tensor, kv: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Rows q [rows, heads * head_dim] over an encoder's keys and values [tokens, k | v], without mask or bias."""
    k, v = kv.float().reshape(kv.shape[0], 2, spec.heads, spec.head_dim).unbind(1)
    scores = torch.einsum("ihd,jhd->hij", q.float().reshape(-1, spec.heads, spec.head_dim) * spec.scale, k)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1).to(q.dtype)
