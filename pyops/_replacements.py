"""Which of torch's functions pyops can replace, and for which tensors. `patch` and the Dynamo backend share this."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from pyops import _load, functional

__all__ = ["replacement", "takes"]

FLOATING = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
REAL = FLOATING | {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
DEVICES = {"cpu"} if _load.build_info.cuda is None else {"cpu", "cuda"}


def relu_(input: Tensor) -> Tensor:
    return functional.relu(input, inplace=True)


def max_pool2d_with_indices(
    input: Tensor,
    kernel_size: functional.Ints,
    stride: functional.Ints | None = None,
    padding: functional.Ints = 0,
    dilation: functional.Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = True,  # ignored, as in stock torch
) -> Any:
    return functional.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)


F = torch.nn.functional
# Maps each stock function to ours, which takes the same arguments, and to the dtypes that ours has kernels for.
_REPLACEMENTS: dict[Callable[..., Any], tuple[Callable[..., Any], frozenset[torch.dtype]]] = {
    F.relu: (functional.relu, REAL),
    torch.relu: (functional.relu, REAL),
    Tensor.relu: (functional.relu, REAL),
    torch.relu_: (relu_, REAL),  # also F.relu_
    Tensor.relu_: (relu_, REAL),
    F.linear: (functional.linear, FLOATING),
    torch.conv2d: (functional.conv2d, FLOATING),  # also F.conv2d
    F.max_pool2d: (functional.max_pool2d, REAL),
    torch.max_pool2d: (functional.max_pool2d, REAL),
    F.max_pool2d_with_indices: (max_pool2d_with_indices, REAL),
}


def replacement(stock: Callable[..., Any], arguments: Iterable[Any]) -> Callable[..., Any] | None:
    """Our function for a call of `stock` with these arguments; None if we have none, or no kernel for the arguments."""
    ours, dtypes = _REPLACEMENTS.get(stock, (None, frozenset()))
    return ours if ours is not None and takes(arguments, dtypes) else None


def takes(arguments: Iterable[Any], dtypes: frozenset[torch.dtype]) -> bool:
    """Whether every tensor among the arguments is plain and dense, and has a device and a dtype with kernels."""
    return all(
        type(each) in (Tensor, torch.nn.Parameter, FakeTensor)
        and each.device.type in DEVICES
        and each.dtype in dtypes
        and each.layout is torch.strided
        and not each.is_nested
        for each in arguments
        if isinstance(each, Tensor)
    )
