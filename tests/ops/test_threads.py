"""The number of threads changes only the time: every result has equal bits, in every run."""

import subprocess
import sys
from collections.abc import Callable
from itertools import product

import pytest
import torch
from benched import DTYPES, every_shape
from kernel_calls import CONV, POOL, WIDE_POOL, convolved, fused, images, multiplied, pooled, rectified
from tensors import FLOATING, INTEGER, random

from pyops import _load, functional

# Each case is large enough for seven threads, and its sizes are odd, so that the shares of the threads differ. If 49
# images are split into blocks, one block is left for two or three threads to share, for every number of lanes.
CASES = {
    "relu": lambda dtype, where: rectified(images((3, 11, 101, 151), dtype, where)),
    "linear": lambda dtype, where: multiplied(random((519, 131), dtype, where), random((203, 131), dtype, where)),
    "linear_long_sum": lambda dtype, where: multiplied(random((5003, 17), dtype, where), random((9, 17), dtype)),
    "conv2d": lambda dtype, where: convolved(
        images((9, 5, 31, 33), dtype, where), images((19, 5, 3, 3), dtype, where), *CONV
    ),
    "conv2d_one_image": lambda dtype, where: convolved(
        images((1, 3, 97, 89), dtype, where), images((7, 3, 5, 5), dtype, where), (2, 1), 2, 1, 1
    ),
    "conv2d_groups": lambda dtype, where: convolved(
        images((3, 12, 41, 43), dtype, where), images((24, 1, 3, 3), dtype, where), *CONV[:-1], 12
    ),
    "conv2d_narrow_groups": lambda dtype, where: convolved(
        images((3, 40, 41, 43), dtype, where), images((40, 4, 3, 3), dtype, where), *CONV[:-1], 10
    ),
    "conv2d_few_outputs": lambda dtype, where: convolved(  # direct 3-wide; weight gradient along the inputs
        images((3, 40, 33, 37), dtype, where), images((13, 40, 3, 3), dtype, where), *CONV
    ),
    "conv2d_small_planes": lambda dtype, where: convolved(  # batch lanes
        images((49, 7, 9, 10), dtype, where), images((5, 7, 5, 5), dtype, where), 1, 3, 1, 1
    ),
    "conv2d_by_taps": lambda dtype, where: convolved(
        images((13, 50, 9, 11), dtype, where), images((70, 50, 5, 5), dtype, where), 1, 0, 1, 1
    ),
    "conv2d_as_linear": lambda dtype, where: convolved(
        images((49, 17, 5, 5), dtype, where), images((131, 17, 5, 5), dtype, where), 1, 0, 1, 1
    ),
    "conv2d_few_channels": lambda dtype, where: convolved(  # gradients with batch lanes
        images((49, 7, 13, 14), dtype, where), images((5, 7, 5, 5), dtype, where), 1, 0, 1, 1
    ),
    "conv2d_relu_max_pool2d": lambda dtype, where: fused(
        images((49, 3, 29, 31), dtype, where), images((6, 3, 5, 5), dtype, where), POOL
    ),
    "conv2d_relu_max_pool2d_2x2": lambda dtype, where: fused(  # pooled in registers
        images((49, 3, 29, 31), dtype, where), images((6, 3, 5, 5), dtype, where), (2, 2, 0, 1, False), padding=0
    ),
    "conv2d_relu_max_pool2d_3x3": lambda dtype, where: fused(  # CHWN blocks
        images((49, 3, 29, 31), dtype, where), images((6, 3, 5, 5), dtype, where), (3, 3, 0, 1, False)
    ),
    "max_pool2d": lambda dtype, where: pooled(images((7, 11, 85, 91), dtype, where), POOL),
    "max_pool2d_wide": lambda dtype, where: pooled(images((3, 7, 45, 51), dtype, where), WIDE_POOL),
}
COMBINATIONS = [
    (case, dtype)
    for case, dtype in product(CASES, FLOATING + INTEGER)
    if dtype.is_floating_point or case.startswith(("relu", "max_pool2d"))
]


@pytest.mark.parametrize("where", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("case", "dtype"), COMBINATIONS, ids=str)
def test_same_bits(case, dtype, where):
    expected = None
    for threads in (1, 2, 2, 3, 7):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        results = CASES[case](dtype, where)
        bits = [t.clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in results]
        expected = expected or bits
        for i, (actual, first) in enumerate(zip(bits, expected, strict=True)):
            assert torch.equal(actual, first), f"result {i} differs with {threads} threads"


