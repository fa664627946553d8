"""Tests the particulars of the CUDA kernels on the emulator: algorithms, orders of threads, large batches, training.

The test files of the ops check that the results are those of the CPU kernels.
"""

import math

import emulated
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_calls import POOL, WIDE_POOL, convolved, fused, multiplied, pooled, rectified
from oracle import check_max_pool2d
from tensors import FLOATING, INTEGER, layout, place, random, with_ties

import pyops

pytestmark = emulated.needed


def images(size, dtype, where):
    return place(random(size, dtype), where)


# The sums have several parts, and there are several tiles, and tiles and warps that are not full.
CASES = {
    "relu": lambda dtype, where: rectified(images((3, 5, 17, 19), dtype, where)),
    "linear": lambda dtype, where: multiplied(random((67, 131), dtype, where), random((70, 131), dtype, where)),
    "linear_long_sum": lambda dtype, where: multiplied(random((1503, 7), dtype, where), random((9, 7), dtype)),
    "conv2d": lambda dtype, where: convolved(
        images((3, 5, 11, 13), dtype, where), images((7, 5, 3, 3), dtype, where), (2, 1), 1, 1, 1
    ),
    "conv2d_groups": lambda dtype, where: convolved(
        images((3, 6, 9, 8), dtype, where), images((12, 1, 3, 3), dtype, where), 1, 2, 2, 6
    ),
    "conv2d_depthwise": lambda dtype, where: convolved(
        images((2, 3, 40, 37), dtype, where), images((3, 1, 3, 3), dtype, where), 1, 1, 1, 3
    ),
    "conv2d_narrow_groups": lambda dtype, where: convolved(
        images((2, 4, 28, 24), dtype, where), images((8, 2, 3, 3), dtype, where), 1, 1, 1, 2
    ),
    "conv2d_many_pixels": lambda dtype, where: convolved(
        images((2, 1, 61, 67), dtype, where), images((2, 1, 2, 2), dtype, where), 1, 0, 1, 1
    ),
    "conv2d_relu_max_pool2d": lambda dtype, where: fused(
        images((5, 3, 11, 12), dtype, where), images((6, 3, 5, 5), dtype, where), POOL
    ),
    "max_pool2d": lambda dtype, where: pooled(images((3, 5, 15, 17), dtype, where), POOL),
    "max_pool2d_wide": lambda dtype, where: pooled(images((2, 3, 25, 31), dtype, where), WIDE_POOL),
}


