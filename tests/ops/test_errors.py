"""Wrong arguments raise stock's exception type, with a message that names the op, the rule and the values.

The functionals and the operators beneath them make equal checks, since both are public.
"""

import math

import pytest
import torch
from bad_calls import (
    BACKWARD_CALLS,
    CALLS,
    a,
    argmax,
    b,
    b_grad,
    b_w,
    b_x,
    bits,
    conv,
    conv_grad,
    describe,
    every,
    fc,
    pool,
    pool_grad,
    w,
    x,
)

import pyops

ops = torch.ops.pyops
F = torch.nn.functional


@pytest.mark.parametrize(("op", "arguments", "message"), CALLS, ids=describe)
def test_wrong_arguments(op, arguments, message):
    with pytest.raises(Exception) as stock:
        getattr(F, op)(*arguments)
    for function in (getattr(pyops.functional, op), getattr(ops, op)):
        with pytest.raises(stock.type, match=message) as ours:
            function(*arguments)
        assert ours.type is stock.type
        assert op in str(ours.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((x, w, b, 1, "sam"), "Invalid padding string: 'sam'"),
        ((x, w, b, 2, "same"), "padding='same' is not supported for strided convolutions.*2"),
        ((x, w, b, (1, 2), "same"), "padding='same' is not supported for strided convolutions.*2"),
        ((x, w, b, 1, "same", 0), "dilation.*0"),
        ((x, w[0], b, 1, "same"), r"\[3, 3, 3\]"),
        ((x[:, :2], w, b, 1, "same"), "to have 3 channels, but got 2"),
        ((x, w, b, 0, "same"), "non-positive stride is not supported"),
    ],
)
def test_wrong_named_padding(arguments, message):
    with pytest.raises(RuntimeError):
        F.conv2d(*arguments)
    with pytest.raises(RuntimeError, match=message) as error:
        pyops.functional.conv2d(*arguments)
    assert "conv2d" in str(error.value)


def test_a_convolution_too_large_for_memory():
    """The output would have 2**64 pixels, so that even their count would overflow."""
    with pytest.raises(RuntimeError, match="overflow"):
        pyops.functional.conv2d(x[:, :, :1, :1], w, None, 1, 2**31 - 1)
    with pytest.raises(RuntimeError):  # 64 TiB
        pyops.functional.conv2d(x[:, :, :1, :1], w, None, 1, 2**20)


def test_the_largest_values_that_are_allowed():
    largest = 2**31 - 1
    image = torch.arange(9.0).view(1, 1, 3, 3)
    assert pyops.functional.max_pool2d(image, 3, largest).tolist() == [[[[8.0]]]]
    assert pyops.functional.max_pool2d(image[..., :1, :1] - 5, largest, 1, largest // 2).tolist() == [[[[-5.0]]]]
    assert pyops.functional.max_pool2d(image, 1, 1, 0, largest).tolist() == image.tolist()
    assert pyops.functional.conv2d(image, image, None, largest).item() == 204
    one = image[..., 1:2, 1:2] + 1
    assert pyops.functional.conv2d(image, one, None, 1, 0, largest).tolist() == (5 * image).tolist()
    assert pyops.functional.conv2d(one, image[..., :2, :2], None, largest, 2**30, 2**30).shape == (1, 1, 1, 1)


OTHER_DTYPES = {
    "relu": (torch.bool, torch.complex64, torch.uint16, torch.float8_e4m3fn),
    "relu_": (torch.bool, torch.complex128),
    "linear": (torch.int64, torch.bool, torch.complex64, torch.uint8),
    "conv2d": (torch.int32, torch.bool, torch.complex64),
    "max_pool2d": (torch.bool, torch.complex64, torch.uint32),
}
DTYPE_NAMES = {
    torch.bool: "Bool",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
    torch.uint16: "UInt16",
    torch.uint32: "UInt32",
    torch.float8_e4m3fn: "Float8_e4m3fn",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.uint8: "Byte",
}


@pytest.mark.parametrize(("op", "dtype"), [(op, t) for op, dtypes in OTHER_DTYPES.items() for t in dtypes], ids=str)
def test_other_dtypes(op, dtype):
    tensors = {"relu": (a,), "relu_": (a,), "linear": (a, fc), "conv2d": (x, w), "max_pool2d": (x,)}[op]
    arguments = [*(t.to(dtype) for t in tensors), *([2] if op == "max_pool2d" else [])]
    for function in (getattr(pyops.functional, op, None), getattr(ops, op)):
        if function:
            with pytest.raises(NotImplementedError, match=f"\"{op}\" not implemented for '{DTYPE_NAMES[dtype]}'"):
                function(*arguments)


@pytest.mark.parametrize(("op", "arguments", "message"), BACKWARD_CALLS, ids=describe)
def test_wrong_arguments_of_backward(op, arguments, message):
    with pytest.raises(RuntimeError, match=message) as error:
        getattr(ops, op)(*arguments)
    assert f"{op}: " in str(error.value)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("relu_backward", (a.bool(), a.bool())),
        ("relu_with_mask", (a.int(),)),
        ("relu_mask_backward", (a.int(), bits, [3, 1])),
        ("linear_backward", (torch.ones(2, 4).int(), a.int(), fc.int(), every)),
        ("linear_batched", (b_x.int(), b_w.int())),
        ("linear_batched_backward", (b_grad.int(), b_x.int(), b_w.int(), every)),
        ("conv2d_backward", (conv_grad.int(), x.int(), w.int(), *conv, every)),
        ("max_pool2d_backward", (pool_grad.int(), argmax, *pool)),
        ("max_pool2d_gather", (x.bool(), argmax, *pool[1:])),
    ],
)
def test_other_dtypes_of_backward(op, arguments):
    with pytest.raises(NotImplementedError, match=f'"{op}" not implemented for'):
        getattr(ops, op)(*arguments)


