"""The Python face of the native runtime: weights in the kernels' layout, and a model recorded once as a `Program`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from textmill.kernels.native_weights import LOADED as LOADED
from textmill.kernels.native_weights import NativeWeight as NativeWeight
from textmill.kernels.native_weights import dense_weight as dense_weight
from textmill.kernels.native_weights import ggml_supported as ggml_supported
from textmill.kernels.native_weights import ggml_unpack as ggml_unpack
from textmill.kernels.native_weights import pack_weight as pack_weight
from textmill.kernels.native_weights import plain as plain
from textmill.kernels.rows import Rows as Rows
from textmill.kernels.rows import Unrecordable as Unrecordable
from textmill.kernels.spec import ACTIVATIONS, Array, AttentionSpec, ConvolutionSpec, ExpertsSpec, ScanSpec
from textmill.kernels.step_results import StepArrays as StepArrays

try:
    from textmill import _native
except ImportError:  # not built: the torch reference serves
    _native = None  # type: ignore[assignment]

_ACTIVATION_NUMBERS = {
    "silu": 1, "gelu_tanh": 2, "gelu_erf": 3, "relu": 4, "sigmoid": 5, "tanh": 6, "quick_gelu": 7,
}  # fmt: skip
Placed: TypeAlias = tuple[NDArray[np.int32], NDArray[np.float32]]
_LAST_OF_PRODUCTS = 4  # the activations that a product can end with


def instruction_set() -> str:
    """What the kernels run with: "avx512vnni", "avx2" or "portable"."""
    return str(_native.instruction_set())


def set_instruction_set(name: str) -> bool:
    """Forces one of the above, for tests; False if this machine lacks it."""
    return bool(_native.set_instruction_set(name))


def set_threads(count: int) -> int:
    """Threads that native work may use, the caller's included; 0: all cores we may use. Returns how many there are."""
    return int(_native.set_threads(count))


@dataclass(frozen=True, slots=True)
class OperationProfile:
    """Time and work of one kind of operation since the last reset."""

    name: str
    calls: int
    seconds: float
    bytes: int
    macs: int


