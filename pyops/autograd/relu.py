"""relu: output = max(input, 0), and its derivative, in and out of place."""

from typing import Any

import torch

from pyops.autograd._function import Dims, OpFunction, batch_first, implements


@implements("relu")
class ReLU(OpFunction):
    r"""Rectified linear unit, :math:`\max(x, 0)` element by element; what the tutorials call MyReLU.

    ``ReLU.apply(input)``: a tensor of any shape, of a floating or integer dtype; the output has its shape and dtype.
    NaN stays NaN and -0.0 stays -0.0. The gradient is that of the output where the output is not <= 0, and 0 elsewhere.
    Saved for backward: the output.

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
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> torch.Tensor:
        return ReLUBackward.call(grad_output, *ctx.saved_tensors)

    jvp = backward  # the derivative is diagonal: pushing a tangent forward is pulling a gradient back

    @staticmethod
    def vmap(info: Any, in_dims: Dims, input: torch.Tensor) -> tuple[torch.Tensor, int]:
        return ReLU.call(input), in_dims[0]

    @staticmethod
    def fake(input: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(input)


@implements("relu_")
class InplaceReLU(ReLU):
    """:class:`ReLU` that overwrites its input. A leaf that requires grad is refused, as by stock.

    ``apply`` returns the input, the operator ``torch.ops.pyops.relu_`` nothing, because torch traces no custom operator
    that returns what it was given.
    """

    @staticmethod
    def forward(input: torch.Tensor) -> torch.Tensor:
        if input.requires_grad and input.is_leaf:  # torch itself would only notice after the overwriting
            raise RuntimeError("relu_: a leaf Variable that requires grad is being used in an in-place operation.")
        torch.ops.pyops.relu_.default(input)
        return input

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.mark_dirty(*inputs)
        ReLU.setup_context(ctx, inputs, output)

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        return tangent.copy_(ReLUBackward.call(tangent, *ctx.saved_tensors))

    @staticmethod
    def vmap(info: Any, in_dims: Dims, input: torch.Tensor) -> tuple[torch.Tensor, int]:
        InplaceReLU.call(input)
        return input, in_dims[0]

    @staticmethod
    def fake(input: torch.Tensor) -> None:
        return None


@implements("relu_backward")
class ReLUBackward(OpFunction):
    """grad_output where output is not <= 0, else 0. Linear in grad_output; its derivative by output is 0."""

    @staticmethod
    def forward(grad_output: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return torch.ops.pyops.relu_backward.default(grad_output, output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ReLUBackward.call(grad, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, grad_tangent: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        return ReLUBackward.call(grad_tangent, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: torch.Tensor) -> tuple[torch.Tensor, int]:
        return ReLUBackward.call(*(batch_first(a, d, info.batch_size) for a, d in zip(args, in_dims, strict=True))), 0

    @staticmethod
    def fake(grad_output: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(output)