# ---- devices ----


@pytest.mark.parametrize(
    ("op", "arguments", "which"),
    [
        ("linear", (a, fc, b), (0, 1, 2)),
        ("conv2d", (x, w, b), (0, 1, 2)),
        ("relu_backward", (a, a), (0, 1)),
        ("relu_mask_backward", (a, bits, [3, 1]), (0, 1)),
        ("linear_backward", (torch.ones(2, 4), a, fc, every), (0, 1, 2)),
        ("linear_batched", (b_x, b_w, torch.ones(2, 4)), (0, 1, 2)),
        ("linear_batched_backward", (b_grad, b_x, b_w, every), (0, 1, 2)),
        ("conv2d_backward", (conv_grad, x, w, *conv, every), (0, 1, 2)),
        ("max_pool2d_backward", (pool_grad, argmax, *pool), (0, 1)),
        ("max_pool2d_gather", (x, argmax, *pool[1:]), (0, 1)),
    ],
)
def test_tensors_of_two_devices(op, arguments, which):
    for i in which:
        mixed = [t.to("meta") if j == i else t for j, t in enumerate(arguments)]
        with pytest.raises(RuntimeError, match=f"{op}.*same device.*(cpu.*meta|meta.*cpu)"):
            getattr(ops, op)(*mixed)


# ---- arbitrary values in an argmax ----


@pytest.mark.parametrize("where", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "window", [(2,), (3, 2, 1), (3, 1, 1), (3, 4), ((2, 3), (1, 2), 1, 2), ((16, 17), 5, 4)], ids=str
)
def test_arbitrary_argmax(window, dtype, where):
    """A number that names no element of the image contributes nothing; the others have their usual effect."""
    size, shape = (37, 41), (2, 3, 37, 41)
    format = torch.channels_last if where == "channels_last" else torch.contiguous_format
    argmax = ops.max_pool2d(torch.zeros(shape).contiguous(memory_format=format), *window)[1]
    if argmax.dtype == torch.uint8:
        argmax.random_(0, 256)
    else:
        huge = torch.tensor([-1, -(2**63), 2**63 - 1, 2**40, -(2**32), 272])
        values = torch.cat([huge, torch.arange(272)])
        argmax.copy_(values[torch.randint(len(values), argmax.shape)])
    grad = torch.randn(argmax.shape, dtype=dtype).contiguous(memory_format=format)

    kernel, stride, padding, dilation = (pair((*window, *(None,) * 4)[i], default) for i, default in DEFAULTS)
    stride = stride or kernel
    rows, columns = (
        torch.arange(n).mul(s).sub(p).view(shape)
        for n, s, p, shape in zip(argmax.shape[2:], stride, padding, ((-1, 1), (1, -1)), strict=True)
    )
    h = rows + argmax.long().div(kernel[1], rounding_mode="floor") * dilation[0]
    w = columns + argmax.long().remainder(kernel[1]) * dilation[1]
    named = argmax.long().ge(0) & argmax.long().lt(math.prod(kernel))
    named &= h.ge(0) & h.lt(size[0]) & w.ge(0) & w.lt(size[1])
    at = torch.where(named, h * size[1] + w, 0)

    indices = ops.max_pool2d_indices(argmax, size, *window)
    assert torch.equal(indices, at)
    image = torch.randn(shape, dtype=dtype).contiguous(memory_format=format)
    gathered = ops.max_pool2d_gather(image, argmax, *window)
    expected = torch.where(named, image.flatten(2).gather(2, at.flatten(2)).view(at.shape), 0)
    assert torch.equal(gathered, expected)
    grad_input = ops.max_pool2d_backward(grad, argmax, size, *window)
    exact = torch.zeros(2, 3, math.prod(size), dtype=torch.float64)
    exact.scatter_add_(2, at.flatten(2), torch.where(named, grad.double(), 0).flatten(2))
    torch.testing.assert_close(grad_input.double(), exact.view(shape), rtol=8e-3, atol=1e-5)


DEFAULTS = ((0, None), (1, None), (2, 0), (3, 1))


def pair(value, default):
    value = default if value is None else value
    return (value, value) if isinstance(value, int) else value
