"""The matrix product of the CUDA kernels (cuda/gemm/gemm.h) on the emulator: tiles, copies, precisions, and phases."""

import math

import emulated
import oracle
import pytest
import torch
from tensors import FLOATING, place, random

import pyops
from pyops.functional import conv2d, linear

pytestmark = emulated.needed

every_dtype = pytest.mark.parametrize("dtype", FLOATING, ids=str)
every_layout = pytest.mark.parametrize("where", ["contiguous", "channels_last"])


def unaligned(shape, dtype, offset):
    """A contiguous tensor that starts after `offset` elements of a larger one."""
    count = math.prod(shape)
    return random((count + offset,), dtype)[offset:].view(shape)


# Rows, depth and columns: few rows, few columns, small tiles, full and partial, k in parts, and parts of full length.
SIZES = [(1, 40, 9), (16, 33, 130), (300, 84, 10), (130, 15, 16), (64, 64, 64), (67, 131, 70), (40, 1500, 35)]
SIZES += [(2, 4200, 3), (65, 1, 17)]


@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
@every_dtype
def test_sizes_and_alignments(dtype, size, offset):
    """The operands can be read by 16 bytes at a time, by 4 or 8, or by single elements."""
    m, k, n = size
    tensors = [unaligned((m, k), dtype, offset), unaligned((n, k), dtype, offset), random((n,), dtype)]
    with emulated.kernels():
        oracle.check("linear", tensors)


@every_dtype
def test_large_tiles(dtype):
    """The product is large enough for the largest tiles, and the last tiles are partly filled."""
    with emulated.kernels():
        oracle.check("linear", [random((1410, 17), dtype), random((1290, 17), dtype), random((1290,), dtype)])


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_tiles_of_images(dtype, where):
    """The tiles of pixels and channels are as large, and the last ones are partly filled."""
    tensors = [place(random(size, dtype), where) for size in ((1, 5, 38, 39), (1290, 5, 2, 1))]
    with emulated.kernels():
        oracle.check("conv2d", [*tensors, None])


