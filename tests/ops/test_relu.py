"""relu gives stock's results bit for bit, in and out of place, for every dtype and layout."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_identical
from tensors import FLOATING, INTEGER, LAYOUTS, layouts, place, random, with_ties
from torch._subclasses.fake_tensor import FakeTensorMode

import pyops
from pyops.functional import relu

pytestmark = pytest.mark.every_device

# The sizes are nothing, less than a vector, whole vectors with a tail, and several blocks of work with a tail.
SHAPES = [(), (0,), (1,), (31,), (2, 3, 4, 5), (3, 0, 2), (257,), (5, 1027), (3, 7, 67, 71)]

every_dtype = pytest.mark.parametrize("dtype", FLOATING + INTEGER, ids=str)
every_floating_dtype = pytest.mark.parametrize("dtype", FLOATING, ids=str)


def special_values(dtype: torch.dtype) -> torch.Tensor:
    """Zero, the smallest and largest numbers, ordinary numbers, infinity and several NaNs, of both signs."""
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal * limits.eps
    values = torch.tensor([0.0, smallest, limits.smallest_normal, 1.0, limits.max, math.inf, math.nan], dtype=dtype)
    values = torch.cat([values, -values])
    return values.repeat(5)  # so that they are in vectors and in the tail


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype):
    input = random(shape, dtype)
    assert_identical("output", relu(input), torch.relu(input))


@every_dtype
@pytest.mark.parametrize("where", LAYOUTS)
def test_layouts(where, dtype):
    input = random((2, 3, 5, 7), dtype, where)
    assert_identical("output", relu(input), torch.relu(input))


@given(st.data())
def test_any_layout(data):
    shape = data.draw(st.lists(st.integers(0, 9), max_size=5))
    dtype = data.draw(st.sampled_from(FLOATING + INTEGER))
    input = with_ties(shape, dtype, data.draw(layouts(len(shape))))
    assert_identical("output", relu(input), torch.relu(input))
    if dtype.is_floating_point:
        grad = random(shape, dtype, data.draw(layouts(len(shape))))
        assert_identical("gradient", gradient(relu, input, grad), gradient(torch.relu, input, grad))


def gradient(function, input, grad_output):
    leaf = input.detach().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, grad_output)[0]


@every_floating_dtype
def test_special_values(dtype):
    input = special_values(dtype)
    assert_identical("output", relu(input), torch.relu(input))
    assert relu(input).isnan().sum() == input.isnan().sum() > 0
    assert (relu(input).signbit() & (relu(input) == 0)).any(), "-0.0 stays"
    grad = random(input.shape, dtype)
    assert_identical("gradient", gradient(relu, input, grad), gradient(torch.relu, input, grad))
    assert torch.equal(gradient(relu, input, grad)[input.isnan()], grad[input.isnan()])


@every_floating_dtype
def test_special_gradients(dtype):
    """A NaN or infinite gradient is blocked, not multiplied by zero."""
    grad = special_values(dtype)
    for value in (1.0, -1.0, 0.0, -0.0, math.nan):
        input = torch.full_like(grad, value)
        assert_identical("gradient", gradient(relu, input, grad), gradient(torch.relu, input, grad))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_bit_pattern(dtype):
    input = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    grad = torch.ones_like(input)
    assert_identical("output", relu(input), torch.relu(input))
    assert_identical("gradient", gradient(relu, input, grad), gradient(torch.relu, input, grad))


@every_floating_dtype
@pytest.mark.parametrize("grad_where", LAYOUTS)
@pytest.mark.parametrize("where", LAYOUTS)
def test_gradient_layouts(where, grad_where, dtype):
    input = random((2, 3, 5, 7), dtype, where)
    grad = random(input.shape, dtype, grad_where)
    assert_identical("gradient", gradient(relu, input, grad), gradient(torch.relu, input, grad))


@pytest.mark.parametrize(
    ("shape", "strides"),
    (((1, 1), (2, 2)), ((1, 2), (1, 1)), ((2, 1, 3, 3), (9, 1, 3, 1)), ((1, 3, 1, 2), (1, 1, 9, 3))),
    ids=str,
)
def test_strides_of_one_element(shape, strides):
    """Dimensions of one element may have any stride, which the fake kernel has to predict."""
    input = torch.randn(30).as_strided(shape, strides).requires_grad_()
    assert relu(input).stride() == relu(input.detach()).stride() == strides
    assert gradient(relu, input, torch.ones(shape)).stride() == strides
    with FakeTensorMode() as mode:
        assert relu(mode.from_tensor(input)).stride() == strides


# ---- in place ----


@every_dtype
@pytest.mark.parametrize("where", [name for name in LAYOUTS if name != "expanded"])
def test_in_place(where, dtype):
    input = random((2, 3, 5, 7), dtype, where)
    expected = torch.relu(input)
    address, strides = input.data_ptr(), input.stride()
    assert relu(input, inplace=True) is input
    assert input.data_ptr() == address and input.stride() == strides
    assert torch.equal(input, expected)


@every_dtype
@pytest.mark.parametrize("size", [1, 15, 33, 70_001])
def test_in_place_changes_nothing_around(size, dtype):
    memory = torch.full((size + 128,), -1 if dtype.is_signed else 3, dtype=dtype)
    relu(memory[64:-64], inplace=True)
    assert (memory[64:-64] == (0 if dtype.is_signed else 3)).all()
    assert (memory[:64] == memory[0]).all() and (memory[-64:] == memory[-1]).all()
    assert memory[0] == memory[-1] == (-1 if dtype.is_signed else 3)


def test_in_place_of_a_slice_changes_nothing_between():
    memory = torch.full((6, 9), -1.0)
    relu(memory[::2, 1::3], inplace=True)
    expected = torch.full((6, 9), -1.0)
    expected[::2, 1::3] = 0
    assert torch.equal(memory, expected)


def test_in_place_gradient():
    def through(function):
        leaf = random((4, 5)).requires_grad_()
        hidden = leaf * 2
        result = function(hidden)
        assert result is hidden
        result.square().sum().backward()
        return leaf.grad

    torch.manual_seed(1)
    ours = through(lambda t: relu(t, inplace=True))
    torch.manual_seed(1)
    assert torch.equal(ours, through(lambda t: torch.nn.functional.relu(t, inplace=True)))


def test_in_place_on_a_view():
    def through(function):
        leaf = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
        base = leaf * 3
        function(base[1:])
        base.square().sum().backward()
        return base.detach(), leaf.grad

    ours, stock = through(lambda t: relu(t, inplace=True)), through(torch.relu_)
    assert torch.equal(ours[0], stock[0]) and torch.equal(ours[1], stock[1])


def test_in_place_refuses_a_leaf_and_leaves_it_as_it_was():
    leaf = torch.tensor([-1.0, 2.0], requires_grad=True)
    for function in (lambda t: relu(t, inplace=True), torch.ops.pyops.relu_):
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place"):
            function(leaf)
        assert leaf.tolist() == [-1.0, 2.0]
    with torch.no_grad():
        relu(leaf, inplace=True)
    assert leaf.tolist() == [0.0, 2.0]


def test_in_place_refuses_a_tensor_that_overlaps_itself():
    expanded = torch.full((1,), -1.0).expand(4)
    for function in (torch.relu_, lambda t: relu(t, inplace=True)):
        with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
            function(expanded)


def test_autograd_notices_that_a_saved_input_changed_in_place():
    leaf = torch.ones(3, requires_grad=True)
    hidden = leaf * 2
    square = hidden * hidden
    relu(hidden, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@pytest.mark.not_emulated
def test_more_than_2_to_the_31_elements():
    memory = torch.full((2**31 + 77,), -1, dtype=torch.int8)
    memory[-3:] = torch.tensor([5, -128, 127])
    assert relu(memory, inplace=True)[-5:].tolist() == [0, 0, 5, 0, 127]
    assert int(memory[2**31 - 40 :].sum()) == 132 and not memory[:: 2**12].any()


@every_floating_dtype
@pytest.mark.parametrize("where", LAYOUTS)
def test_the_mask_gates_as_the_output_does(where, dtype):
    for size in (1, 3, 17, 70):
        input = place(special_values(dtype).repeat(9)[: 4 * size].view(1, 2, 2, size), where)
        output, mask = torch.ops.pyops.relu_with_mask(input)
        assert_identical("output", output, torch.relu(input))
        grad = torch.randn(input.shape).to(dtype)
        expected = torch.ops.pyops.relu_backward(grad, output)
        assert_identical("gradient", torch.ops.pyops.relu_mask_backward(grad, mask, output.stride()), expected)


def test_my_relu_of_the_tutorials():
    x = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    y = pyops.autograd.ReLU.apply(x)
    y.backward(torch.tensor([1.0, 1.0, 5.0]))
    assert y.tolist() == [0.0, 0.0, 3.0] and x.grad.tolist() == [0.0, 0.0, 5.0]
    assert "ReLU" in type(y.grad_fn).__name__
