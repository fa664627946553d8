"""On every shape that is benchmarked the error is at most 1.5 times stock's, of the output and of each gradient.

Differences of a few float32 ulps are no error: whichever order a sum of a hundred terms is taken in may be the luckier.
"""

from typing import NamedTuple

import pytest
import torch
from benched import DTYPES, Shape, every_shape

import pyops

ALLOWED = 1.5
NO_ERROR = 4 * torch.finfo(torch.float32).eps


class Error(NamedTuple):
    """Differences from the exact values, relative to the largest of them and to their root mean square."""

    largest: float
    rms: float


def error(actual: torch.Tensor, exact: torch.Tensor) -> Error:
    difference = actual.double() - exact
    return Error(
        (difference.abs().max() / exact.abs().max()).item(),
        (difference.square().mean() / exact.square().mean()).sqrt().item(),
    )


def errors(shape: Shape, dtype: torch.dtype) -> dict[str, tuple[Error, Error]]:
    """Ours and stock's, of each result."""
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