@every_shape
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_benched_shapes(dtype, shape):
    operands, grad = shape.operands(dtype), shape.grad_output(dtype)
    expected = None
    for threads in (1, 1, 2, 3, 7):
        torch.set_num_threads(threads)
        results = shape.results(functional, operands, grad)
        bits = {name: result.contiguous().view(torch.uint8) for name, result in results.items()}
        expected = expected or bits
        for name, actual in bits.items():
            assert torch.equal(actual, expected[name]), f"{name} differs with {threads} threads"


def simulated(call: Callable[[], object], threads: int):
    """The call's result, the seconds of its kernels, and the tasks and the seconds of each part of each region."""
    _load.cpu_module.simulate_threads(threads)
    try:
        return call(), *_load.cpu_module.simulated_regions()
    finally:
        _load.cpu_module.simulate_threads(0)


@pytest.mark.parametrize("where", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_same_bits_with_simulated_threads(case, dtype, where):
    """There are more of them than the machine may have."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    expected = CASES[case](dtype, where)
    for threads in (1, 5, 16, 64):
        torch.manual_seed(0)
        results, _, regions = simulated(lambda: CASES[case](dtype, where), threads)
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
        assert threads > 1 or regions == []


@pytest.mark.parametrize(
    ("blocks", "threads", "parts"), [(32, 4, 1), (33, 4, 2), (100, 4, 4), (288, 8, 8), (2049, 64, 63)]
)
def test_a_simulation_cuts_a_region_as_parallel_for_does(blocks, threads, parts):
    """relu forks for each 32 blocks of 1024 elements."""
    _, seconds, regions = simulated(lambda: functional.relu(torch.ones(1024 * blocks)), threads)
    assert [(tasks, len(times)) for tasks, times in regions] == ([(blocks, parts)] if parts > 1 else [])
    assert 0 < sum(sum(times) for _, times in regions) < seconds or parts == 1


def test_a_simulation_ends():
    simulated(lambda: functional.relu(torch.ones(1 << 20)), 4)
    functional.relu(torch.ones(1 << 20))
    assert _load.cpu_module.simulated_regions() == (0, [])


def test_every_op_forks():
    """Each op in turn may use one thread more than the pool has, which grows if the op really uses several threads."""
    program = """
import os, torch, pyops
ops = torch.ops.pyops
x, w, b = torch.randn(2000, 300), torch.randn(300, 300), torch.randn(300)
images, weight = torch.randn(16, 16, 64, 64), torch.randn(16, 16, 3, 3)
planes, kernels = torch.randn(16, 8, 20, 20), torch.randn(8, 8, 3, 3)
pool = (2, 2, 0, 1, False)
mask = ops.relu_with_mask(images)[1]
output, argmax = ops.max_pool2d(images.repeat(4, 1, 1, 1), *pool)
conv = (images.shape, weight.shape, 1, 1, 1, 1)
calls = {
    "relu": lambda: ops.relu(images),
    "relu_": lambda: ops.relu_(images),
    "relu_backward": lambda: ops.relu_backward(images, images),
    "relu_with_mask": lambda: ops.relu_with_mask(images),
    "relu_mask_backward": lambda: ops.relu_mask_backward(images, mask, images.stride()),
    "linear": lambda: ops.linear(x, w, b),
    "linear_backward, input": lambda: ops.linear_backward(x, x, w, [True, False, False]),
    "linear_backward, weight": lambda: ops.linear_backward(x, x, w, [False, True, False]),
    "conv2d": lambda: ops.conv2d(images, weight, None, 1, 1, 1, 1),
    "conv2d_backward, input": lambda: ops.conv2d_backward(images, images, weight, *conv, [True, False, False]),
    "conv2d_backward, weight": lambda: ops.conv2d_backward(images, images, weight, *conv, [False, True, False]),
    "conv2d, a block of images": lambda: ops.conv2d(planes, kernels, None, 1, 1, 1, 1),
    "conv2d_backward, a block of images": lambda: ops.conv2d_backward(
        torch.randn(16, 8, 18, 18), planes, kernels, planes.shape, kernels.shape, 1, 0, 1, 1, [True, True, False]
    ),
    "conv2d_relu_max_pool2d, a block of images": lambda: ops.conv2d_relu_max_pool2d(
        planes, kernels, None, 1, 1, 1, 1, *pool
    ),
    "max_pool2d": lambda: ops.max_pool2d(images, *pool),
    "max_pool2d_backward": lambda: ops.max_pool2d_backward(output, argmax, (64, 64), *pool),
    "max_pool2d_indices": lambda: ops.max_pool2d_indices(argmax, (64, 64), *pool),
}
for threads, (name, call) in enumerate(calls.items(), start=2):
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    call()
    if len(os.listdir("/proc/self/task")) <= before:
        print(name)
"""
    # The program starts with one thread, because code before the first call must not fill the pool.
    program = "import torch; torch.set_num_threads(1)" + program
    result = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n") == [""], "ops that ran on one thread"
