"""Inputs on which numerical differentiation of piecewise linear ops can be trusted."""

import torch
from torch import Tensor

__all__ = ["gradcheck_input"]

_SMALLEST_STEP = 1e-4  # 100 times gradcheck's default eps of 1e-6


def gradcheck_input(*size: int, device: torch.device | str | None = None) -> Tensor:
    """A random float64 leaf of shape ``size`` for :func:`torch.autograd.gradcheck` and ``gradgradcheck``.

    ReLU has a kink at 0, and max-pooling has one wherever two values of a window tie; a finite difference that steps
    over a kink is wrong even if the gradient is right. The values returned are evenly spaced and in random order. No
    two are less than 1e-4 apart and none is less than 5e-5 from 0, which is far more than gradcheck's ``eps`` of 1e-6.
    Up to 20,000 elements fill (-1, 1), more fill a wider interval. Layers in front of the kink move the values, so the
    guarantee holds for the op that takes this input first.

    Args:
        size: the shape, any number of dimensions.
        device: the device of the tensor; torch's default device if None.

    Returns:
        a float64 tensor of shape ``size`` that requires gradients, drawn with torch's global random generator.

    >>> x = gradcheck_input(2, 3, 4, 4)
    >>> torch.autograd.gradcheck(torch.relu, x)
    True
    """
    count = torch.Size(size).numel()
    steps = count + count % 2  # an even number of grid points, half of them on each side of 0
    step = max(2 / max(steps, 1), _SMALLEST_STEP)
    order = torch.randperm(count, device=device, dtype=torch.float64)
    return ((order + 0.5 - steps / 2) * step).reshape(size).requires_grad_()
