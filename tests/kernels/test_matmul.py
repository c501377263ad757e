"""Matrix products over packed and dense weights: the stated meaning, and every result a function of its row alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gguf
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.kernels.tiny import put, work
from textmill.kernels import native
from textmill.kernels.native import NativeWeight, Program, dense_weight, ggml_unpack, pack_weight

Floats = NDArray[np.float32]
CHUNK = 32
FUNCTIONS: dict[str | None, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    None: lambda x: x,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_erf": lambda x: 0.5 * x * np.vectorize(math.erfc)(-x / math.sqrt(2)),
    "relu": lambda x: np.maximum(x, 0),
}
SETS = [name for name in ("portable", "avx2", "avx512vnni") if native.LOADED and native.set_instruction_set(name)]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    native.set_instruction_set(SETS[-1])
    native.set_threads(0)


@dataclass(frozen=True)
class Matrix:
    """Codes, scales and offsets as pack_weight takes them."""

    codes: NDArray[np.uint8]
    scales: Floats
    offsets: Floats | None
    zero: int
    bits: int
    group: int

    def pack(self, columns: slice = slice(None)) -> NativeWeight:
        offsets = None if self.offsets is None else self.offsets[columns]
        return pack_weight(self.codes[columns], self.scales[columns], offsets, self.zero, self.bits, self.group)

    def exact(self) -> NDArray[np.float64]:
        values = (self.codes.astype(np.float64) - self.zero) * np.repeat(self.scales.astype(np.float64), self.group, 1)
        return values if self.offsets is None else values + np.repeat(self.offsets.astype(np.float64), self.group, 1)

    def size(self) -> NDArray[np.float64]:
        """What rounding errors are relative to: a group's scaled codes and its offset are summed apart."""
        size = np.repeat(np.abs(self.scales), self.group, 1).astype(np.float64) * (1 << self.bits)
        return size if self.offsets is None else size + np.repeat(np.abs(self.offsets), self.group, 1)


def random_matrix(
    n: int,
    k: int,
    bits: int,
    group: int,
    *,
    offsets: bool,
    zero: int,
    half: bool,
    even: bool = False,
    scale: float = 0.01,
    seed: int = 0,
) -> Matrix:
    """`half`: scales and offsets are 16-bit floats; `even`: none is far below the largest, as in real models."""
    random = np.random.default_rng(seed)

    def floats(size: float) -> Floats:
        values = (random.standard_normal((n, k // group)) * size).astype(np.float32)
        if even:
            values = np.copysign(random.uniform(size / 4, size * 3.9, values.shape), values).astype(np.float32)
        return values.astype(np.float16).astype(np.float32) if half else values

    codes = random.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    return Matrix(codes, floats(scale), floats(4 * scale) if offsets else None, zero, bits, group)


def random_rows(rows: int, k: int, seed: int = 1) -> Floats:
    """Normal numbers, with a chunk of zeros and a chunk of tiny ones in them."""
    x = np.random.default_rng(seed).standard_normal((rows, k)).astype(np.float32)
    x[:, 16:48] *= np.arange(rows, dtype=np.float32)[:, None] % 3
    x[::2, :7] *= 1e-30
    return x


def quantized(x: Floats) -> NDArray[np.float64]:
    """What is left of activations after their chunks are rounded to 8 bits."""
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % CHUNK))).reshape(len(x), -1, CHUNK)
    scales = np.abs(padded).max(-1, keepdims=True) / np.float32(127)
    codes = np.rint(padded / np.where(scales > 0, scales, np.float32(1)))
    values: NDArray[np.float64] = (codes.astype(np.float64) * scales).reshape(len(x), -1)[:, : x.shape[1]]
    return values


def multiply(
    x: Floats,
    weight: NativeWeight,
    *,
    bias: Floats | None = None,
    activation: str | None = None,
    gated: bool = False,
    residual: Floats | None = None,
    steps: list[tuple[int, int]] | None = None,
) -> Floats:
    """x W^T through a recorded program; `steps`: the rows (first, count) of each call instead of all at once."""
    rows = len(x)
    columns = weight.shape[0] // (2 if gated else 1)
    vocabulary = max(rows, columns)  # row r of x is the embedding of token r
    p = Program(max_rows=rows, max_slots=1, max_total_tokens=rows, vocab_size=vocabulary, max_outputs=rows)

    def table(values: Floats) -> NativeWeight:
        return dense_weight(np.pad(values, ((0, vocabulary - rows), (0, 0))))

    y = p.matmul(p.embed(table(x)), weight, bias=bias, activation=activation, gated=gated)
    if residual is not None:
        y = p.add(p.embed(table(residual)), y)
    y = p.outputs(y)
    if vocabulary > columns:  # columns of zeros behind; products with 1 and sums with 0 are exact
        y = p.matmul(y, dense_weight(np.eye(vocabulary, columns, dtype=np.float32)))
    p.finish(y)
    p.allocate(rows)
    put(p, 0, np.arange(rows), 0)
    parts = [p.logits(work((0, first, count, 0)), every_row=True) for first, count in steps or [(0, rows)]]
    return np.concatenate(parts)[:, :columns]


