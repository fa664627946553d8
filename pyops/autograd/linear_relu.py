"""linear_relu: the rectified output of a linear layer, in one pass."""

from typing import Any

import torch

from pyops.autograd._bilinear import MaybeTensor
from pyops.autograd._function import Dims, composition, implements, primals
from pyops.autograd.linear import Linear, LinearBackward
from pyops.autograd.relu import ReLU, ReLUBackward


def _backward_vmap(info: Any, in_dims: Dims, grad_output: torch.Tensor, output: torch.Tensor, *rest: Any) -> Any:
    grad_linear, dim = ReLUBackward.vmap(info, in_dims[:2], grad_output, output)
    return LinearBackward.vmap(info, (dim, *in_dims[2:]), grad_linear, *rest)


def _backward_fake(grad_output: torch.Tensor, output: torch.Tensor, *rest: Any) -> tuple[MaybeTensor, ...]:
    return LinearBackward.fake(grad_output, *rest)


@composition("linear_relu_backward", _backward_fake, _backward_vmap)
def linear_relu_backward(grad_output: torch.Tensor, output: torch.Tensor, *rest: Any) -> tuple[MaybeTensor, ...]:
    """``(grad_output, output, input, weight, output_mask)`` -> the gradients of input, weight and bias."""
    return LinearBackward.call(ReLUBackward.call(grad_output, output), *rest)


@implements("linear_relu")
class LinearReLU(Linear):
    """``LinearReLU.apply(input, weight, bias=None)``: equal to ``ReLU.apply(Linear.apply(...))`` to the last bit.

    Saved for backward: the output, whose sign is the mask of the gradient, and what :class:`Linear` saves.

    >>> LinearReLU.apply(torch.ones(2, 3), -torch.ones(4, 3), torch.zeros(4)).max()
    tensor(0.)
    """

    backward_call = linear_relu_backward

    @staticmethod
    def forward(input: torch.Tensor, weight: torch.Tensor, bias: MaybeTensor = None) -> torch.Tensor:
        return torch.ops.pyops.linear_relu.default(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        LinearReLU.save(ctx, inputs, kept=(output,))

    @staticmethod
    def backward(ctx: Any, grad_output: MaybeTensor) -> tuple[MaybeTensor, ...]:
        return LinearReLU.pull_back(ctx, grad_output)

    @staticmethod
    def jvp(ctx: Any, *tangents: MaybeTensor) -> MaybeTensor:
        return ReLUBackward.call(Linear.push_forward(ctx, *tangents), primals(ctx)[0])

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[torch.Tensor, int]:
        output, dim = Linear.vmap(info, in_dims, *args)
        return ReLU.call(output), dim
