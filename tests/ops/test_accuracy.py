"""On every benchmarked shape, the error of the output and of each gradient is at most 1.5 times stock's.

Differences of a few float32 ulps do not count as errors, because any order of summing a hundred terms may happen to be
more accurate.
"""

from typing import NamedTuple

import pytest
import torch
from benched import DTYPES, Shape, every_shape

import pyops

ALLOWED = 1.5
NO_ERROR = 4 * torch.finfo(torch.float32).eps


class Error(NamedTuple):
    """The differences from the exact values, relative to the largest of these and to their root mean square."""

    largest: float
    rms: float


def error(actual: torch.Tensor, exact: torch.Tensor) -> Error:
    difference = actual.double() - exact
    return Error(
        (difference.abs().max() / exact.abs().max()).item(),
        (difference.square().mean() / exact.square().mean()).sqrt().item(),
    )


def errors(shape: Shape, dtype: torch.dtype) -> dict[str, tuple[Error, Error]]:
    """Our error and stock's for each result."""
    operands, grad = shape.operands(dtype), shape.grad_output(dtype)
    ours = shape.results(pyops.functional, operands, grad)
    stock = shape.results(torch.nn.functional, operands, grad)
    in_double = [operand if operand is None else operand.double() for operand in operands]
    exact = shape.results(torch.nn.functional, in_double, grad.double())
    return {name: (error(ours[name], exact[name]), error(stock[name], exact[name])) for name in exact}


@every_shape
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_most_stocks_error(dtype, shape):
    for name, (ours, stock) in errors(shape, dtype).items():
        for kind, actual, reference in zip(Error._fields, ours, stock, strict=True):
            allowed = max(ALLOWED * reference, NO_ERROR)
            assert actual <= allowed, f"{kind} error of {name}: {actual:.2e}, stock's {reference:.2e}"