def products(x: NDArray[np.float64], w: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """x W^T, and the sum of the magnitudes in it, to which rounding errors are relative."""
    return x @ w.T, np.abs(x) @ np.abs(w).T


def assert_close(got: Floats, expected: NDArray[np.float64], magnitude: NDArray[np.float64]) -> None:
    excess = np.abs(got - expected) - 3e-6 * magnitude
    assert np.isfinite(got).all()
    assert excess.max() <= 1e-30


@st.composite
def cases(draw: st.DrawFn) -> tuple[Matrix, int]:
    group = draw(st.sampled_from([16, 32, 64, 128, 0]))
    bits = draw(st.sampled_from([4, 8]))
    k = draw(st.sampled_from([16, 48, 80])) if group == 0 and draw(st.booleans()) else (group or 32) * draw(
        st.integers(1, 6)
    )  # fmt: skip
    matrix = random_matrix(
        draw(st.integers(1, 75)),
        k,
        bits,
        group or k,
        offsets=draw(st.booleans()),
        zero=draw(st.sampled_from([0, 8, 15] if bits == 4 else [0, 8, 128, 255])),
        half=draw(st.booleans()),
        even=draw(st.booleans()),
        scale=draw(st.sampled_from([0.01, 3e-5, 1e3])),
        seed=draw(st.integers(0, 1000)),
    )
    return matrix, draw(st.integers(1, 40))


LARGE = random_matrix(72, 1600, 4, 32, offsets=True, zero=0, half=True)
WHOLE = random_matrix(90, 1600, 4, 32, offsets=True, zero=0, half=True, even=True)
WHOLE_ZERO = random_matrix(90, 1600, 4, 64, offsets=False, zero=8, half=True, even=True)


@pytest.mark.parametrize("name", SETS)
@settings(max_examples=60, deadline=None)
@given(case=cases())
@example(case=(LARGE, 130))
@example(case=(WHOLE, 130))
@example(case=(WHOLE_ZERO, 40))
@example(case=(random_matrix(40, 800, 8, 16, offsets=False, zero=32, half=False), 50))
def test_packed_products(name: str, case: tuple[Matrix, int]) -> None:
    native.set_instruction_set(name)
    matrix, rows = case
    x = random_rows(rows, matrix.codes.shape[1])
    expected, _ = products(quantized(x), matrix.exact())
    assert_close(multiply(x, matrix.pack()), expected, np.abs(quantized(x)) @ matrix.size().T)


@pytest.mark.parametrize("name", SETS)
@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 70), k=st.integers(1, 300), rows=st.integers(1, 30))
@example(n=50, k=700, rows=130)
def test_dense_products(name: str, n: int, k: int, rows: int) -> None:
    native.set_instruction_set(name)
    values = np.random.default_rng(n).standard_normal((n, k)).astype(np.float32)
    x = np.random.default_rng(k).standard_normal((rows, k)).astype(np.float32)
    expected, magnitude = products(x.astype(np.float64), values.astype(np.float64))
    assert_close(multiply(x, dense_weight(values)), expected, 10 * magnitude)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("activation", list(FUNCTIONS))
@pytest.mark.parametrize("n", [64, 92])  # 92: the up columns begin within a block
def test_epilogues(name: str, activation: str | None, n: int) -> None:
    native.set_instruction_set(name)
    random = np.random.default_rng(n)
    matrix = random_matrix(n, 96, 4, 32, offsets=True, zero=0, half=True, scale=0.05)
    x, bias = random_rows(9, 96), random.standard_normal(n).astype(np.float32)
    residual = random.standard_normal((9, n)).astype(np.float32)
    y, magnitude = products(quantized(x), matrix.exact())
    y, magnitude, half, function = y + bias, magnitude + 1, n // 2, FUNCTIONS[activation]
    weight = matrix.pack()
    got = multiply(x, weight, bias=bias, activation=activation, residual=residual)
    assert_close(got, function(y) + residual, magnitude * 3)
    got = multiply(x, weight, bias=bias, activation=activation, gated=True)
    spread = magnitude[:, :half] * (1 + np.abs(y[:, half:])) + magnitude[:, half:] * (1 + np.abs(function(y[:, :half])))
    assert_close(got, function(y[:, :half]) * y[:, half:], spread * 3)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu_erf", "relu"])
