"""Pairs each function of pyops.functional with its counterpart in torch, and each layer and network likewise."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

import pyops
from pyops import functional as F
from pyops.lenet import StockLeNet
from pyops.testing import gradcheck_input

S = torch.nn.functional


class Twin(NamedTuple):
    """Two functions of the same tensors."""

    ours: Callable[..., torch.Tensor]
    stock: Callable[..., torch.Tensor]
    shapes: tuple[tuple[int, ...], ...]  # the shapes of the tensors, for one sample or a batch

    def tensors(self, dtype: torch.dtype = torch.float64, *leading: int) -> list[torch.Tensor]:
        """Random tensors in which no two values are equal; `leading` dimensions are put in front of each."""
        return [gradcheck_input(*leading, *shape).detach().to(dtype) * 2 for shape in self.shapes]


CONV = ((2, 2, 5, 4), (3, 2, 3, 3), (3,))


def stock_pooled(*tensors: torch.Tensor) -> torch.Tensor:
    return S.max_pool2d(S.relu(S.conv2d(*tensors, padding=1)), 2)


TWINS = {
    "relu": Twin(F.relu, S.relu, ((3, 4),)),
    "relu_in_place": Twin(lambda x: F.relu(x * 1, inplace=True), lambda x: S.relu(x * 1, inplace=True), ((3, 4),)),
    "linear": Twin(F.linear, S.linear, ((3, 4), (5, 4), (5,))),
    "linear_no_bias": Twin(F.linear, S.linear, ((4,), (5, 4))),
    "conv2d": Twin(partial(F.conv2d, stride=2, padding=1), partial(S.conv2d, stride=2, padding=1), CONV),
    "conv2d_grouped": Twin(partial(F.conv2d, groups=2), partial(S.conv2d, groups=2), ((2, 4, 4, 5), (4, 2, 3, 2))),
    "max_pool2d": Twin(lambda x: F.max_pool2d(x, 3, 2, 1), lambda x: S.max_pool2d(x, 3, 2, 1), ((2, 2, 5, 4),)),
    "max_pool2d_with_indices": Twin(
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0], lambda x: S.max_pool2d(x, 2), ((2, 5, 4),)
    ),
    "linear_relu": Twin(F.linear_relu, lambda *t: S.relu(S.linear(*t)), ((3, 4), (5, 4), (5,))),
    "conv2d_relu": Twin(partial(F.conv2d_relu, padding=1), lambda *t: S.relu(S.conv2d(*t, padding=1)), CONV),
    "conv2d_relu_max_pool2d": Twin(
        partial(F.conv2d_relu_max_pool2d, padding=1, pool_kernel_size=2), stock_pooled, CONV
    ),
}


def squares(function):
    """A scalar whose derivatives depend on everything."""
    return lambda *tensors: function(*tensors).square().sum()


def all_of(tensors):
    """The argnums of all tensors."""
    return tuple(range(len(tensors)))


def tangents(tensors):
    """Directions for forward mode."""
    return tuple(t.cos() for t in tensors)


def lenets(fused: bool = False, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """Our LeNet and stock's, with equal parameters."""
    stock = StockLeNet().to(dtype)
    ours = pyops.LeNet(fused=fused).to(dtype)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def training_pass(net: Callable[..., torch.Tensor], module: nn.Module, *inputs: torch.Tensor) -> list[Any]:
    """The output, and the gradients of the inputs and of the parameters of `module`, which `net` runs."""
    module.zero_grad()
    inputs = tuple(each.detach().requires_grad_() for each in inputs)
    output = net(*inputs)
    output.backward(torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).reshape(output.shape))
    return [output.detach(), *(each.grad for each in (*inputs, *module.parameters()))]
