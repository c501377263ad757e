"""Every small kernel gives what its torch reference gives: widths with and without a tail, best and plain machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.tiny import put, work
from textmill.kernels import dispatch, native
from textmill.kernels.native import Program, dense_weight


@pytest.fixture(params=["best", "portable"], autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    before = native.instruction_set()
    if request.param == "portable":
        assert native.set_instruction_set("portable")
    yield
    native.set_instruction_set(before)


def recorded(operation: Callable[[Any], Any], x: torch.Tensor) -> torch.Tensor:
    """The operation of a recorded program, over rows that an embedding of `x` delivers."""
    rows, width = x.shape
    columns = operation(x).shape[1]
    table = torch.zeros(max(columns, rows), width)
    table[:rows] = x
    p = Program(max_rows=rows, max_slots=1, max_total_tokens=rows, vocab_size=columns)
    p.finish(p.outputs(operation(p.embed(dense_weight(table)))))
    p.allocate(4)
    put(p, 0, range(rows), 0)
    return torch.from_numpy(p.logits(work((0, 0, rows, 1)), every_row=True))


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "rms_norm": lambda x: dispatch.rms_norm(x, torch.linspace(0.5, 2, width_of(x)), 1e-5),
    "rms_norm_plus_one": lambda x: dispatch.rms_norm(x, torch.linspace(-0.5, 1, width_of(x)), 1e-6, plus_one=True),
    "layer_norm": lambda x: dispatch.layer_norm(x, torch.linspace(0.5, 2, width_of(x)), torch.ones(width_of(x)), 1e-5),
    "layer_norm_no_bias": lambda x: dispatch.layer_norm(x, torch.linspace(0.5, 2, width_of(x)), None, 1e-5),
    "add": lambda x: dispatch.add(x, dispatch.scale(x, 0.25)),
    "multiply": lambda x: x * dispatch.scale(x, 0.25),
    "scale": lambda x: dispatch.scale(x, 1.7),
    "clip": lambda x: dispatch.clip(x, 0.8),
    "softcap": lambda x: dispatch.softcap(x, 2.5),
    "silu": lambda x: dispatch.activation(x, "silu"),
    "gelu": lambda x: dispatch.activation(x, "gelu"),
    "gelu_tanh": lambda x: dispatch.activation(x, "gelu_pytorch_tanh"),
    "relu": lambda x: dispatch.activation(x, "relu"),
    "sigmoid": lambda x: dispatch.activation(x, "sigmoid"),
    "tanh": lambda x: dispatch.activation(x, "tanh"),
    "quick_gelu": lambda x: dispatch.activation(x, "quick_gelu"),
    "gated_silu": lambda x: dispatch.gated_activation(x, "silu"),
    "gated_gelu": lambda x: dispatch.gated_activation(x, "gelu_tanh"),
}


def width_of(x: Any) -> int:
    return int(x.shape[1]) if isinstance(x, torch.Tensor) else x.cols


@pytest.mark.parametrize("width", [16, 34, 96, 578])
@pytest.mark.parametrize("name", OPERATIONS)
def test_equals_the_reference(name: str, width: int) -> None:
    torch.manual_seed(width)
    x = torch.randn(7, width) * 3
    expected = OPERATIONS[name](x)
    torch.testing.assert_close(recorded(OPERATIONS[name], x), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "softcap", "gelu", "sigmoid", "tanh", "quick_gelu", "clip"])
def test_activations_hold_at_the_ends(name: str) -> None:
    x = torch.tensor([[-1e4, -200.0, -90.0, -30.0, -1.0, 0.0, 1.0, 30.0, 90.0, 200.0, 1e4, 1e30, -1e30] + [0.5] * 3])
    expected = OPERATIONS[name](x)
    torch.testing.assert_close(recorded(OPERATIONS[name], x), expected, rtol=1e-6, atol=1e-6)


def test_tensors_and_rows_do_not_mix() -> None:
    p = Program(max_rows=1, max_slots=1, max_total_tokens=1, vocab_size=16)
    x = p.embed(dense_weight(torch.zeros(16, 16)))
    with pytest.raises(TypeError):
        dispatch.add(x, torch.zeros(1, 16))
    with pytest.raises(TypeError):
        dispatch.matmul(x, torch.zeros(16, 16))
    with pytest.raises(TypeError):
        dispatch.matmul(torch.zeros(1, 16), dense_weight(torch.zeros(16, 16)))


def test_positions_take_their_rows_of_a_table() -> None:
    table = torch.randn(30, 24)
    p = Program(max_rows=8, max_slots=1, max_total_tokens=28, vocab_size=24)
    x = p.embed(dense_weight(torch.zeros(24, 24)))
    p.finish(p.outputs(x + p.embed_positions(table, 2)))
    p.allocate(4)
    put(p, 0, range(20), 0)
    for start, count in ((0, 8), (8, 5), (13, 1)):
        got = torch.from_numpy(p.logits(work((0, start, count, 0)), every_row=True))
        assert torch.equal(got, table[2 + start : 2 + start + count])
    with pytest.raises(ValueError, match="positions has fewer rows"):
        Program(max_rows=8, max_slots=1, max_total_tokens=29, vocab_size=24).embed_positions(table, 2)


@pytest.mark.parametrize("gated", [False, True])
def test_a_product_with_an_activation_of_its_own_operation(gated: bool) -> None:
    torch.manual_seed(1)
    weight, bias = torch.randn(32, 16), torch.randn(32)

    def operation(x: Any) -> Any:
        matrix = weight if isinstance(x, torch.Tensor) else dense_weight(weight)
        return dispatch.matmul(x, matrix, bias=bias, activation="quick_gelu", gated=gated)

    x = torch.randn(5, 16)
    torch.testing.assert_close(recorded(operation, x), operation(x), rtol=1e-5, atol=1e-5)


def test_placed_rows_take_the_place_of_others() -> None:
    table, values = torch.randn(24, 24), torch.randn(3, 24)
    p = Program(max_rows=8, max_slots=1, max_total_tokens=16, vocab_size=24)
    p.finish(p.outputs(p.place_rows(p.embed(dense_weight(table)))))
    p.allocate(4)
    put(p, 0, range(16), 0)
    step, which = work((0, 2, 6, 0)), np.array([-1, 1, 2, -1, 0, -1], np.int32)
    got = torch.from_numpy(p.logits(step, every_row=True, placed=(which, values.numpy())))
    assert torch.equal(got, torch.stack([table[2], values[1], values[2], table[5], values[0], table[7]]))
    assert torch.equal(torch.from_numpy(p.logits(step, every_row=True)), table[2:8])
    for wrong, message in (
        ((which[:5], values.numpy()), "one entry per row"),
        ((which + 1, values.numpy()), "no such row"),
        ((which, values[:, :23].contiguous().numpy()), "not as wide"),
    ):
        with pytest.raises(ValueError, match=message):
            p.logits(step, every_row=True, placed=wrong)