def test_activations_far_out(activation: str) -> None:
    values = np.array([-1e38, -500.0, -104.0, -90.0, -20.0, -1e-20, 0.0, 1e-20, 20.0, 90.0, 500.0], np.float32)
    got = multiply(values[:, None], dense_weight(np.ones((1, 1), np.float32)), activation=activation)[:, 0]
    with np.errstate(over="ignore"):
        expected = FUNCTIONS[activation](values.astype(np.float64).clip(-1e4, None))
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-37)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", ["4-bit", "whole", "whole, zero", "8-bit", "half groups", "per channel", "dense"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_row_never_depends_on_its_neighbours(name: str, kind: str, gated: bool) -> None:
    native.set_instruction_set(name)
    weight = {
        "4-bit": lambda: random_matrix(90, 1600, 4, 32, offsets=True, zero=0, half=True).pack(),
        "whole": WHOLE.pack,
        "whole, zero": WHOLE_ZERO.pack,
        "8-bit": lambda: random_matrix(90, 832, 8, 64, offsets=False, zero=128, half=True).pack(),
        "half groups": lambda: random_matrix(90, 96, 8, 16, offsets=False, zero=32, half=False).pack(),
        "per channel": lambda: random_matrix(90, 96, 4, 96, offsets=True, zero=8, half=False).pack(),
        "dense": lambda: dense_weight(np.random.default_rng(0).standard_normal((90, 600)).astype(np.float32)),
    }[kind]()
    x = random_rows(140, weight.shape[1])
    activation = "silu" if gated else None
    whole = multiply(x, weight, gated=gated, activation=activation)
    sizes = [1, 2, 3, 4, 5, 6, 7, 9, 11, 12, 13, 17, 50]  # 140 rows
    steps = [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]
    assert np.array_equal(multiply(x, weight, gated=gated, activation=activation, steps=steps), whole)
    singles = [(row, 1) for row in range(0, 140, 9)]
    assert np.array_equal(multiply(x, weight, gated=gated, activation=activation, steps=singles), whole[::9])
    for threads in (1, 3, 5):  # each takes other columns
        native.set_threads(threads)
        assert np.array_equal(multiply(x, weight, gated=gated, activation=activation), whole)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_column_never_depends_on_its_neighbours(bits: int) -> None:
    matrix = random_matrix(83, 256, bits, 32, offsets=True, zero=8, half=True)
    x = random_rows(21, 256)
    whole = multiply(x, matrix.pack())
    for columns in (slice(0, 8), slice(3, 20), slice(40, 83), slice(82, 83)):
        assert np.array_equal(multiply(x, matrix.pack(columns)), whole[:, columns])


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("even", [False, True])
def test_bad_numbers_stay_in_their_row(name: str, bad: float, dense: bool, even: bool) -> None:
    native.set_instruction_set(name)
    matrix = random_matrix(37, 96, 4, 32, offsets=True, zero=0, half=True, even=even)
    weight = dense_weight(matrix.exact().astype(np.float32)) if dense else matrix.pack()
    x = random_rows(15, 96)
    clean = multiply(x, weight)
    x[[4, 9], [0, 95]] = bad
    got = multiply(x, weight)
    others = np.setdiff1d(np.arange(15), [4, 9])
    assert np.array_equal(got[others], clean[others])
    assert np.isnan(got[[4, 9]]).all() if not dense else not np.isfinite(got[[4, 9]]).any()


