"""relu: output = max(input, 0), and its derivative, in and out of place."""

from collections.abc import Sequence
from typing import Any

import torch
from torch._prims_common import is_non_overlapping_and_dense_or_false

from pyops.autograd._function import (
    Dims,
    OpFunction,
    batch_first,
    implements,
    primals,
    vmap_by_loop,
    with_path_to_output,
)


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor with the strides that the kernels give their result for `tensor`: if it is dense, its own
    strides, including those of dimensions of one element."""
    if is_non_overlapping_and_dense_or_false(tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return torch.empty_like(tensor)


@implements("relu")
class ReLU(OpFunction):
    r"""Rectified linear unit, :math:`\max(x, 0)` element by element. The tutorials call it MyReLU.

    ``ReLU.apply(input)`` takes a tensor of any shape, of a floating or integer dtype; the output has its shape and
    dtype. NaN stays NaN and -0.0 stays -0.0. The gradient is that of the output where the output is not <= 0, and 0
    elsewhere. Saved for backward: this Function saves the output; the op itself, which the function and the layer call,
    saves a mask of one bit for each element.

    >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
    >>> ReLU.apply(x).sum().backward()
    >>> x.grad
    tensor([0., 1.])
    """

    @staticmethod
    def forward(input: torch.Tensor) -> torch.Tensor:
        return torch.ops.pyops.relu.default(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor | None) -> torch.Tensor | None:
        return None if grad_output is None else ReLUBackward.call(grad_output, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:  # the Jacobian is diagonal, so this is the backward op
        return ReLUBackward.call(tangent, *primals(ctx))

    @staticmethod
    def vmap(info: Any, in_dims: Dims, input: torch.Tensor) -> tuple[torch.Tensor, int]:
        return ReLU.call(input), in_dims[0]

    @staticmethod
    def fake(input: torch.Tensor) -> torch.Tensor:
        return empty_like(input)


@implements("relu_")
class InplaceReLU(ReLU):
    """:class:`ReLU` that overwrites its input. It refuses a leaf that requires grad, as stock torch does.

    ``apply`` returns the input, while the operator ``torch.ops.pyops.relu_`` returns nothing, because torch traces no
    custom operator that returns its argument.
    """

    @staticmethod
    def forward(input: torch.Tensor) -> torch.Tensor:
        if input.requires_grad and input.is_leaf:  # torch itself would notice only after the input is overwritten
            raise RuntimeError("relu_: a leaf Variable that requires grad is being used in an in-place operation.")
        torch.ops.pyops.relu_.default(input)
        return input

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.mark_dirty(*inputs)
        ReLU.setup_context(ctx, inputs, output)

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        return tangent.copy_(ReLUBackward.call(tangent, *primals(ctx)))

    @staticmethod
    def vmap(info: Any, in_dims: Dims, input: torch.Tensor) -> tuple[torch.Tensor, int]:
        InplaceReLU.call(input)
        return input, in_dims[0]

    @staticmethod
    def fake(input: torch.Tensor) -> None:
        return None


@implements("relu_backward")
class ReLUBackward(OpFunction):
    """``(grad_output, output)`` -> grad_output where output is not <= 0, else 0. This is linear in grad_output; the
    derivative with respect to output is zeros, as in stock torch, not None."""

    @staticmethod
    def forward(grad_output: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return torch.ops.pyops.relu_backward.default(grad_output, output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if grad is None:
            return None, None
        by_grad_output, by_output = ctx.needs_input_grad
        return (
            ReLUBackward.call(grad, *ctx.saved_tensors) if by_grad_output else None,
            torch.zeros_like(grad) if by_output else None,
        )

    @staticmethod
    def jvp(ctx: Any, grad_tangent: torch.Tensor | None, _: torch.Tensor | None) -> torch.Tensor:
        (output,) = primals(ctx)
        return torch.zeros_like(output) if grad_tangent is None else ReLUBackward.call(grad_tangent, output)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: torch.Tensor) -> tuple[torch.Tensor, int]:
        return ReLUBackward.call(*(batch_first(a, d, info.batch_size) for a, d in zip(args, in_dims, strict=True))), 0

    @staticmethod
    def fake(grad_output: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return empty_like(output)


@implements("relu_with_mask")
class ReLUWithMask(OpFunction):
    """``(input)`` -> (output, mask): the output of :class:`ReLU`, and which elements pass their gradient.

    mask is of dtype int64 with one bit for each element, 64 in a number, in the order in which the output is stored in
    memory. Saved for backward: mask.
    """

    @staticmethod
    def forward(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.pyops.relu_with_mask.default(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.stride = output[0].stride()
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor | None, _: None) -> torch.Tensor | None:
        if grad_output is None:
            return None
        return ReLUMaskBackward.call(with_path_to_output(grad_output), *ctx.saved_tensors, ctx.stride)

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ReLUMaskBackward.call(tangent, *ctx.saved_tensors, ctx.stride), None

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Any, Any]:
        return vmap_by_loop(ReLUWithMask.call, info, in_dims, args)

    @staticmethod
    def fake(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return empty_like(input), input.new_empty(((input.numel() + 63) // 64,), dtype=torch.int64)


@implements("relu_mask_backward")
class ReLUMaskBackward(OpFunction):
    """``(grad_output, mask, stride)`` -> grad_output where the mask is set, else 0, with the strides of the output."""

    @staticmethod
    def forward(grad_output: torch.Tensor, mask: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
        return torch.ops.pyops.relu_mask_backward.default(grad_output, mask, stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, Any], output: torch.Tensor) -> None:
        _, mask, ctx.stride = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mask)
        ctx.save_for_forward(mask)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:
        return None if grad is None else ReLUMaskBackward.call(grad, *ctx.saved_tensors, ctx.stride), None, None

    @staticmethod
    def jvp(ctx: Any, grad_tangent: torch.Tensor, *_: None) -> torch.Tensor:
        return ReLUMaskBackward.call(grad_tangent, *ctx.saved_tensors, ctx.stride)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[torch.Tensor, int]:
        return vmap_by_loop(ReLUMaskBackward.call, info, in_dims, args)

    @staticmethod
    def fake(grad_output: torch.Tensor, mask: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
        return grad_output.new_empty_strided(grad_output.shape, stride)
