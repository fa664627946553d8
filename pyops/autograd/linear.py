"""linear: output = input weight^T + bias, and its gradients."""

from typing import Any

import torch

from pyops.autograd._bilinear import Bilinear, BilinearBackward, MaybeTensor
from pyops.autograd._function import Dims, implements, vmap_by_loop


@implements("linear_backward")
class LinearBackward(BilinearBackward):
    """``(grad_output, input, weight, output_mask)`` -> the gradients of input, weight and bias that the mask asks for.

    grad_input = grad_output weight; grad_weight = grad_output^T input; grad_bias = the sum of grad_output's rows.
    """

    @staticmethod
    def forward(grad_output: torch.Tensor, *args: Any) -> tuple[MaybeTensor, ...]:
        return torch.ops.pyops.linear_backward.default(grad_output, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        LinearBackward.save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *grads: MaybeTensor) -> tuple[MaybeTensor, ...]:
        return LinearBackward.pull_back(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: MaybeTensor) -> tuple[MaybeTensor, ...]:
        return LinearBackward.push_forward(ctx, *tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Any, Any]:
        return vmap_by_loop(LinearBackward.call, info, in_dims, args)

    @staticmethod
    def fake(
        grad_output: torch.Tensor, input: MaybeTensor, weight: MaybeTensor, output_mask: list[bool]
    ) -> tuple[MaybeTensor, ...]:
        out_features = grad_output.shape[-1]
        return (
            grad_output.new_empty((*grad_output.shape[:-1], weight.shape[1])) if output_mask[0] else None,
            grad_output.new_empty((out_features, input.shape[-1])) if output_mask[1] else None,
            grad_output.new_empty((out_features,)) if output_mask[2] else None,
        )

    @classmethod
    def broadcast_bias(cls, bias: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return bias.expand_as(like)


@implements("linear")
class Linear(Bilinear):
    """``Linear.apply(input, weight, bias=None)``: input [*, in_features], weight [out_features, in_features], bias
    [out_features], of one floating dtype -> [*, out_features].

    Saved for backward: input if weight wants a gradient, weight if input does.

    >>> Linear.apply(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4)).shape
    torch.Size([2, 4])
    """

    backward_call = LinearBackward.call

    @staticmethod
    def forward(input: torch.Tensor, weight: torch.Tensor, bias: MaybeTensor = None) -> torch.Tensor:
        return torch.ops.pyops.linear.default(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        Linear.save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: MaybeTensor) -> tuple[MaybeTensor, ...]:
        return Linear.pull_back(ctx, grad_output)

    @staticmethod
    def jvp(ctx: Any, *tangents: MaybeTensor) -> MaybeTensor:
        return Linear.push_forward(ctx, *tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[torch.Tensor, int]:
        input, weight, bias = args
        if in_dims[1] is None and in_dims[2] is None:
            return Linear.call(input.movedim(in_dims[0], 0), weight, bias), 0
        return vmap_by_loop(Linear.call, info, in_dims, args)

    @staticmethod
    def fake(input: torch.Tensor, weight: torch.Tensor, bias: MaybeTensor = None) -> torch.Tensor:
        return input.new_empty((*input.shape[:-1], weight.shape[0]))


LinearBackward.forward_op = Linear
