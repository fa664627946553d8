"""Autocast: linear and conv2d run in the lower precision, the others in that of their input, as stock does."""

import pytest
import torch
from twins import TWINS

import pyops

CASES = {
    "relu": ([(3, 4)], {}),
    "linear": ([(3, 4), (5, 4), (5,)], {}),
    "conv2d": ([(2, 3, 5, 5), (4, 3, 3, 3), (4,)], {"padding": 1}),
    "max_pool2d": ([(2, 3, 6, 6)], {"kernel_size": 2}),
}
every_op = pytest.mark.parametrize(("op", "shapes", "options"), [(op, *case) for op, case in CASES.items()])
every_target = pytest.mark.parametrize("target", [torch.bfloat16, torch.float16], ids=str)


@pytest.mark.composes("autocast to bfloat16 and float16")
@every_op
@every_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtypes_are_those_of_stock(op, shapes, options, target, dtype):
    def dtypes(function):
        leaves = [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]
        with torch.autocast("cpu", target):
            output = function(*leaves, **options)
        output.sum().backward()
        return [output.dtype, *(leaf.grad.dtype for leaf in leaves)]

    ours = getattr(pyops.functional, op)
    assert dtypes(ours) == dtypes(getattr(torch.nn.functional, op))


@pytest.mark.composes("autocast to bfloat16 and float16")
@every_op
@every_target
def test_values_are_those_of_a_cast(op, shapes, options, target):
    tensors = [torch.randn(s) for s in shapes]
    for function in (getattr(pyops.functional, op), getattr(torch.ops.pyops, op)):
        with torch.autocast("cpu", target):
            actual = function(*tensors, **options)
        cast = [t.to(target) for t in tensors] if op in ("linear", "conv2d") else tensors
        expected = function(*cast, **options)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.composes("autocast to bfloat16 and float16")
@every_target
@pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS)
def test_values_and_gradients_are_those_of_stock(twin, target):
    """They have stock's dtypes and agree to the rounding of the lower precision, for fused functions too."""
    leaves, results = [t.requires_grad_() for t in twin.tensors(torch.float32)], []
    for function in (twin.ours, twin.stock):
        with torch.autocast("cpu", target):
            output = function(*leaves)
        results.append([output, *torch.autograd.grad(output.float().pow(2).sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        assert (actual - expected).double().norm() <= 4 * torch.finfo(target).eps * expected.double().norm()


@every_target
def test_mixed_dtypes_are_brought_together(target):
    input, weight = torch.randn(3, 4), torch.randn(5, 4).to(target)
    with pytest.raises(RuntimeError, match="same dtype"):
        pyops.functional.linear(input, weight)
    with torch.autocast("cpu", target):
        assert pyops.functional.linear(input, weight).dtype == target
        with torch.autocast("cpu", enabled=False):
            assert pyops.functional.linear(input, input).dtype == torch.float32


@pytest.mark.composes("autocast to bfloat16 and float16")
@pytest.mark.parametrize("op", ["linear", "conv2d"])
def test_gradients_are_those_of_a_cast(op):
    leaves = [torch.randn(s, requires_grad=True) for s in CASES[op][0]]
    function = getattr(pyops.functional, op)
    with torch.autocast("cpu", torch.bfloat16):
        output = function(*leaves)
    grad = torch.randn_like(output)
    actual = torch.autograd.grad(output, leaves, grad)
    expected = torch.autograd.grad(function(*(t.bfloat16() for t in leaves)), leaves, grad)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
