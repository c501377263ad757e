"""What a kernel must know beside its operands; read alike by the torch reference and the native code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

# Weights as they are read: numpy where that will do, since the native kernels need no torch, which takes a second to
# import; torch tensors from files that only torch can read.
Array: TypeAlias = "NDArray[Any] | torch.Tensor"

# Names in checkpoints' configurations -> the functions we have.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu_erf",
    "gelu_erf": "gelu_erf",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "quick_gelu": "quick_gelu",
}

# Activations are quantized per row in chunks of this many inputs; the last chunk of a row may be shorter.
CHUNK = 32

# Attention walks keys in tiles of this many, aligned to positions: a row whose window begins inside one reads all of
# it, and gives what lies before the window no weight (kKeyTile of the native kernels).
KEY_TILE = 64


class PackedMatrix(Protocol):
    """A weight [n, k] in integer codes: w[o, i] = scales[o, i / group] * (codes[o, i] - zero) + offsets[o, i / group].

    `codes` uint8 [n, k] (below 2 ** bits; bits is 4 or 8), `scales` and `offsets` (None: all zero) float32
    [n, k / group]. `quant.packed.Packed` is one.
    """

    @property
    def codes(self) -> Array: ...
    @property
    def scales(self) -> Array: ...
    @property
    def offsets(self) -> Array | None: ...
    @property
    def zero(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def group(self) -> int: ...


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSpec:
    """Causal attention of one layer over rows q | k | v of (heads + 2 * kv_heads) * head_dim numbers.

    score(i, j) = softcap(scale * q_i . k_j) + alibi[head] * (j - i) + key_bias[head, j], for j <= i and, with a window,
    i - j < window. `relative` [heads, distances] adds relative[head, i - j], the last column for all that is further.
    Order: optional norm of q and k, rotation, store, scores. `head_norm` "rms": RMS norm of each head (weight
    [head_dim]) or over all heads (weight [heads * head_dim]); "layer": layer norm, the same or with a weight for each
    head ([heads, head_dim]), biases of the same shape or None. `rope_cos`, `rope_sin`: float32
    [positions, rotary_dim / 2]; the first rotary_dim numbers of a head turn, as halves (NeoX) or, if
    `rope_interleaved`, as neighbouring pairs.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    alibi: Array | None = None
    key_bias: Array | None = None
    relative: Array | None = None
    rope_cos: Array | None = None
    rope_sin: Array | None = None
    rope_interleaved: bool = False
    q_norm: Array | None = None
    k_norm: Array | None = None
    q_norm_bias: Array | None = None
    k_norm_bias: Array | None = None
    head_norm: str = "rms"
    norm_eps: float = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class ConvolutionSpec:
    """y = silu(bias + sum over i of weight[:, i] * x[t - width + 1 + i]), each channel for itself.

    `weight` float32 [channels, width], `bias` [channels] or None. State: the last inputs, [channels, width - 1].
    """

    weight: Array
    bias: Array | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ScanSpec:
    """A selective state space (Gu and Dao 2023), per channel and with `columns` states a channel.

    h = exp(softplus(dt) a) h + softplus(dt) b x, y = (c . h + skip x) silu(gate). `a` float32 [channels, columns]
    (negative), `skip` [channels]. State: h, [channels, columns].
    """

    a: Array
    skip: Array


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """A mixture of gated experts: each row goes to the `top_k` whose scores are highest.

    Their weights are the softmax over all experts' scores, divided by the chosen ones' `norm`-norm (1: they then sum to
    one; None: left as they are).
    """

    top_k: int
    activation: str
    norm: float | None = 1.0
