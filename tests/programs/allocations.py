"""Makes ten thousand calls of the kernels, with allocations.cpp preloaded, and prints the allocations as JSON."""

import ctypes
import gc
import json
import random
import resource
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from tensors import FLOATING, place

from pyops import _load

ops = torch.ops.pyops
counter = ctypes.CDLL(None)
CALLS = 10_000


def watch_kernels() -> None:
    """From now on, counts the allocations of the kernels of this instruction set, and no others."""
    name = f"_cpu_{_load.cpu_capability.lower()}."
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if name in line]
    addresses = [int(address, 16) for line in maps for address in line[0].split("-")]
    counter.watch(ctypes.c_void_p(min(addresses)), ctypes.c_void_p(max(addresses)))


def calls_of_random_shapes(count: int) -> list:
    """The forward and backward of every op, each as a function without arguments. Some calls use several threads."""

    def tensor(*shape):
        return place(torch.randn(shape).to(dtype), where)

    calls = []
    for _ in range(count):
        dtype, where = random.choice(FLOATING), random.choice(("contiguous", "channels_last"))
        N, C, out = (random.choice((1, 3, 8, 17)) for _ in range(3))
        H, W = random.randint(5, 19), random.randint(5, 19)
        groups = random.choice((1, C))
        conv, pool = (random.randint(1, 2), 1, 1, groups), (2, 2, 0, 1, False)
        image, weight, bias = tensor(N, C, H, W), tensor(groups * out, C // groups, 3, 3), tensor(groups * out)
        output = ops.conv2d(image, weight, bias, *conv)
        sizes = (image.shape, weight.shape)
        pooled, argmax = ops.max_pool2d(image, *pool)
        fused, winners = ops.conv2d_relu_max_pool2d_with_argmax(image, weight, bias, *conv, *pool)
        rows, matrix = tensor(N, H * W), tensor(C * out, H * W)
        product = ops.linear(rows, matrix, None)
        mask = [True] * 3
        calls += [
            lambda a=(image, weight, bias, *conv): ops.conv2d(*a),
            lambda a=(output, image, weight, *sizes, *conv, mask): ops.conv2d_backward(*a),
            lambda a=(image, *pool): ops.max_pool2d(*a),
            lambda a=(pooled, argmax, (H, W), *pool): ops.max_pool2d_backward(*a),
            lambda a=(image, weight, bias, *conv, *pool): ops.conv2d_relu_max_pool2d(*a),
            lambda a=(image, weight, bias, *conv, *pool): ops.conv2d_relu_max_pool2d_with_argmax(*a),
            lambda a=(fused, winners, image, weight, *sizes, *conv, *pool, mask): ops.conv2d_relu_max_pool2d_backward(
                *a
            ),
            lambda a=(rows, matrix): ops.linear_relu(*a, None),
            lambda a=(product, rows, matrix, mask): ops.linear_backward(*a),
            lambda a=(output,): ops.relu(*a),
            lambda a=(output, output): ops.relu_backward(*a),
            lambda a=output: ops.relu_mask_backward(a, ops.relu_with_mask(a)[1], a.stride()),
        ]
    return calls


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(2)
    watch_kernels()
    calls = calls_of_random_shapes(100)
    for call in calls:
        call()
    first, before = counter.allocations_so_far(), resident()
    for _ in range(CALLS):
        random.choice(calls)()
    later, growth = counter.allocations_so_far() - first, resident() - before
    print(json.dumps({"first": first, "later": later, "growth": growth}))


if __name__ == "__main__":
    main()