def test_largest_codes_and_activations_do_not_saturate() -> None:
    x = np.full((7, 256), 3.0, np.float32)
    x[1::2] *= -1
    for bits, group in ((4, 32), (8, 32), (8, 16)):
        codes = np.full((17, 256), (1 << bits) - 1, np.uint8)
        matrix = Matrix(codes, np.ones((17, 256 // group), np.float32), None, 0, bits, group)
        expected, _ = products(quantized(x), matrix.exact())
        np.testing.assert_allclose(multiply(x, matrix.pack()), expected, rtol=1e-6)


def test_scales_that_halves_cannot_hold() -> None:
    for scale in (1e-30, 1e30):
        matrix = random_matrix(19, 64, 4, 32, offsets=True, zero=8, half=False, scale=scale)
        x = random_rows(5, 64)
        expected, _ = products(quantized(x), matrix.exact())
        got = multiply(x, matrix.pack())
        assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("offsets", [False, True])
def test_scales_become_whole_numbers_where_nothing_is_lost(offsets: bool) -> None:
    random = np.random.default_rng(5)
    n, k = 40, 1600
    scales = random.integers(-32767, 32767, (n, k // 32)).astype(np.float32) * np.float32(2.0**-20)
    scales[:, 0] = 2.0**-6  # 15 bits above the unit: more than a 16-bit float has
    scales[7] = 0
    lowest = (-8 * np.abs(scales)).astype(np.float16).astype(np.float32) if offsets else None
    matrix = Matrix(random.integers(0, 16, (n, k), dtype=np.uint8), scales, lowest, 0, 4, 32)
    weight = matrix.pack()
    assert weight.nbytes < n * k / 32 * (16 + (5 if offsets else 3))  # a group: 16 bytes of codes, 2 a scale or offset
    x = random_rows(30, k)
    expected, _ = products(quantized(x), matrix.exact())
    assert_close(multiply(x, weight), expected, np.abs(quantized(x)) @ matrix.size().T)
    rows = np.stack([weight.row(row) for row in range(n)])
    codes = matrix.codes.astype(np.float32) * np.repeat(scales, 32, 1)
    np.testing.assert_array_equal(rows, codes if matrix.offsets is None else codes + np.repeat(matrix.offsets, 32, 1))


@pytest.mark.parametrize("spoilt", [2.0**-40, np.float32(1.0) + np.float32(2.0**-20), np.nan, np.inf])
def test_one_scale_that_is_no_whole_number_leaves_all_as_they_were(spoilt: float) -> None:
    scales = np.ones((40, 50), np.float32)
    whole = Matrix(np.ones((40, 1600), np.uint8), scales, None, 8, 4, 32).pack()
    scales[39, 49] = spoilt
    matrix = Matrix(np.ones((40, 1600), np.uint8), scales, None, 8, 4, 32)
    weight = matrix.pack()
    assert weight.nbytes > whole.nbytes
    np.testing.assert_array_equal(weight.row(39)[-32:], np.float32(-7 * np.float32(spoilt)))
    assert weight.row(39)[0] == -7


@pytest.mark.parametrize("matrix", [LARGE, WHOLE, WHOLE_ZERO])
def test_instruction_sets_agree(matrix: Matrix) -> None:
    x = random_rows(13, 1600)
    results = []
    for name in SETS:
        native.set_instruction_set(name)
        results.append(multiply(x, matrix.pack()))
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_ggml_blocks_are_what_gguf_reads(kind: str) -> None:
    type_number = gguf.GGMLQuantizationType[kind]
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[type_number]
    random = np.random.default_rng(3)
    n, k = 21, 2 * 256
    blocks = random.integers(0, 256, (n * k // per_block, block_bytes), dtype=np.uint8)
    halves = {"Q4_0": [0], "Q4_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q6_K": [208]}[kind]
    for at in halves:
        values = (random.standard_normal(len(blocks)) * 0.01).astype(np.float16)
        blocks[:, at : at + 2] = values.view(np.uint8).reshape(-1, 2)
    expected = gguf.quants.dequantize(blocks.reshape(n, -1), type_number)
    codes, scales, offsets, zero, bits, group = ggml_unpack(int(type_number), blocks.tobytes(), n, k)
    weight = pack_weight(codes, scales, offsets, zero, bits, group)
    np.testing.assert_array_equal(np.stack([weight.row(row) for row in range(n)]), expected)


@pytest.mark.parametrize(
    ("shape", "bits", "zero", "group"),
    [((8, 40), 4, 8, 40), ((8, 96), 4, 8, 24), ((8, 96), 5, 8, 32), ((8, 96), 4, 16, 32), ((8, 96), 4, -1, 32)],
)
def test_what_cannot_be_packed_is_refused(shape: tuple[int, int], bits: int, zero: int, group: int) -> None:
    codes, scales = np.zeros(shape, np.uint8), np.ones((shape[0], shape[1] // group), np.float32)
    with pytest.raises(ValueError, match="packed weight"):
        pack_weight(codes, scales, None, zero, bits, group)