@pytest.mark.parametrize("where", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_same_bits_in_every_order_of_threads_and_blocks(case, dtype, where):
    expected = None
    for order in (emulated.FORWARD, emulated.REVERSE, emulated.SHUFFLED, emulated.SHUFFLED):
        torch.manual_seed(0)
        with emulated.kernels(order):
            results = CASES[case](dtype, where)
        bits = [t.contiguous().view(torch.uint8) for t in results]
        expected = expected or bits
        for i, (actual, first) in enumerate(zip(bits, expected, strict=True)):
            assert torch.equal(actual, first), f"result {i} differs in order {order}"


# Input, weight and options of convolutions for which different algorithms are chosen; see cuda/conv2d.cu.
WAYS = {
    "product, 16 bytes at a time": ((2, 24, 7, 6), (40, 24, 3, 3), {"padding": 1}),
    "product, rows of images in several tiles": ((1, 8, 14, 13), (33, 8, 2, 3), {"stride": (2, 1), "dilation": 2}),
    "product, elements one by one": ((2, 9, 6, 7), (35, 9, 3, 3), {"padding": 2, "stride": 2}),
    "product of one tap": ((3, 40, 5, 5), (48, 40, 1, 1), {}),
    "few channels, two chunks of outputs": ((2, 6, 9, 10), (9, 6, 5, 5), {"padding": 2}),
    "few channels, padding as wide as the kernel": ((2, 3, 4, 5), (5, 3, 3, 3), {"padding": 3}),
    "few channels, many of them": ((1, 16, 6, 6), (32, 16, 3, 3), {"padding": 1}),
    "depthwise": ((2, 16, 9, 7), (16, 1, 3, 3), {"padding": 1, "groups": 16}),
    "depthwise, channels that fill no 16 bytes": (
        (2, 5, 10, 9),
        (5, 1, 5, 5),
        {"padding": 2, "stride": 2, "groups": 5},
    ),
    "depthwise, every second pixel": ((2, 8, 11, 10), (8, 1, 3, 3), {"padding": (0, 1), "stride": 2, "groups": 8}),
    "depthwise, padding as wide as the kernel": ((1, 8, 3, 4), (8, 1, 5, 5), {"padding": 5, "groups": 8}),
    "depthwise, largest kernel": ((1, 8, 10, 9), (8, 1, 7, 7), {"padding": 3, "groups": 8}),
    "depthwise, largest kernel, every second pixel": (
        (1, 8, 13, 9),
        (8, 1, 7, 7),
        {"padding": 3, "stride": 2, "groups": 8},
    ),
    "depthwise, any window": (
        (2, 8, 9, 10),
        (8, 1, 3, 4),
        {"stride": (2, 1), "dilation": (1, 2), "padding": (1, 2), "groups": 8},
    ),
    "narrow groups, 4 channels at a time": ((2, 32, 7, 6), (24, 4, 3, 3), {"padding": 1, "groups": 8}),
    "narrow groups, channels one by one": ((2, 9, 7, 6), (27, 3, 3, 3), {"padding": 1, "stride": 2, "groups": 3}),
    "narrow groups, any window": ((1, 16, 9, 8), (32, 8, 3, 2), {"dilation": 2, "padding": (1, 2), "groups": 2}),
    "narrow groups, long sums": ((1, 34, 6, 5), (10, 17, 3, 3), {"padding": 1, "groups": 2}),
    "narrow groups, one lane": ((2, 32, 6, 5), (64, 16, 3, 3), {"padding": 1, "groups": 2}),
    "narrow groups, many channels": ((1, 116, 5, 4), (4, 58, 3, 3), {"padding": 1, "groups": 2}),
    "groups, a large kernel": ((1, 4, 4, 4), (4, 2, 33, 33), {"padding": 16, "groups": 2}),
    "depthwise, offsets of 64 bits": ((2, 11, 24, 24), (11, 1, 3, 3), {"padding": 1, "groups": 11}),
    "offsets of 64 bits": ((2, 40, 12, 12), (40, 40, 3, 3), {"padding": 1}),
}


@pytest.mark.parametrize("where", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_a_convolution(way, dtype, where):
    input, weight, options = WAYS[way]
    tensors = [images(input, dtype, where), images(weight, dtype, where), random(weight[:1], dtype)]
    with emulated.kernels():
        oracle.check("conv2d", tensors, options, grad=where)


# The large kernel is left out, because with it every pixel meets every infinity.
WITH_BORDERS = [way for way in WAYS if "padding" in WAYS[way][2] and "large kernel" not in way]


@pytest.mark.parametrize("where", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WITH_BORDERS)
def test_infinities_at_the_border_in_every_way(way, dtype, where):
    """Other tests compare the CPU kernels with sums over the inside taps; here both must agree on what is finite."""
    input, weight, options = WAYS[way]
    x, w = images(input, dtype, where), images(weight, dtype, where)
    w[0, 0, 0, 0], w[1, -1, -1, -1], w[2, 0, 1, 1] = math.inf, -math.inf, math.nan
    x[0, 0, 0, 0], x[-1, -1, -1, -1] = math.inf, -math.inf

    def run():
        return oracle.gradients(lambda *t: pyops.functional.conv2d(*t, **options), [x, w], grad), output()

    def output():
        return pyops.functional.conv2d(x, w, **options)

    grad = random(output().shape, dtype, where)
    grad[0, 0, 0, 0], grad[-1, -1, -1, -1] = math.inf, math.nan
    (expected_x, expected_w), expected = run()
    with emulated.kernels():
        (actual_x, actual_w), actual = run()
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for a, e in ((actual, expected), (actual_x, expected_x), (actual_w, expected_w)):
        assert not e.isfinite().all() and e.isfinite().any()
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance, equal_nan=True)


@given(st.data())
def test_few_channels_of_any_size(data):
    kernel = data.draw(st.sampled_from([3, 5]))
    channels, outputs = data.draw(st.integers(1, 17)), data.draw(st.integers(1, 33))
    padding = [data.draw(st.integers(0, kernel)) for _ in range(2)]
    size = [data.draw(st.integers(max(1, kernel - 2 * p), 12)) for p in padding]
    dtype, where = data.draw(st.sampled_from(FLOATING)), data.draw(st.sampled_from(["contiguous", "channels_last"]))
    shapes = (data.draw(st.integers(1, 3)), channels, *size), (outputs, channels, kernel, kernel)
    tensors = [images(shape, dtype, where) for shape in shapes]
    with emulated.kernels():
        oracle.check("conv2d", [*tensors, random((outputs,), dtype)], {"padding": padding}, where)


# These are shapes for which the kernels take 16 bytes or two elements at a time, and others.
POOLINGS = {
    "non-overlapping": ((2, 16, 6, 16), {"kernel_size": 2}),
    "non-overlapping, two columns at a time": ((1, 3, 4, 10), {"kernel_size": 2}),
    "non-overlapping, 3x3": ((1, 16, 6, 9), {"kernel_size": 3}),
    "half a window at the end": ((1, 32, 5, 16), {"kernel_size": 2, "ceil_mode": True}),
    "a row that is in no window": ((1, 16, 7, 16), {"kernel_size": 2}),
    "overlapping": ((2, 32, 7, 8), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "dilated": ((1, 16, 9, 8), {"kernel_size": 2, "stride": 1, "dilation": 2}),
}


def shifted(where, rank):
    """That layout, starting one element after an aligned address."""
    return layout(where, rank)._replace(offset=1)


@pytest.mark.parametrize("where", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATING + INTEGER, ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_of_neighbours(pooling, dtype, where):
    size, options = POOLINGS[pooling]
    for into in (where, shifted(where, 4)):
        with emulated.kernels():
            check_max_pool2d(with_ties(size, dtype, into), into, **options)


def test_pooling_backward_by_an_argmax_that_is_not_aligned():
    argmax = torch.randint(4, (1, 16, 4, 8), dtype=torch.uint8)
    grad = random(argmax.shape)
    for where in ("contiguous", "channels_last"):
        expected = torch.ops.pyops.max_pool2d_backward(place(grad, where), place(argmax, where), (8, 16), 2)
        with emulated.kernels():
            for a, g in ((argmax, grad), (place(argmax, shifted(where, 4)), place(grad, where))):
                assert torch.equal(torch.ops.pyops.max_pool2d_backward(g, a, (8, 16), 2), expected)


@pytest.mark.parametrize("dtype", FLOATING + INTEGER, ids=str)
def test_relu_of_slices_that_are_not_aligned(dtype):
    for size in (1, 7, 64, 1003):
        values = with_ties((size,), dtype)
        expected, gate = torch.relu(values), ~(torch.relu(values) <= 0)
        grad = random((size,), dtype)
        passed = torch.where(gate, grad, torch.zeros_like(grad))
        for input in (values, place(values, shifted("contiguous", 1))):
            with emulated.kernels():
                output = pyops.functional.relu(input)
                oracle.assert_identical("output", output, expected)
                outputs = place(output, shifted("contiguous", 1))
                for g in (grad, place(grad, shifted("contiguous", 1))):
                    oracle.assert_identical("gradient", torch.ops.pyops.relu_backward(g, outputs), passed)
                    if dtype.is_floating_point:
                        _, mask = torch.ops.pyops.relu_with_mask(input)
                        actual = torch.ops.pyops.relu_mask_backward(g, mask, (1,))
                        oracle.assert_identical("gradient by the mask", actual, passed)


@pytest.mark.parametrize("where", ["contiguous", "channels_last"])
@pytest.mark.parametrize("way", ["depthwise", "narrow groups, 4 channels at a time"])
def test_convolutions_in_groups_of_slices_that_are_not_aligned(way, where):
    input, weight, options = WAYS[way]
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [random(size, dtype, shifted(where, 4)) for size in (input, weight)]
        with emulated.kernels():
            oracle.check("conv2d", tensors, options, grad=shifted(where, 4))


@pytest.mark.parametrize("offsets", [20_000, 2**30], ids=["wide offsets", "narrow offsets"])
@pytest.mark.parametrize("batch", [65535, 65536, 65537])
def test_batches_around_the_limits_of_a_grid(batch, offsets):
    """Two dimensions of a grid are limited to 65535 blocks."""
    x, w, b = random((batch, 1, 2, 2)), random((2, 1, 2, 2)), random((2,))

    def run():
        y = pyops.functional.conv2d_relu_max_pool2d(x, w, b, padding=1, pool_kernel_size=2)
        grouped = pyops.functional.conv2d(y.view(-1, 2, 1, 1), w[..., :1, :1], groups=2)
        z = pyops.functional.linear(pyops.functional.relu(y).flatten(1), w.view(2, 4)[:, :2])
        return [y, z, grouped, *torch.autograd.grad(z[-3:].sum() + grouped[-3:].sum(), [w, b])]

    w.requires_grad_(), b.requires_grad_()
    expected = run()
    with emulated.kernels(largest_32_bit_offset=offsets):
        actual = run()
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("fused", [False, True], ids=["layers", "fused"])
@pytest.mark.parametrize("kernel_size", [5, 3])
def test_training_steps_of_lenet(kernel_size, fused, memory_format):
    """Three training steps give the parameters that the CPU kernels give."""

    def train(dtype):
        torch.manual_seed(0)
        net = pyops.LeNet(kernel_size, fused=fused).to(dtype)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        inputs, labels = torch.randn(3, 8, 1, 32, 32, dtype=dtype), torch.randint(10, (3, 8))
        for x, y in zip(inputs, labels, strict=True):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x.contiguous(memory_format=memory_format)), y).backward()
            optimizer.step()
        return net.state_dict()

    for dtype, tolerance in {torch.float64: 1e-12, torch.float32: 2e-5}.items():
        expected = train(dtype)
        with emulated.kernels():
            actual = train(dtype)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
