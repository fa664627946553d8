"""linear's output and gradients are compared with float64, for every size, layout and dtype."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_close, check
from tensors import FLOATING, LAYOUTS, layouts, random

from pyops.functional import linear

pytestmark = pytest.mark.every_device

every_dtype = pytest.mark.parametrize("dtype", FLOATING, ids=str)


def operands(leading, in_features, out_features, dtype=torch.float32, bias=True):
    return [
        random((*leading, in_features), dtype),
        random((out_features, in_features), dtype),
        random((out_features,), dtype) if bias else None,
    ]


@every_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (2, 0, 3), (0,), (2, 1, 2, 2)], ids=str)
def test_leading_dimensions(leading, bias, dtype):
    check("linear", operands(leading, 5, 4, dtype, bias))


# Sizes around the register tiles (up to 16 rows, 4 vectors of 16), the chunks of K (256) and the blocks (192 x 384).
SIZES = [(1, 1, 1), (2, 16, 15), (5, 17, 65), (6, 31, 64), (13, 33, 63), (17, 257, 10), (64, 400, 120), (193, 20, 130)]
SIZES += [(33, 600, 385), (600, 7, 9), (1, 1030, 70), (3, 2, 400)]
SIZES += [(20, 704, 400), (70, 704, 400)]  # a weight of more than 1 MB, with few and with many rows


@every_dtype
@pytest.mark.parametrize(("batch", "in_features", "out_features"), SIZES)
def test_sizes(batch, in_features, out_features, dtype):
    check("linear", operands((batch,), in_features, out_features, dtype))


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize(("in_features", "out_features"), [(0, 3), (3, 0), (0, 0)])
def test_no_features(batch, in_features, out_features):
    input, weight, bias = operands((batch,), in_features, out_features)
    check("linear", [input, weight, bias])
    if in_features == 0:
        assert torch.equal(linear(input, weight, bias), bias.expand(batch, out_features))
        assert not linear(input, weight).any()


@every_dtype
@pytest.mark.parametrize("grad_where", LAYOUTS)
@pytest.mark.parametrize("where", LAYOUTS)
def test_layouts(where, grad_where, dtype):
    tensors = [random((6, 5, 21), dtype, where), random((18, 21), dtype, where), random((18,), dtype, where)]
    check("linear", tensors, grad=grad_where)


@given(st.data())
def test_any_size_and_layout(data):
    leading = data.draw(st.lists(st.integers(0, 9), max_size=3))
    in_features, out_features = data.draw(st.integers(0, 90)), data.draw(st.integers(0, 90))
    dtype = data.draw(st.sampled_from(FLOATING))
    tensors = [
        random((*leading, in_features), dtype, data.draw(layouts(len(leading) + 1))),
        random((out_features, in_features), dtype, data.draw(layouts(2))),
        random((out_features,), dtype, data.draw(layouts(1))) if data.draw(st.booleans()) else None,
    ]
    check("linear", tensors, grad=data.draw(layouts(len(leading) + 1)))


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7)], ids=str)
def test_weight_vector(shape):
    """Stock's linear also takes a weight without the output dimension."""
    check("linear", [random(shape), random((7,)), None])


@pytest.mark.parametrize("bias_shape", [(), (1,)], ids=str)
def test_one_bias_for_all(bias_shape):
    check("linear", [random((3, 7)), random((5, 7)), random(bias_shape)])


@every_dtype
def test_nan_and_infinity_stay_in_their_row_and_column(dtype):
    input, weight, bias = operands((37,), 50, 70, dtype)
    input[3, 7], input[11, 0], input[36, 49] = math.nan, math.inf, -math.inf
    weight[69, 2], bias[5] = math.nan, -math.inf
    output = linear(input, weight, bias)
    exact = torch.nn.functional.linear(input.double(), weight.double(), bias.double())
    magnitude = torch.nn.functional.linear(input.double().abs(), weight.double().abs(), bias.double().abs())
    assert_close("output", output, exact, magnitude)
    assert output.isfinite().sum() == (37 - 3) * (70 - 2)


def test_sums_stay_accurate():
    """A long sum in float32 is computed in parts, so its error stays below that of one long chain of additions."""
    count = 200_000
    input, grad = torch.rand(count, 3) + 0.5, torch.rand(count, 2) + 0.5
    weight = torch.ones(2, 3, requires_grad=True)
    bias = torch.zeros(2, requires_grad=True)
    linear(input, weight, bias).backward(grad)
    torch.testing.assert_close(weight.grad.double(), grad.double().T @ input.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(bias.grad.double(), grad.double().sum(0), rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.not_emulated
def test_more_than_2_to_the_31_elements():
    rows, columns = 2**16 + 1, 2**15
    input, weight = torch.zeros(rows, 1, dtype=torch.bfloat16), torch.zeros(columns, 1, dtype=torch.bfloat16)
    input[-1], weight[-1], input[0], weight[0] = 3, 5, 7, 2
    output = linear(input, weight)
    assert output[0, 0] == 14 and output[0, -1] == 35 and output[-1, 0] == 6 and output[-1, -1] == 15
    assert output.count_nonzero() == 4
