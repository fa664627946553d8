"""Wrong arguments raise stock's exception type, with a message that names the op, the rule and the values.

The functionals and the operators beneath them make equal checks, since both are public.
"""

import math

import pytest
import torch

import pyops

ops = torch.ops.pyops
F = torch.nn.functional

x, w, b = torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3), torch.ones(4)
a, fc = torch.ones(2, 3), torch.ones(4, 3)

# The op, its arguments, and a text that the message must contain. torch.nn.functional raises for each of them too.
CALLS = [
    ("linear", (torch.ones(2, 5), fc), "2x5 and 3x4"),
    ("linear", (torch.ones(5), fc), "1x5 and 3x4"),
    ("linear", (torch.ones(()), fc), "0D and 2D"),
    ("linear", (a, torch.ones(())), "2D and 0D"),
    ("linear", (a, torch.ones(4, 3, 1)), r"\[4, 3, 1\]"),
    ("linear", (a, fc, torch.ones(3)), r"\[4\].*\[3\]"),
    ("linear", (a, fc, torch.ones(2, 2, 4)), r"\[4\].*\[2, 2, 4\]"),
    ("linear", (a, fc.double()), "(?i)float.*double"),
    ("linear", (a.bfloat16(), fc.half()), "(?i)bfloat16.*half"),
    ("linear", (a, fc, b.double()), "(?i)double.*float"),
    ("conv2d", (x[0, 0], w), r"Expected 3D \(unbatched\) or 4D \(batched\) input to conv2d.*\[8, 8\]"),
    ("conv2d", (x[None], w), r"\[1, 2, 3, 8, 8\]"),
    ("conv2d", (x, w[0]), r"\[3, 3, 3\]"),
    ("conv2d", (x, w[None]), r"\[1, 4, 3, 3, 3\]"),
    ("conv2d", (x, w, b[:3]), r"expected bias to be 1-dimensional with 4 elements, but got bias of size \[3\]"),
    ("conv2d", (x, w, b[None]), r"bias of size \[1, 4\]"),
    ("conv2d", (x, w.double()), "(?i)float.*double.*should be the same|should be the same.*float.*double"),
    ("conv2d", (x, w, b.half()), "should be the same"),
    ("conv2d", (x[:, :2], w), r"expected input\[2, 2, 8, 8\] to have 3 channels, but got 2 channels"),
    ("conv2d", (x, w, b, 0), "non-positive stride is not supported.*0"),
    ("conv2d", (x, w, b, (1, -1)), "non-positive stride is not supported.*-1"),
    ("conv2d", (x, w, b, (1, 1, 1)), "expected stride to be a single integer value or a list of 2 values"),
    ("conv2d", (x, w, b, ()), "expected stride to be"),
    ("conv2d", (x, w, b, 1, (0, -2)), "negative padding is not supported.*-2"),
    ("conv2d", (x, w, b, 1, (1, 1, 1)), "expected padding to be"),
    ("conv2d", (x, w, b, 1, ()), "expected padding to be"),
    ("conv2d", (x, w, b, 1, 0, 0), "non-positive dilation is not supported.*0"),
    ("conv2d", (x, w, b, 1, 0, -1), "dilation should be greater than zero.*-1"),
    ("conv2d", (x, w, b, 1, 0, ()), "expected dilation to be"),
    ("conv2d", (x, w, b, 1, 0, 1, 0), "non-positive groups is not supported.*0"),
    ("conv2d", (x, w, b, 1, 0, 1, -1), "non-positive groups is not supported.*-1"),
    ("conv2d", (x, w, b, 1, 0, 1, 2), r"Given groups=2, weight of size \[4, 3, 3, 3\].*6 channels, but got 3"),
    ("conv2d", (x, w, b, 1, 0, 1, 3), "expected weight to be divisible by 3 at dimension 0"),
    ("conv2d", (x, w[:0]), "expected weight to be at least 1 at dimension 0"),
    ("conv2d", (x, torch.ones(4, 3, 9, 9)), r"\(8 x 8\). Kernel size: \(9 x 9\)"),
    ("conv2d", (x, w, b, 1, 0, 4), r"\(8 x 8\). Kernel size: \(9 x 9\)"),
    ("conv2d", (x, torch.ones(4, 3, 0, 3)), r"\[4, 3, 0, 3\]"),
    ("conv2d", (x[:, :, :0], w), r"\(0 x 8\)"),
    ("conv2d", (x[:, :, :0], w, b, 1, 2), r"\[2, 3, 0, 8\]"),
    ("conv2d", (x, w, b, 1, 2**40), str(2**40)),
    ("conv2d", (x, w, b, 1, 2**62), str(2**62)),
    ("conv2d", (x, w, b, 1, 0, 2**62), str(2**62)),
    ("max_pool2d", (x[0, 0], 2), r"3D or 4D.*\[8, 8\]"),
    ("max_pool2d", (x[None], 2), r"3D or 4D.*\[1, 2, 3, 8, 8\]"),
    ("max_pool2d", (x[:, :0], 2), r"\[2, 0, 8, 8\]"),
    ("max_pool2d", (x[..., :0], 2), r"\[2, 3, 8, 0\]"),
    ("max_pool2d", (x, 0), "stride should not be zero"),
    ("max_pool2d", (x, 0, 1), "kernel size should be greater than zero.*kH: 0"),
    ("max_pool2d", (x, (2, -1)), "kernel size should be greater than zero.*kW: -1"),
    ("max_pool2d", (x, ()), "kernel_size must"),
    ("max_pool2d", (x, (2, 2, 2)), "kernel_size must.*2, 2, 2"),
    ("max_pool2d", (x, 2, 0), "stride should not be zero"),
    ("max_pool2d", (x, 2, -1), "stride should be greater than zero.*-1"),
    ("max_pool2d", (x, 2, (1, 1, 1)), "stride must"),
    ("max_pool2d", (x, 2, 2, -1), "pad must be non-negative.*-1"),
    ("max_pool2d", (x, 2, 2, 2), "pad should be at most half of effective kernel size.*pad=2, kernel_size=2"),
    ("max_pool2d", (x, 3, 2, (1, 2)), "pad should be at most half of effective kernel size.*pad=2, kernel_size=3"),
    ("max_pool2d", (x, 2, 2, 2, 3), "pad should be smaller than or equal to half of kernel size.*padW = 2"),
    ("max_pool2d", (x, 2, 2, ()), "padding must"),
    ("max_pool2d", (x, 2, 2, 0, 0), "dilation should be greater than zero.*0"),
    ("max_pool2d", (x, 2, 2, 0, (1, -3)), "dilation should be greater than zero.*-3"),
    ("max_pool2d", (x, 2, 2, 0, ()), "dilation must"),
    ("max_pool2d", (x, 9), "Output size is too small"),
    ("max_pool2d", (x, 2, 2, 0, 8), "Output size is too small"),
    ("max_pool2d", (x, 2**40), str(2**40)),
    ("max_pool2d", (x, 2, 2**62), str(2**62)),
    ("max_pool2d", (x, 2, 2, 0, 2**62), str(2**62)),
    ("max_pool2d", (x, 2, 2, 2**62), str(2**62)),
]


