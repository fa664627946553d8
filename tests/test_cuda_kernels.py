"""What is particular to the CUDA kernels, on the emulator: any order of threads, large batches, whole training steps.

That they compute what the CPU kernels do is tested by the files of the ops.
"""

import emulated
import pytest
import torch
from tensors import FLOATING, place, random
from test_threads import POOL, WIDE_POOL, convolved, fused, multiplied, pooled, rectified

import pyops

pytestmark = emulated.needed


def images(size, dtype, where):
    return place(random(size, dtype), where)


# With sums of several parts, several tiles, and tiles and warps that are not full.
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


@pytest.mark.parametrize("batch", [65535, 65536, 65537])
def test_batches_around_the_limits_of_a_grid(batch):
    """Two dimensions of a grid end at 65535."""
    x, w, b = random((batch, 1, 2, 2)), random((2, 1, 2, 2)), random((2,))

    def run():
        y = pyops.functional.conv2d_relu_max_pool2d(x, w, b, padding=1, pool_kernel_size=2)
        z = pyops.functional.linear(pyops.functional.relu(y).flatten(1), w.view(2, 4)[:, :2])
        return [y, z, *torch.autograd.grad(z[-3:].sum(), [w, b])]

    w.requires_grad_(), b.requires_grad_()
    expected = run()
    with emulated.kernels():
        actual = run()
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("fused", [False, True], ids=["layers", "fused"])
@pytest.mark.parametrize("kernel_size", [5, 3])
def test_training_steps_of_lenet(kernel_size, fused, memory_format):
    """Three steps give the parameters that the CPU kernels give."""

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
