"""linear: output = input weight^T + bias, and its gradients."""

from typing import Any

import torch

from pyops.autograd._bilinear import Bilinear, BilinearBackward, MaybeTensor
from pyops.autograd._function import Dims, batch_first, dims_of, implements, merge, split
from pyops.autograd.linear_batched import LinearBatched, LinearBatchedBackward


@implements("linear_backward")
class LinearBackward(BilinearBackward):
    """``(grad_output, input, weight, output_mask)`` -> the gradients of input, weight and bias that the mask asks for.

    grad_input = grad_output weight, grad_weight = grad_output^T input, and grad_bias is the sum of grad_output's rows.
    """

    @staticmethod
    def forward(grad_output: torch.Tensor, *args: Any) -> tuple[MaybeTensor, ...]:
        return torch.ops.pyops.linear_backward.default(grad_output, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        LinearBackward.save(ctx, inputs)
        LinearBackward.mark_constants(ctx, output)

    @staticmethod
    def backward(ctx: Any, *grads: MaybeTensor) -> tuple[MaybeTensor, ...]:
        return LinearBackward.pull_back(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: MaybeTensor) -> tuple[MaybeTensor, ...]:
        return LinearBackward.push_forward(ctx, *tangents)

    @staticmethod
    def vmap(
        info: Any, in_dims: Dims, grad_output: torch.Tensor, input: MaybeTensor, weight: MaybeTensor, mask: list[bool]
    ) -> tuple[Any, Any]:
        """If all samples share the weight, the gradient of input is one product whose rows are those of all samples. If
        they share the input, the gradients of their weights and biases are those of one weight with more output
        features. Otherwise each sample is a product of its own (`LinearBatchedBackward`)."""
        size, (by_grad_output, by_input, by_weight, _) = info.batch_size, in_dims
        want_input, want_weight, want_bias = mask
        grads: list[MaybeTensor] = [None, None, None]
        g = batch_first(grad_output, by_grad_output, size)
        if want_input and by_weight is None:
            grads[0] = LinearBackward.call(g, None, weight, [True, False, False])[0]
            want_input = False
        if by_input is None and not want_input and (want_weight or want_bias):
            _, *rest = LinearBackward.call(merge(g, -1), input, None, [False, want_weight, want_bias])
            grads[1:] = split(rest[0], -2, size), split(rest[1], -1, size)
        elif want_input or want_weight or want_bias:
            x, w = batch_first(input, by_input, size), batch_first(weight, by_weight, size)
            rest = LinearBatchedBackward.call(g, x, w, [want_input, want_weight, want_bias])
            grads = [a if b is None else b for a, b in zip(grads, rest, strict=True)]
        return tuple(grads), dims_of(grads)

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

    Saved for backward: input if weight needs a gradient, weight if input needs one.

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
    def vmap(
        info: Any, in_dims: Dims, input: torch.Tensor, weight: torch.Tensor, bias: MaybeTensor
    ) -> tuple[torch.Tensor, int]:
        """If all samples share weight and bias, they are more rows of one input. If they share the input, their weights
        become one weight with more output features. Otherwise each sample is a product of its own. The result is stored
        sample by sample, so that tangents have its layout, whichever rule computes them (see `dense` in _images.py)."""
        if in_dims[1] is None and in_dims[2] is None:
            return Linear.call(input.movedim(in_dims[0], 0), weight, bias), 0
        size, (by_input, *_) = info.batch_size, in_dims
        w, b = (batch_first(t, d, size) for t, d in zip((weight, bias), in_dims[1:], strict=True))
        if by_input is None:
            return split(Linear.call(input, merge(w, -2), merge(b, -1)), -1, size).contiguous(), 0
        return LinearBatched.call(input.movedim(by_input, 0), w, b), 0

    @staticmethod
    def fake(input: torch.Tensor, weight: torch.Tensor, bias: MaybeTensor = None) -> torch.Tensor:
        return input.new_empty((*input.shape[:-1], weight.shape[0]))


LinearBackward.forward_op = Linear
