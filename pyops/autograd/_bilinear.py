"""The derivatives that linear and conv2d share: output = product(input, weight) + bias is bilinear in input and weight.

The gradients of such an op are bilinear too, each in two of (grad_output, input, weight), and the derivatives of one
are values of the others:

    d grad_input  = gradient by input  of the op at (d grad_output, weight), and at (grad_output, d weight)
    d grad_weight = gradient by weight of the op at (d grad_output, input),  and at (grad_output, d input)
    d output      = product(d input, weight) + product(input, d weight) + d bias

So every derivative, of any order, in reverse and in forward mode, is a sum of calls of the op and of its backward op.
This module states that once; linear.py and conv2d.py add their arguments, shapes and batching rules.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.autograd import forward_ad

from pyops.autograd._function import OpFunction, in_transform, primals

MaybeTensor = torch.Tensor | None


def add(*terms: MaybeTensor) -> MaybeTensor:
    """The sum of the terms that are not None, or None if all are."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], start=present[0]) if present else None


class Bilinear(OpFunction):
    """The op itself: ``op(input, weight, bias, *options)``."""

    backward_call: ClassVar[Callable[..., tuple[MaybeTensor, ...]]]

    @classmethod
    def save(
        cls, ctx: Any, inputs: tuple[Any, ...], sizes: tuple[Any, ...] = (), kept: tuple[torch.Tensor, ...] = ()
    ) -> None:
        """Implements `setup_context`. `sizes` are the sizes of input and weight for the backward op, because they may
        not be saved themselves. `kept` holds what a fused op saves besides: the arguments after grad_output."""
        input, weight, _, *ctx.options = inputs
        ctx.sizes = sizes
        ctx.set_materialize_grads(False)
        # The gradient of input needs weight, and that of weight needs input; a frozen operand saves nothing.
        by_input, by_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(*kept, input if by_weight else None, weight if by_input else None)
        ctx.save_for_forward(*kept, input, weight)

    @classmethod
    def pull_back(cls, ctx: Any, grad_output: MaybeTensor) -> tuple[MaybeTensor, ...]:
        """Implements `backward`."""
        grads: tuple[MaybeTensor, ...] = (None, None, None)
        if grad_output is not None:
            mask = list(ctx.needs_input_grad[:3])
            grads = cls.backward_call(grad_output, *ctx.saved_tensors, *ctx.sizes, *ctx.options, mask)
        return (*grads, *(None for _ in ctx.options))

    @classmethod
    def push_forward(cls, ctx: Any, *tangents: MaybeTensor) -> MaybeTensor:
        """Implements `jvp`."""
        input, weight = primals(ctx)[-2:]
        return cls.product_rule(input, weight, *tangents[:3], ctx.options)

    @classmethod
    def product_rule(
        cls,
        input: MaybeTensor,
        weight: MaybeTensor,
        d_input: MaybeTensor,
        d_weight: MaybeTensor,
        d_bias: MaybeTensor,
        options: list[Any],
    ) -> MaybeTensor:
        """The sum d_input * weight + input * d_weight + d_bias, without the terms that are None."""
        terms = []
        for x, w in ((d_input, weight), (input, d_weight)):
            if x is not None and w is not None:
                terms.append(cls.call(x, w, None if terms else d_bias, *options))
        if not terms and d_bias is not None and input is not None and weight is not None:
            terms.append(cls.call(torch.zeros_like(input), weight, d_bias, *options))
        return add(*terms)


class BilinearBackward(OpFunction):
    """The backward op: ``op(grad_output, input, weight, *sizes, *options, output_mask)`` gives the three gradients."""

    forward_op: ClassVar[type[Bilinear]]
    size_count: ClassVar[int] = 0

    @classmethod
    def save(cls, ctx: Any, inputs: tuple[Any, ...]) -> None:
        """Implements `setup_context`."""
        grad_output, input, weight, *ctx.rest, ctx.mask = inputs
        ctx.options = ctx.rest[cls.size_count :]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, input, weight)
        ctx.save_for_forward(grad_output, input, weight)

    @staticmethod
    def mark_constants(ctx: Any, output: tuple[MaybeTensor, ...]) -> None:
        """For `setup_context` of an op whose gradients stock torch computes by separate ops: a gradient requires grad
        only if one of its own operands does."""
        if forward_ad._current_level >= 0 or in_transform():
            return  # a non-differentiable output could not have a tangent either
        by_grad_output, by_input, by_weight = ctx.needs_input_grad[:3]
        differentiable = by_grad_output or by_weight, by_grad_output or by_input, by_grad_output
        constant = (grad for grad, needed in zip(output, differentiable, strict=True) if not needed)
        ctx.mark_non_differentiable(*(grad for grad in constant if grad is not None))

    @classmethod
    def pull_back(
        cls, ctx: Any, d_input: MaybeTensor, d_weight: MaybeTensor, d_bias: MaybeTensor
    ) -> tuple[MaybeTensor, ...]:
        """Implements `backward`; the arguments are the gradients of grad_input, grad_weight and grad_bias."""
        grad_output, input, weight = ctx.saved_tensors
        by_grad_output = by_input = by_weight = None
        if ctx.needs_input_grad[0]:
            if (d_input is None or weight is None) and (d_weight is None or input is None):
                by_grad_output = None if d_bias is None else cls.broadcast_bias(d_bias, grad_output)
            else:
                by_grad_output = cls.forward_op.product_rule(input, weight, d_input, d_weight, d_bias, ctx.options)
        if d_weight is not None and ctx.needs_input_grad[1]:
            by_input = cls.call(grad_output, None, d_weight, *ctx.rest, [True, False, False])[0]
        if d_input is not None and ctx.needs_input_grad[2]:
            by_weight = cls.call(grad_output, d_input, None, *ctx.rest, [False, True, False])[1]
        return (by_grad_output, by_input, by_weight, *(None for _ in ctx.rest), None)

    @classmethod
    def push_forward(cls, ctx: Any, *tangents: MaybeTensor) -> tuple[MaybeTensor, ...]:
        """Implements `jvp`."""
        grad_output, input, weight = primals(ctx)
        d_grad_output, d_input, d_weight = tangents[:3]
        second: tuple[MaybeTensor, ...] = (None, None, None)
        if d_grad_output is not None:
            first = cls.call(d_grad_output, input, weight, *ctx.rest, ctx.mask)
        else:  # torch requires a tangent for every output, even if it is zeros
            shapes = cls.fake(grad_output, input, weight, *ctx.rest, ctx.mask)
            first = tuple(None if shape is None else torch.zeros_like(shape) for shape in shapes)
        mask = [ctx.mask[0] and d_weight is not None, ctx.mask[1] and d_input is not None, False]
        if any(mask):
            second = cls.call(grad_output, d_input, d_weight, *ctx.rest, mask)
        return tuple(map(add, first, second))

    @classmethod
    def broadcast_bias(cls, bias: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A bias broadcast to the shape of an output."""
        raise NotImplementedError