def describe(value):
    return value if isinstance(value, str) else None


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


# ---- the backward operators ----

conv = ((2, 3, 8, 8), (4, 3, 3, 3), 1, 0, 1, 1)
conv_grad = torch.ones(2, 4, 6, 6)
bits = torch.ones(1, dtype=torch.int64)
every = [True, True, True]
b_x, b_w, b_grad = torch.ones(2, 5, 3), torch.ones(2, 4, 3), torch.ones(2, 5, 4)
pool = ((8, 8), 2, 2, 0, 1, False)
argmax, pool_grad = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.ones(2, 3, 4, 4)

BACKWARD_CALLS = [
    ("relu_backward", (a, fc), r"\[4, 3\].*\[2, 3\]"),
    ("relu_backward", (a, a.double()), "Float.*Double"),
    ("relu_mask_backward", (a, bits.int(), [3, 1]), "dtype Long.*Int"),
    ("relu_mask_backward", (a, torch.zeros(2).long(), [3, 1]), r"mask of shape \[1\].*\[2\]"),
    ("relu_mask_backward", (a, bits, [1]), r"a stride for each dimension.*\[2, 3\].*\[1\]"),
    ("relu_mask_backward", (a, bits, [0, 0]), r"dense tensor of shape \[2, 3\].*\[0, 0\]"),
    ("relu_mask_backward", (a, bits, [6, 2]), r"dense tensor of shape \[2, 3\].*\[6, 2\]"),
    ("linear_backward", (torch.ones(()), a, fc, every), r"\[\]"),
    ("linear_backward", (torch.ones(2, 5), a, fc, every), r"\[5.*\[2, 5\].*\[4, 3\]"),
    ("linear_backward", (torch.ones(3, 4), a, fc, every), r"\[3, 4\].*\[2, 3\]"),
    ("linear_backward", (torch.ones(2, 4), torch.ones(2, 7), fc, every), "2x7 and 3x4"),
    ("linear_backward", (torch.ones(2, 4), a[0], fc, every), r"\[2, 4\].*\[3\]"),
    ("linear_backward", (torch.ones(2, 4), a, torch.ones(4), every), r"\[4"),
    ("linear_backward", (torch.ones(2, 4), None, fc, every), "gradient of weight needs input"),
    ("linear_backward", (torch.ones(2, 4), a, None, every), "gradient of input needs weight"),
    ("linear_backward", (torch.ones(2, 4), a.double(), fc, every), "Float.*Double"),
    ("linear_batched", (b_x, fc), r"\[2, 5, 3\] and \[4, 3\]"),
    ("linear_batched", (b_x[:1], b_w), r"\[1, 5, 3\] and \[2, 4, 3\]"),
    ("linear_batched", (b_x[..., 1:], b_w), "shapes cannot be multiplied"),
    ("linear_batched", (b_x, b_w, torch.ones(2, 3)), r"bias of shape \[2, 4\].*\[2, 3\]"),
    ("linear_batched", (b_x, b_w.double()), "Float.*Double"),
    ("linear_batched_backward", (torch.ones(2), b_x, b_w, every), r"at least 2 dimensions.*\[2\]"),
    ("linear_batched_backward", (b_grad[..., 1:], b_x, b_w, every), r"\[2, 3, in_features\].*\[2, 4, 3\]"),
    ("linear_batched_backward", (b_grad, b_x[:, 1:], b_w, every), r"\[2, 5, 4\].*\[2, 4, 3\]"),
    ("linear_batched_backward", (b_grad, b_x[..., 1:], b_w, every), r"3 features.*\[2, 5, 2\]"),
    ("linear_batched_backward", (b_grad, None, b_w, every), "gradient of weight needs input"),
    ("linear_batched_backward", (b_grad, b_x, None, every), "gradient of input needs weight"),
    ("linear_batched_backward", (b_grad, b_x.double(), b_w, every), "Float.*Double"),
    ("conv2d_backward", (conv_grad[..., 1:], x, w, *conv, every), r"\[2, 4, 6, 6\].*\[2, 4, 6, 5\]"),
    ("conv2d_backward", (conv_grad[0], x, w, *conv, every), r"\[2, 4, 6, 6\].*\[4, 6, 6\]"),
    ("conv2d_backward", (conv_grad, x[..., 1:], w, *conv, every), r"\[2, 3, 8, 8\].*\[2, 3, 8, 7\]"),
    ("conv2d_backward", (conv_grad, x, w[1:], *conv, every), r"\[4, 3, 3, 3\].*\[3, 3, 3, 3\]"),
    ("conv2d_backward", (conv_grad, None, w, *conv, every), "gradient of weight needs input"),
    ("conv2d_backward", (conv_grad, x, None, *conv, every), "gradient of input needs weight"),
    ("conv2d_backward", (conv_grad.double(), x, w, *conv, every), "Float.*Double"),
    ("conv2d_backward", (conv_grad, x, w, (2, 3, 2**62, 8), *conv[1:], every), str(2**62)),
    ("conv2d_backward", (conv_grad, None, w, (2, 3, -8, 8), *conv[1:], [True, False, False]), "-8"),
    ("conv2d_backward", (conv_grad, None, w, (), *conv[1:], [True, False, False]), r"\[\]"),
    ("conv2d_backward", (conv_grad, x, w, *conv[:2], 0, *conv[3:], every), "non-positive stride"),
    ("conv2d_backward", (conv_grad, x, w, *conv[:3], -1, *conv[4:], every), "negative padding"),
    ("conv2d_backward", (conv_grad, x, w, *conv[:5], 2, every), "groups=2"),
    ("max_pool2d_backward", (pool_grad[..., 1:], argmax, *pool), r"\[2, 3, 4, 4\].*\[2, 3, 4, 3\]"),
    ("max_pool2d_backward", (pool_grad, argmax[..., 1:], *pool), r"\[2, 3, 4, 4\].*\[2, 3, 4, 3\]"),
    ("max_pool2d_backward", (pool_grad, argmax.long(), *pool), "Byte.*4 taps.*Long"),
    ("max_pool2d_backward", (pool_grad, argmax.char(), *pool), "Byte.*Char"),
    ("max_pool2d_backward", (pool_grad, argmax, (8, 9, 9), *pool[1:]), "8, 9, 9"),
    ("max_pool2d_backward", (pool_grad, argmax, (20, 8), *pool[1:]), r"\[2, 3, 10, 4\].*\[2, 3, 4, 4\]"),
    ("max_pool2d_backward", (pool_grad, argmax, (8, -8), *pool[1:]), "-8"),
    ("max_pool2d_backward", (pool_grad, argmax, (8, 2**62), *pool[1:]), str(2**62)),
    ("max_pool2d_backward", (pool_grad[0, 0], argmax[0, 0], *pool), r"\[4, 4\]"),
    ("max_pool2d_backward", (pool_grad, argmax, (8, 8), 2, 2, 2), "pad should be at most half"),
    ("max_pool2d_backward", (pool_grad, argmax, (8, 8), 0, 1), "kernel size should be greater than zero"),
    ("max_pool2d_backward", (pool_grad, argmax, (8, 8), 2, -2), "stride should be greater than zero"),
    ("max_pool2d_gather", (x[:1], argmax, *pool[1:]), r"\[1, 3, 8, 8\].*\[2, 3, 4, 4\]"),
    ("max_pool2d_gather", (x[..., 1:, :], argmax, *pool[1:]), r"\[2, 3, 3, 4\].*\[2, 3, 4, 4\]"),
    ("max_pool2d_gather", (x[0], argmax, *pool[1:]), r"\[3, 8, 8\].*\[2, 3, 4, 4\]"),
    ("max_pool2d_gather", (x, argmax.int(), *pool[1:]), "Byte.*Int"),
    ("max_pool2d_indices", (argmax, (9, 4), *pool[1:]), r"\[2, 3, 4, 2\].*\[2, 3, 4, 4\]"),
    ("max_pool2d_indices", (argmax.short(), *pool), "Byte.*Short"),
]


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
