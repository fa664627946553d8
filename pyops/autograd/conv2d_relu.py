"""conv2d_relu: the rectified output of a convolution, in one pass."""

from typing import Any

import torch

from pyops.autograd._bilinear import MaybeTensor
from pyops.autograd._function import Dims, composition, implements, primals
from pyops.autograd.conv2d import Conv2d, Conv2dBackward, vmap_images
from pyops.autograd.relu import ReLUBackward


def _backward_vmap(info: Any, in_dims: Dims, grad_output: torch.Tensor, output: torch.Tensor, *rest: Any) -> Any:
    grad_conv, dim = ReLUBackward.vmap(info, in_dims[:2], grad_output, output)
    return Conv2dBackward.vmap(info, (dim, *in_dims[2:]), grad_conv, *rest)


def _backward_fake(grad_output: torch.Tensor, output: torch.Tensor, *rest: Any) -> tuple[MaybeTensor, ...]:
    return Conv2dBackward.fake(ReLUBackward.fake(grad_output, output), *rest)


@composition("conv2d_relu_backward", _backward_fake, _backward_vmap)
def conv2d_relu_backward(grad_output: torch.Tensor, output: torch.Tensor, *rest: Any) -> tuple[MaybeTensor, ...]:
    """``(grad_output, output, *rest)``, rest as in Conv2dBackward -> the gradients of input, weight and bias."""
    return Conv2dBackward.call(ReLUBackward.call(grad_output, output), *rest)


@implements("conv2d_relu")
class Conv2dReLU(Conv2d):
    """``Conv2dReLU.apply(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1)``:
    equal to ``ReLU.apply(Conv2d.apply(...))`` to the last bit.

    Saved for backward: the output, whose sign is the mask of the gradient, and what :class:`Conv2d` saves.

    >>> Conv2dReLU.apply(torch.ones(1, 1, 4, 4), -torch.ones(2, 1, 3, 3)).max()
    tensor(0.)
    """

    backward_call = conv2d_relu_backward

    @staticmethod
    def forward(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: MaybeTensor = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> torch.Tensor:
        return torch.ops.pyops.conv2d_relu.default(input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        Conv2dReLU.save(ctx, inputs, sizes=(inputs[0].shape, inputs[1].shape), kept=(output,))

    @staticmethod
    def backward(ctx: Any, grad_output: MaybeTensor) -> tuple[MaybeTensor, ...]:
        return Conv2dReLU.pull_back(ctx, grad_output)

    @staticmethod
    def jvp(ctx: Any, *tangents: MaybeTensor) -> MaybeTensor:
        return ReLUBackward.call(Conv2d.push_forward(ctx, *tangents), primals(ctx)[0])

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[torch.Tensor, int]:
        return vmap_images(Conv2dReLU.call, info, in_dims, args)
