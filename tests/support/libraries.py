"""Stock torch and pyops as libraries that one program can run on, and the comparison of its two runs."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

import pyops


class MyReLU(torch.autograd.Function):
    """The fifth tutorial's own ReLU, on stock operations."""

    @staticmethod
    def forward(ctx, input):
        ctx.save_for_backward(input)
        return input.clamp(min=0)

    @staticmethod
    def backward(ctx, grad_output):
        (input,) = ctx.saved_tensors
        grad_input = grad_output.clone()
        grad_input[input < 0] = 0
        return grad_input


class Library(NamedTuple):
    """The library that a program runs on."""

    nn: ModuleType
    F: ModuleType
    MyReLU: type[torch.autograd.Function]
    matmul: Callable[[Any, Any], Any]  # multiplies two matrices
    relu: Callable[[Any], Any]


STOCK = Library(
    nn,
    nn.functional,
    MyReLU,
    lambda a, b: a @ b,
    lambda a: a.clip(min=0),
)
PYOPS = Library(
    pyops.nn,
    pyops.functional,
    pyops.autograd.ReLU,
    lambda a, b: pyops.functional.linear(a, b.T),
    pyops.functional.relu,
)
Trace = Iterator[tuple[str, Any]]


def assert_same_trace(program: Callable[[Library], Trace], seed: int = 0) -> dict[str, Any]:
    """Runs ``program`` on both libraries from the same seed, compares, and returns the values that pyops gave."""
    traces = []
    for library in (STOCK, PYOPS):
        torch.manual_seed(seed)
        traces.append(list(program(library)))
    for (stock_name, stock), (name, ours) in zip(*traces, strict=True):
        assert name == stock_name
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, stock, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert ours == stock, name
    trace = dict(traces[1])
    assert len(trace) == len(traces[1])
    return trace