class Program:
    """A model recorded as a list of operations, its slot table, its key/value cache and its sampler.

    Recording: embed, then layers' operations on `Rows`, `outputs`, the head's operations, `finish`. Then `allocate`.
    One recording serves steps of any number of rows. A step is one native call that holds no GIL.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        max_slots: int,
        max_total_tokens: int,
        vocab_size: int,
        max_outputs: int = 64,
        max_top_n: int = 32,
        block_size: int = 16,
        kv_dtype: str = "float16",
        threads: int = 0,
    ) -> None:
        if kv_dtype not in ("float16", "float32"):
            raise ValueError(f"kv_dtype must be float16 or float32, not {kv_dtype}")
        set_threads(threads)
        self.max_rows, self.max_slots, self.vocab_size = max_rows, max_slots, vocab_size
        self.max_total_tokens, self.max_top_n, self.block_size = max_total_tokens, max_top_n, block_size
        self.kv_dtype = kv_dtype
        self.tokens = np.zeros((max_slots, max_total_tokens + 1), np.int32)
        self.length = np.zeros(max_slots, np.int32)
        self.block_table = np.zeros((max_slots, -(-max_total_tokens // block_size) + 1), np.int32)
        self.temperature = np.ones(max_slots, np.float32)
        self.top_p = np.ones(max_slots, np.float32)
        self.typical_p = np.ones(max_slots, np.float32)
        self.repetition_penalty = np.ones(max_slots, np.float32)
        self.frequency_penalty = np.zeros(max_slots, np.float32)
        self.top_k = np.zeros(max_slots, np.int32)
        self.draws = np.zeros(max_slots, np.uint8)
        self.seed = np.zeros(max_slots, np.uint64)
        self.top_n = np.zeros(max_slots, np.int32)
        self.prompt_logprobs = np.zeros(max_slots, np.uint8)
        self.images: dict[int, Any] | None = None  # what slots show, if the model sees
        self.compute_seconds = 0.0  # spent in native code by all steps so far
        self._kept: dict[int, tuple[Array, NDArray[np.float32]]] = {}
        self._weights: dict[int, NativeWeight] = {}
        sizes = (max_rows, max_outputs, max_slots, max_total_tokens, block_size, vocab_size, kv_dtype == "float16")
        self._native = _native.Program(*sizes, self._table())

    def _table(self) -> dict[str, NDArray[Any]]:
        names = (
            "tokens", "length", "block_table", "temperature", "top_p", "typical_p", "repetition_penalty",
            "frequency_penalty", "top_k", "draws", "seed", "top_n", "prompt_logprobs",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    # Recording

    def embed(self, weight: NativeWeight, scale: float = 1.0) -> Rows:
        """Rows of the embedding table `weight` [vocabulary, columns] for the step's tokens, times `scale`."""
        self._weights[id(weight)] = weight
        return self._rows(self._native.embed(weight.handle, scale))

    def embed_positions(self, table: Array, offset: int = 0) -> Rows:
        """Row `position + offset` of `table` [positions, columns] for the step's tokens."""
        return self._rows(self._native.embed_positions(self._keep(table), offset))

    def place_rows(self, x: Rows) -> Rows:
        """x, but with the rows that a step places (see `run`)."""
        return self._rows(self._native.place_rows(self._own(x)))

    def rms_norm(self, x: Rows, weight: Array, eps: float, plus_one: bool = False) -> Rows:
        """x / sqrt(mean(x^2) + eps) * weight, or * (1 + weight)."""
        factors = plain(weight, np.float32)
        return self._rows(self._native.rms_norm(self._own(x), self._keep(factors + 1 if plus_one else factors), eps))

    def layer_norm(self, x: Rows, weight: Array, bias: Array | None, eps: float) -> Rows:
        """(x - mean) / sqrt(variance + eps) * weight + bias."""
        return self._rows(self._native.layer_norm(self._own(x), self._keep(weight), self._keep_if(bias), eps))

    def add(self, x: Rows, y: Rows) -> Rows:
        """x + y. If one of them is a product that nothing else reads, this becomes part of that product."""
        return self._rows(self._native.add(self._own(x), self._own(y)))

    def multiply(self, x: Rows, y: Rows) -> Rows:
        """x * y, element by element."""
        return self._rows(self._native.multiply(self._own(x), self._own(y)))

    def clip(self, x: Rows, limit: float) -> Rows:
        """x, but no more than `limit` and no less than -limit."""
        return self._rows(self._native.clip(self._own(x), limit))

    def scale(self, x: Rows, factor: float) -> Rows:
        """x * factor."""
        return self._rows(self._native.scale(self._own(x), factor))

    def softcap(self, x: Rows, cap: float) -> Rows:
        """cap * tanh(x / cap)."""
        return self._rows(self._native.softcap(self._own(x), cap))

    def activation(self, x: Rows, name: str) -> Rows:
        """The function called `name` (spec.ACTIVATIONS) of every element."""
        return self._rows(self._native.activation(self._own(x), _number(name)))

    def gated_activation(self, x: Rows, name: str) -> Rows:
        """activation(first half of the columns) * second half."""
        return self._rows(self._native.gated_activation(self._own(x), _number(name)))

    def matmul(
        self,
        x: Rows,
        weight: NativeWeight,
        *,
        bias: Array | None = None,
        activation: str | None = None,
        gated: bool = False,
    ) -> Rows:
        """x W^T + bias, then the activation; `gated`: W is [gate; up], the result act(gate) * up and half as wide."""
        self._weights[id(weight)] = weight
        number = _number(activation) if activation else 0
        if activation and number > _LAST_OF_PRODUCTS:
            y = self.matmul(x, weight, bias=bias)
            return self.gated_activation(y, activation) if gated else self.activation(y, activation)
        return self._rows(self._native.matmul(self._own(x), weight.handle, self._keep_if(bias), number, gated))

    def attend(self, qkv: Rows, layer: int, spec: AttentionSpec) -> Rows:
        """Stores the rows' keys and values in layer `layer` of the cache and attends over it (see AttentionSpec)."""
        if spec.key_bias is not None:
            raise Unrecordable("bias of keys")
        if spec.relative is not None:
            raise Unrecordable("relative position bias")
        keep = self._keep_if
        return self._rows(
            self._native.attend(
                self._own(qkv),
                layer,
                spec.heads,
                spec.kv_heads,
                spec.head_dim,
                spec.scale,
                spec.window,
                spec.softcap,
                keep(spec.alibi),
                keep(spec.rope_cos),
                keep(spec.rope_sin),
                spec.rope_interleaved,
                keep(spec.q_norm),
                keep(spec.k_norm),
                keep(spec.q_norm_bias),
                keep(spec.k_norm_bias),
                spec.head_norm == "layer",
                spec.norm_eps,
            )
        )

    def experts(
        self, x: Rows, scores: Rows, gate_up: Sequence[NativeWeight], down: Sequence[NativeWeight], spec: ExpertsSpec
    ) -> Rows:
        """The sum of the experts that each row is sent to (see ExpertsSpec); matrices per expert."""
        number = _number(spec.activation)
        if number > _LAST_OF_PRODUCTS:
            raise Unrecordable(f"mixture of experts with activation {spec.activation}")
        self._weights.update((id(weight), weight) for weight in (*gate_up, *down))
        up, back = ([weight.handle for weight in matrices] for matrices in (gate_up, down))
        norm = spec.norm or 0.0
        return self._rows(self._native.experts(self._own(x), self._own(scores), up, back, spec.top_k, norm, number))

    def convolve(self, x: Rows, spec: ConvolutionSpec) -> Rows:
        """Of the first columns of x, with each slot's last inputs (see ConvolutionSpec), which start as zeros."""
        weight = self._keep(plain(spec.weight, np.float32).T)
        return self._rows(self._native.convolve(self._own(x), weight, self._keep_if(spec.bias)))

    def scan(self, x: Rows, dt: Rows, bc: Rows, gate: Rows, spec: ScanSpec) -> Rows:
        """A selective state space with a state per slot (see ScanSpec), which starts as zeros; bc: rows of b | c."""
        own, a = self._own, self._keep(plain(spec.a, np.float32).T)
        return self._rows(self._native.scan(own(x), own(dt), own(bc), own(gate), a, self._keep(spec.skip)))

    def outputs(self, x: Rows) -> Rows:
        """Only the rows whose logits are wanted; what follows is the head and may read nothing from before."""
        return self._rows(self._native.outputs(self._own(x)))

    def finish(self, logits: Rows) -> None:
        """Ends the recording: `logits` [rows, vocab_size] feed the sampler. Plans the memory of all values."""
        self._native.finish(self._own(logits))

    # Memory

    @property
    def kv_bytes_per_block(self) -> int:
        """Bytes of `block_size` tokens' keys and values in all layers; known after `finish`."""
        return int(self._native.kv_bytes_per_block)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all matrices, each counted once."""
        return sum(weight.nbytes for weight in self._weights.values())

    @property
    def arena_bytes(self) -> int:
        """Bytes of the memory that all values of a step share; touched as far as steps need it."""
        return int(self._native.arena_bytes)

    def allocate(self, num_blocks: int) -> None:
        """Reserves the key/value cache; pages are touched when blocks are first written."""
        self._native.allocate(num_blocks)

    # Running

    def run(self, work: NDArray[np.int32], placed: Placed | None = None) -> StepArrays:
        """Computes the rows (slot, start, count, samples) of `work` int32 [n, 4] and chooses tokens where `samples`.

        A chosen token is appended to its slot (tokens, length). `samples` asks for start + count == length[slot].
        samples = 1 + d verifies d guesses that stand in `tokens` behind `length` and are among the `count` rows: a
        token is chosen after each of the last 1 + d rows, and those up to the first wrong guess are appended.
        `placed`: for every row of the step the row of the values that takes its place at `place_rows`, or -1, and
        the values. ValueError, before anything is touched: work that the table, the cache or the limits do not allow.
        """
        return self._step(work, None, sample=True, every_row=False, placed=placed)

    def logits(
        self, work: NDArray[np.int32], *, every_row: bool = False, placed: Placed | None = None
    ) -> NDArray[np.float32]:
        """The raw logits of a step [output rows, vocab_size] (of all its rows if `every_row`); chooses nothing."""
        counts = work[:, 2]
        wanted = np.where((self.prompt_logprobs[work[:, 0]] != 0) | every_row, counts, work[:, 3])
        out = np.empty((int(wanted.sum()), self.vocab_size), np.float32)
        self._step(work, out, sample=False, every_row=every_row, placed=placed)
        return out

    def _step(
        self,
        work: NDArray[np.int32],
        logits: NDArray[np.float32] | None,
        *,
        sample: bool,
        every_row: bool,
        placed: Placed | None,
    ) -> StepArrays:
        out = self._room_for(work)
        started = time.perf_counter()
        self._native.run(
            np.ascontiguousarray(work, np.int32), *out.columns(), logits, sample, every_row, *(placed or (None, None))
        )
        self.compute_seconds += time.perf_counter() - started
        return out

    def _room_for(self, work: NDArray[np.int32]) -> StepArrays:
        """Arrays for the results of a step, as large as its work and its slots want them."""
        count, slots = int(np.maximum(work[:, 3], 1).sum()), work[:, 0]
        known = slots[(slots >= 0) & (slots < self.max_slots)]
        width = min(int(self.top_n[known].max(initial=0)), self.max_top_n)
        rows = int(work[:, 2].sum()) if self.prompt_logprobs[known].any() else 0
        return StepArrays(
            np.empty(count, np.int32),
            np.empty(count, np.float32),
            np.empty(count, np.uint8),
            np.empty(count, np.int32),
            np.empty((count, width), np.int32),
            np.empty((count, width), np.float32),
            np.empty(max(rows, 0), np.float32),
        )

    @property
    def handle(self) -> Any:
        """By which other native objects refer to the program."""
        return self._native

    def set_profiling(self, enabled: bool) -> None:
        """Whether steps take the time of every operation."""
        self._native.profiling = enabled

    def profile(self) -> list[OperationProfile]:
        """Time and work by kind of operation, the longest first."""
        return [OperationProfile(*entry) for entry in sorted(self._native.profile(), key=lambda e: -e[2])]

    def reset_profile(self) -> None:
        self._native.reset_profile()

    # Helpers

    def _rows(self, index: int) -> Rows:
        return Rows(self, index, self._native.columns(index))

    def _own(self, x: Rows) -> int:
        if x.program is not self:
            raise ValueError("Rows of another program")
        return x.index

    def _keep(self, values: Array) -> NDArray[np.float32]:
        """Contiguous float32 memory that lives as long as the program; one copy, however many layers share it."""
        if id(values) not in self._kept:
            self._kept[id(values)] = (values, plain(values, np.float32))
        return self._kept[id(values)][1]

    def _keep_if(self, values: Array | None) -> NDArray[np.float32] | None:
        return None if values is None else self._keep(values)


def _number(name: str) -> int:
    number = _ACTIVATION_NUMBERS.get(ACTIVATIONS.get(name, name))
    if number is None:
        raise Unrecordable(f"activation {name}")
    return number
