"""Means to test with: inputs on which numerical differentiation can be trusted, and the choice of algorithms."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from pyops import _algorithms

__all__ = ["algorithms", "force_algorithm", "gradcheck_input"]

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


def algorithms() -> dict[str, list[str]]:
    """The names of the algorithms that the kernels choose between, for each op and direction.

    The ops are ``conv2d.forward``, ``conv2d.input_gradient``, ``max_pool2d.backward`` and so on; their algorithms are
    in order of preference. They depend on the instruction set of the CPU.

    >>> "implicit_gemm_channels" in algorithms()["conv2d.forward"]
    True
    """
    return {op: [row.name for row in rows] for op, rows in _algorithms.algorithms().items()}


def force_algorithm(op: str, name: str) -> AbstractContextManager[None]:
    """A context in which every call of ``op``, by any thread, is computed by the algorithm ``name``.

    If the CPU's kernels and the GPU's have different algorithms, this holds on the device that has ``name``.

    The environment variable ``PYOPS_ALGORITHM=conv2d.forward:batch_lanes``, or several such pairs with commas between
    them, does the same for a whole process. ``pyops info --algorithm`` tells which algorithms support a shape.

    Args:
        op: an op and its direction, a key of :func:`algorithms`.
        name: one of its algorithms. A call that it does not support raises a RuntimeError.

    Raises:
        ValueError: if there is no such op, or if it has no such algorithm.

    >>> input, weight = torch.randn(8, 3, 9, 9), torch.randn(6, 3, 3, 3)
    >>> with force_algorithm("conv2d.forward", "implicit_gemm_width"):
    ...     output = torch.ops.pyops.conv2d(input, weight)
    >>> torch.allclose(output, torch.nn.functional.conv2d(input, weight), atol=1e-5)
    True
    """
    return _algorithms.forced(op, name)