def to_tf32(x):
    """Rounds to 10 bits after the point, with ties away from 0."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


OPS = {
    "linear": (linear, [(67, 131), (70, 131)]),
    "linear, large tiles": (linear, [(1410, 17), (1290, 17)]),
    "conv2d": (lambda x, w: conv2d(x, w, padding=1, stride=2), [(2, 9, 11, 13), (35, 9, 3, 3)]),
}


@every_layout
@pytest.mark.parametrize("op", OPS)
def test_tf32_where_it_is_allowed(op, where):
    """The results are those of operands rounded to TF32, which are far from those of float32."""
    function, sizes = OPS[op]
    operands = [place(random(size), where if len(size) == 4 else "contiguous") for size in sizes]

    def results(tensors, grad):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    grad = random(function(*operands).shape)
    exact = results([t.double() for t in operands], grad.double())
    rounded = results([to_tf32(t).double() for t in operands], to_tf32(grad).double())
    with emulated.kernels(tf32=True):
        actual = results(operands, grad)
    with emulated.kernels():
        precise = results(operands, grad)
    for a, p, e, r in zip(actual, precise, exact, rounded, strict=True):
        size = e.abs().max()
        assert (a - r).abs().max() < 2e-6 * size
        assert (p - e).abs().max() < 2e-6 * size
        assert (a - e).abs().max() > 5e-5 * size


def plain_sum(a, b):
    """The product of a [M, K] and b [N, K], where each sum is one chain of fused multiply-adds in float32."""
    result = torch.zeros(a.shape[0], b.shape[0])
    for k in range(a.shape[1]):
        result = (result.double() + a[:, k, None].double() * b[None, :, k].double()).float()
    return result


@pytest.mark.parametrize("values", ["normal", "positive"])
@pytest.mark.parametrize("depth", [16, 64, 150, 400, 1024, 4096])
def test_float32_is_as_accurate_as_plain_sums(depth, values):
    """3xTF32 (three TF32 products per float32 product) has at most 1.5 times the error of float32, not that of TF32."""
    a, b = (random((48, depth)) if values == "normal" else torch.rand(48, depth) for _ in range(2))
    exact = a.double() @ b.double().T
    with emulated.kernels():
        ours = linear(a, b)

    def error(actual):
        return (actual.double() - exact).square().mean().sqrt()

    assert error(ours) <= 1.5 * error(plain_sum(a, b))


# Pairs of an input and a weight that are multiplied. In plain float32 only the last two lines give NaN.
LARGE = 3.4024e38  # finite, but infinite if it were rounded to TF32
SPECIAL = [
    *[(math.inf, w) for w in (1.0, 1.0 + 2**-20, 1.0 - 2**-20, -3.0, 2**-100)],
    *[(-math.inf, w) for w in (1.0, 1.0 + 2**-20, 1.0 - 2**-20, -3.0, 2**-100)],
    *[(LARGE, w) for w in (0.5, 1.0, 2.0, -1.0, -2.0, 0.0)],
    *[(math.inf, w) for w in (math.inf, -math.inf, 0.0, math.nan)],
    (math.nan, 1.0),
]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("x", "w"), SPECIAL)
def test_infinities_and_nan_as_in_plain_float32(x, w, swapped):
    """A special value affects its own row or column as in float32, and no other."""
    input, weight = torch.rand(20, 40) + 0.1, torch.rand(24, 40) + 0.1
    if swapped:
        weight[3, 7], input[5, 7] = x, w
    else:
        input[3, 7], weight[5, 7] = x, w
    expected = (input[:, None] * weight).sum(-1)
    with emulated.kernels():
        actual = linear(input, weight)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0, equal_nan=True)


def test_infinities_of_both_signs_are_nan():
    input, weight = torch.rand(20, 40) + 0.1, torch.rand(24, 40) + 0.1
    input[2, 1], input[2, 30], input[4, 8], input[4, 9] = math.inf, -math.inf, math.inf, math.inf
    with emulated.kernels():
        output = linear(input, weight)
    assert output[2].isnan().all() and (output[4] == math.inf).all()
    assert output[[i for i in range(20) if i not in (2, 4)]].isfinite().all()


# Strides, dilations, kernels and paddings whose phases have equal numbers of taps, different numbers, or none.
PHASES = {
    "stride 2": ((2, 5, 9, 12), (18, 5, 3, 3), {"stride": 2, "padding": 1}),
    "stride 2, one tap": ((2, 9, 7, 8), (17, 9, 1, 1), {"stride": 2}),
    "stride 3 and 2, dilation 2 and 3": ((1, 4, 17, 16), (9, 4, 4, 3), {"stride": (3, 2), "dilation": (2, 3)}),
    "stride 4, dilation 2": ((1, 3, 21, 18), (8, 3, 3, 2), {"stride": 4, "dilation": 2, "padding": 3}),
    "stride beyond the kernel": ((2, 3, 11, 13), (8, 3, 2, 2), {"stride": (3, 5)}),
    "stride beyond the image": ((1, 2, 3, 2), (40, 2, 3, 2), {"stride": 7, "padding": 1}),
}


@every_layout
@every_dtype
@pytest.mark.parametrize("phases", PHASES)
def test_gradient_of_the_input_by_phases(phases, dtype, where):
    input, weight, options = PHASES[phases]
    tensors = [place(random(size, dtype), where) for size in (input, weight)]
    with emulated.kernels():
        oracle.check("conv2d", [*tensors, None], options, grad=where)


@every_dtype
@pytest.mark.parametrize("channels", [6, 8, 13, 16])
def test_channels_side_by_side(channels, dtype):
    """Images are copied along the channels with every width of copy, and begin at any alignment."""
    for offset in (0, 1, 2):
        x = unaligned((2, 6, 5, channels), dtype, offset).permute(0, 3, 1, 2)
        w = place(random((20, channels, 3, 2), dtype), "channels_last")
        with emulated.kernels():
            oracle.check("conv2d", [x, w, random((20,), dtype)], {"padding": 1}, grad="channels_last")


@every_dtype
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [(4, 4), (6, 6), (3, 4), (2, 5), (5, 5)], ids=str)
def test_pixels_side_by_side(size, kernel, dtype):
    """Images stored as N C H W are copied along the pixels with every width of copy, and begin at any alignment."""
    for offset in (0, 1, 2):
        tensors = [unaligned((2, 9, *size), dtype, offset), random((40, 9, kernel, kernel), dtype), None]
        with emulated.kernels():
            oracle.check("conv2d", tensors, {"padding": kernel // 2})


def test_pooled_convolution_takes_the_flag():
    x, w = random((1, 20, 6, 6)), random((40, 20, 3, 3))
    expected = torch.nn.functional.max_pool2d(torch.relu(torch.nn.functional.conv2d(to_tf32(x), to_tf32(w))), 2)
    with emulated.kernels(tf32=True):
        actual = pyops.functional.conv2d_relu_max_pool2d(x, w, pool_kernel_size=2)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
