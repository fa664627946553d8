"""Runs every op on tensors that end, or begin, at memory that must not be touched. It is a program of its own because
it may crash.

The operands adjoin pages that fault when they are read. The results are allocated by the ops themselves. The test that
runs this program enables the C library's checking allocator, which aborts if a result was written past its end.
"""

import ctypes
import mmap
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from tensors import FLOATING, place

import pyops  # noqa: F401

ops = torch.ops.pyops
libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
KEEP = []  # keeps the memory of the tensors alive


def guarded(values: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy whose last byte is directly before an inaccessible page, or whose first byte is directly after one."""
    pages = -(-values.nbytes // PAGE) + 2
    memory = mmap.mmap(-1, pages * PAGE)
    KEEP.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = (pages - 1) * PAGE - values.nbytes if at_end else PAGE
    flat = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset)
    copy = flat.as_strided(values.shape, values.stride())
    copy.copy_(values)
    for page in (0, pages - 1):  # protection 0 allows neither reads nor writes
        if libc.mprotect(ctypes.c_void_p(address + page * PAGE), PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    return copy


def run(dtype: torch.dtype, where: str, at_end: bool) -> None:
    def tensor(*shape):
        values = torch.randn(shape).mul(9).to(dtype)
        return guarded(place(values, where).clone(memory_format=torch.preserve_format), at_end)

    for width in (1, 15, 17, 67):
        x = tensor(2, 3, 5, width)
        output = ops.relu(x)
        ops.relu_backward(x, output)
        if dtype.is_floating_point:
            mask = guarded(ops.relu_with_mask(x)[1], at_end)
            ops.relu_mask_backward(x, mask, x.stride())
        ops.relu_(x)
        for window in ((1, 2), (2,), (3, 2, 1), (3, 1, 1), (2, 3, 1, 1, True), ((5, 60), 2, (2, 30))):
            pool_x = tensor(1, width, 6, 2 * width + 7)
            result, argmax = ops.max_pool2d(pool_x, *window)
            argmax = guarded(argmax, at_end)
            ops.max_pool2d_indices(argmax, pool_x.shape[-2:], *window)
            if dtype.is_floating_point:
                ops.max_pool2d_gather(pool_x, argmax, *window)
                ops.max_pool2d_backward(guarded(result, at_end), argmax, pool_x.shape[-2:], *window)
        if not dtype.is_floating_point:
            continue
        for rows in (1, 13):
            a, weight, bias = tensor(rows, width), tensor(width + 2, width), tensor(width + 2)
            result = guarded(ops.linear(a, weight, bias), at_end)
            ops.linear_backward(result, a, weight, [True, True, True])
            ops.linear_relu(a, weight, bias)
        planes, filters = tensor(17, 4, 5, min(width, 17)), tensor(3, 4, 5, 5)  # batch lanes
        result = guarded(ops.conv2d(planes, filters, None, 1, 2), at_end)
        ops.conv2d_backward(result, planes, filters, planes.shape, filters.shape, 1, 2, 1, 1, [True, True, True])
        fused = (planes, filters, None, 1, 2, 1, 1, 2, 2, 0, 1, True)
        ops.conv2d_relu_max_pool2d(*fused)
        pooled, codes = ops.conv2d_relu_max_pool2d_with_argmax(*fused)
        ops.conv2d_relu_max_pool2d_backward(
            *(guarded(pooled, at_end), guarded(codes, at_end), planes, filters, planes.shape, filters.shape),
            *(1, 2, 1, 1, 2, 2, 0, 1, True, [True, True, True]),
        )
        image, weight = tensor(2, width, 6, 19), tensor(width, 1, 3, 3)  # depthwise
        result = guarded(ops.conv2d_relu(image, weight, None, 1, 1, 1, width), at_end)
        ops.conv2d_backward(result, image, weight, image.shape, weight.shape, 1, 1, 1, width, [True, True, True])
        image, weight = tensor(2, 40, 3, width), tensor(40, 4, 3, 3)  # narrow groups
        result = guarded(ops.conv2d_relu(image, weight, tensor(40), 1, 1, 1, 10), at_end)
        ops.conv2d_backward(result, image, weight, image.shape, weight.shape, 1, 1, 1, 10, [True, True, True])
        for channels, groups, kernel, options in (
            (3, 1, 3, (1, 1, 1)),
            (4, 2, 3, (2, 0, 1)),
            (4, 4, 3, (1, 2, 2)),
            (20, 1, 3, (1, 1, 1)),
            (20, 1, 1, (2, 0, 1)),
        ):
            image, weight = tensor(2, channels, 6, width + 4), tensor(2 * channels, channels // groups, kernel, kernel)
            result = guarded(ops.conv2d(image, weight, tensor(2 * channels), *options, groups), at_end)
            sizes = (image.shape, weight.shape)
            ops.conv2d_backward(result, image, weight, *sizes, *options, groups, [True, True, True])
    KEEP.clear()


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(2)
    for dtype in (*FLOATING, torch.uint8, torch.int64):
        for where in ("contiguous", "channels_last"):
            for at_end in (True, False):
                run(dtype, where, at_end)
    print("unharmed")
