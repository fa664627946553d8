"""linear_batched: linear of several samples, each with a weight of its own. vmap turns linear into this op."""

from typing import Any

import torch

from pyops.autograd._bilinear import Bilinear, BilinearBackward, MaybeTensor
from pyops.autograd._function import Dims, OpFunction, batch_first, dims_of, implements


def vmap_samples(function: type[OpFunction], info: Any, in_dims: Dims, args: tuple[Any, ...]) -> tuple[Any, Any]:
    """The batching rule of these ops: the vmapped dimension and the samples become one dimension of samples."""
    size = info.batch_size
    tensors = [batch_first(t, d, size) for t, d in zip(args[:3], in_dims, strict=False)]
    outputs = function.call(*(None if t is None else t.flatten(0, 1) for t in tensors), *args[3:])
    if isinstance(outputs, torch.Tensor):
        return outputs.unflatten(0, (size, -1)), 0
    outputs = tuple(None if output is None else output.unflatten(0, (size, -1)) for output in outputs)
    return outputs, dims_of(outputs)


@implements("linear_batched_backward")
class LinearBatchedBackward(BilinearBackward):
    """``(grad_output, input, weight, output_mask)`` -> the gradients of input, weight and bias that the mask asks for,
    each with the dimension of samples in front."""

    @staticmethod
    def forward(grad_output: torch.Tensor, *args: Any) -> tuple[MaybeTensor, ...]:
        return torch.ops.pyops.linear_batched_backward.default(grad_output, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        LinearBatchedBackward.save(ctx, inputs)
        LinearBatchedBackward.mark_constants(ctx, output)

    @staticmethod
    def backward(ctx: Any, *grads: MaybeTensor) -> tuple[MaybeTensor, ...]:
        return LinearBatchedBackward.pull_back(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: MaybeTensor) -> tuple[MaybeTensor, ...]:
        return LinearBatchedBackward.push_forward(ctx, *tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Any, Any]:
        return vmap_samples(LinearBatchedBackward, info, in_dims, args)

    @staticmethod
    def fake(
        grad_output: torch.Tensor, input: MaybeTensor, weight: MaybeTensor, output_mask: list[bool]
    ) -> tuple[MaybeTensor, ...]:
        samples, out_features = grad_output.shape[0], grad_output.shape[-1]
        return (
            grad_output.new_empty((*grad_output.shape[:-1], weight.shape[2])) if output_mask[0] else None,
            grad_output.new_empty((samples, out_features, input.shape[-1])) if output_mask[1] else None,
            grad_output.new_empty((samples, out_features)) if output_mask[2] else None,
        )

    @classmethod
    def broadcast_bias(cls, bias: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        rows = [1] * (like.dim() - 2)
        return bias.reshape(bias.shape[0], *rows, bias.shape[1]).expand_as(like)


@implements("linear_batched")
class LinearBatched(Bilinear):
    """``LinearBatched.apply(input, weight, bias=None)``: input [samples, *, in_features], weight [samples,
    out_features, in_features], bias [samples, out_features] -> [samples, *, out_features]. The result of each sample is
    that of :class:`Linear`.

    >>> LinearBatched.apply(torch.ones(5, 2, 3), torch.ones(5, 4, 3), torch.zeros(5, 4)).shape
    torch.Size([5, 2, 4])
    """

    backward_call = LinearBatchedBackward.call

    @staticmethod
    def forward(input: torch.Tensor, weight: torch.Tensor, bias: MaybeTensor = None) -> torch.Tensor:
        return torch.ops.pyops.linear_batched.default(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        LinearBatched.save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: MaybeTensor) -> tuple[MaybeTensor, ...]:
        return LinearBatched.pull_back(ctx, grad_output)

    @staticmethod
    def jvp(ctx: Any, *tangents: MaybeTensor) -> MaybeTensor:
        return LinearBatched.push_forward(ctx, *tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[torch.Tensor, int]:
        return vmap_samples(LinearBatched, info, in_dims, args)

    @staticmethod
    def fake(input: torch.Tensor, weight: torch.Tensor, bias: MaybeTensor = None) -> torch.Tensor:
        return input.new_empty((*input.shape[:-1], weight.shape[1]))


LinearBatchedBackward.forward_op = LinearBatched
