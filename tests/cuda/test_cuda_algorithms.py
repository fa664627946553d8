"""Every algorithm of the CUDA kernels, forced, on shapes that it supports; the emulator runs them."""

import emulated
import oracle
import pytest
import torch
from geometries import operands
from oracle import check_max_pool2d
from tensors import random, with_ties

import pyops
from pyops import functional

pytestmark = emulated.needed

ALGORITHMS = {
    "gemm": ["flat_tiles", "narrow_tiles", "large_tiles", "small_tiles"],
    "conv2d.forward": ["direct_small", "implicit_gemm", "depthwise", "grouped", "direct"],
    "conv2d.input_gradient": ["direct_small", "implicit_gemm", "depthwise", "grouped", "direct"],
    "conv2d.weight_gradient": ["implicit_gemm", "grouped", "direct"],
    "conv2d_relu_max_pool2d.forward": ["direct_small", "direct", "two_kernels"],
    "max_pool2d.backward": ["tiles", "gather"],
}
CONVOLUTIONS = [  # shapes of input and weight, and options
    ((2, 3, 7, 6), (5, 3, 3, 3), {"padding": 1}),
    ((1, 4, 6, 9), (4, 4, 5, 5), {"padding": 2}),
    ((2, 5, 8, 7), (6, 5, 3, 2), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    ((2, 6, 7, 7), (6, 1, 3, 3), {"groups": 6, "padding": 1}),
    ((1, 8, 6, 7), (12, 4, 3, 3), {"groups": 2, "stride": 2}),
    ((2, 18, 5, 4), (21, 18, 1, 1), {}),
]
every_format = pytest.mark.parametrize("where", ["contiguous", "channels_last"])


def rows(*ops):
    pairs = [pytest.param(op, name, id=f"{op}:{name}") for op in ops for name in ALGORITHMS[op]]
    return pytest.mark.parametrize(("op", "name"), pairs)


def count_supported(op, name, checks):
    supported = 0
    with emulated.kernels(), pyops.testing.force_algorithm(op, name):
        for check in checks:
            try:
                check()
            except RuntimeError as error:
                assert "is forced, but it does not support this problem" in str(error)
            else:
                supported += 1
    return supported


def test_the_list_is_complete():
    with emulated.kernels():
        assert pyops.testing.algorithms() == ALGORITHMS


@every_format
@rows("conv2d.forward", "conv2d.input_gradient", "conv2d.weight_gradient")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_conv2d(dtype, op, name, where):
    def check(input_shape, weight_shape, options):
        oracle.check("conv2d", operands(input_shape, weight_shape, dtype, where), options, grad=where)

    assert count_supported(op, name, [lambda case=case: check(*case) for case in CONVOLUTIONS]) > 0


@rows("gemm")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gemm(dtype, op, name):
    def check(M, K, N):
        oracle.check("linear", [random((M, K), dtype), random((N, K), dtype), random((N,), dtype)])

    sizes = [(1, 7, 3), (5, 70, 33), (33, 17, 5), (70, 40, 130)]
    assert count_supported(op, name, [lambda size=size: check(*size) for size in sizes]) == len(sizes)


@every_format
@rows("max_pool2d.backward")
def test_max_pool2d(op, name, where):
    windows = [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": (2, 3)}]

    def check(window):
        check_max_pool2d(with_ties((2, 3, 8, 6), torch.float32, where), where, **window)

    assert count_supported(op, name, [lambda window=window: check(window) for window in windows]) > 0


@every_format
@rows("conv2d_relu_max_pool2d.forward")
def test_conv2d_relu_max_pool2d(op, name, where):
    """The results are those of the single ops, bit by bit."""

    def check(input_shape, weight_shape, options):
        tensors = operands(input_shape, weight_shape, torch.float32, where)
        between = functional.relu(functional.conv2d(*tensors, **options))
        fused = functional.conv2d_relu_max_pool2d(*tensors, **options, pool_kernel_size=2)
        assert torch.equal(fused, functional.max_pool2d(between, 2))

    # "direct" is for shapes whose convolution is direct, as it is in groups that are not narrow.
    wide_groups = ((1, 514, 4, 4), (2, 257, 2, 2), {"groups": 2})
    cases = [*CONVOLUTIONS, wide_groups]
    assert count_supported(op, name, [lambda case=case: check(*case) for case in cases]) > 0
