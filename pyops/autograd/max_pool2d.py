"""max_pool2d: the largest value of each window, and its derivatives.

The forward saves only the argmax, a number within the window (one byte for up to 255 taps). With it, the backward
scatters a gradient of the output to the elements that won, and the gather reads those elements of an image. These are
two linear maps, each the transpose of the other, so each is the derivative of the other.
"""

from collections.abc import Sequence
from typing import Any

import torch

from pyops.autograd._function import (
    Dims,
    OpFunction,
    add_path_to_input,
    batch_first,
    fold,
    implements,
    register_shapes,
    unfold,
)
from pyops.autograd._images import channels_last, empty_images, pair

Window = tuple[Any, ...]  # kernel_size, stride, padding, dilation, ceil_mode


def output_size(image: Sequence[int], kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool):
    """The number of windows along H and W."""
    sizes = []
    windows = (pair(kernel_size), pair(stride or kernel_size), pair(padding), pair(dilation))
    for size, kernel, step, pad, spread in zip(image, *windows, strict=True):
        room = size + 2 * pad - spread * (kernel - 1) - 1
        count = (room + (step - 1 if ceil_mode else 0)) // step + 1
        if ceil_mode and (count - 1) * step >= size + pad:  # the last window must not start in the right padding
            count -= 1
        sizes.append(count)
    return sizes


def vmap_images(function: type[OpFunction], info: Any, in_dims: Dims, tensors: Sequence[torch.Tensor], rest: Window):
    """The batching rule of all ops of this module: the vmapped dimension is merged into the batch of images."""
    size = info.batch_size
    batched = [batch_first(t, d, size) for t, d in zip(tensors, in_dims, strict=False)]
    batch = batched[0].shape[:-3]
    outputs = function.call(*map(fold, batched), *rest)
    if isinstance(outputs, torch.Tensor):
        return unfold(outputs, *batch), 0
    return tuple(unfold(output, *batch) for output in outputs), (0,) * len(outputs)


@implements("max_pool2d")
class MaxPool2d(OpFunction):
    """``MaxPool2d.apply(input, kernel_size, stride=[], padding=0, dilation=1, ceil_mode=False)``: input [N, C, H, W] or
    [C, H, W] of a floating or integer dtype -> (output, argmax), both [N, C, H_out, W_out] or without N.

    argmax is the number of the winning tap in its window, row by row: uint8 for windows of up to 255 taps, else int64.
    A tap wins over those before it if it is larger or NaN. Saved for backward: argmax.

    >>> MaxPool2d.apply(torch.tensor([[[1.0, 4.0], [2.0, 3.0]]]), 2)
    (tensor([[[4.]]]), tensor([[[1]]], dtype=torch.uint8))
    """

    @staticmethod
    def forward(
        input: torch.Tensor,
        kernel_size: Sequence[int] | int,
        stride: Sequence[int] | int = (),
        padding: Sequence[int] | int = 0,
        dilation: Sequence[int] | int = 1,
        ceil_mode: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.pyops.max_pool2d.default(input, kernel_size, stride, padding, dilation, ceil_mode)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        input, *ctx.window = inputs
        argmax = output[1]
        ctx.image_size = input.shape[-2:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(argmax)
        ctx.save_for_backward(argmax)
        ctx.save_for_forward(argmax)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        grad_input = None
        if grad_output is not None:
            grad_input = MaxPool2dBackward.call(grad_output, *ctx.saved_tensors, ctx.image_size, *ctx.window)
            add_path_to_input(grad_input)
        return (grad_input, None, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: None) -> tuple[torch.Tensor, None]:
        return MaxPool2dGather.call(tangent, *ctx.saved_tensors, *ctx.window), None

    @staticmethod
    def vmap(info: Any, in_dims: Dims, input: torch.Tensor, *window: Any) -> tuple[Any, Any]:
        return vmap_images(MaxPool2d, info, in_dims, [input], window)

    @staticmethod
    def fake(
        input: torch.Tensor, kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode=False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = output_size(input.shape[-2:], kernel_size, stride, padding, dilation, ceil_mode)
        kernel_h, kernel_w = pair(kernel_size)
        argmax_dtype = torch.uint8 if kernel_h * kernel_w <= 255 else torch.int64
        sizes, last = (*input.shape[:-2], *size), channels_last(input)
        return empty_images(input, sizes, last), empty_images(input, sizes, last, argmax_dtype)


@implements("max_pool2d_backward")
class MaxPool2dBackward(OpFunction):
    """``(grad_output, argmax, (H, W), *window)`` -> grad_input [.., H, W]: sums over the windows each element won."""

    @staticmethod
    def forward(grad_output: torch.Tensor, *args: Any) -> torch.Tensor:
        return torch.ops.pyops.max_pool2d_backward.default(grad_output, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, argmax, ctx.image_size, *ctx.window = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(argmax)
        ctx.save_for_forward(argmax)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        by_grad_output = None if grad is None else MaxPool2dGather.call(grad, *ctx.saved_tensors, *ctx.window)
        return (by_grad_output, None, None, None, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: None) -> torch.Tensor:
        return MaxPool2dBackward.call(tangent, *ctx.saved_tensors, ctx.image_size, *ctx.window)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, grad_output: torch.Tensor, argmax: torch.Tensor, *rest: Any) -> tuple[Any, Any]:
        return vmap_images(MaxPool2dBackward, info, in_dims, [grad_output, argmax], rest)

    @staticmethod
    def fake(grad_output: torch.Tensor, argmax: torch.Tensor, input_size: Sequence[int], *window: Any) -> torch.Tensor:
        return empty_images(grad_output, (*argmax.shape[:-2], *pair(input_size)), channels_last(argmax))


@implements("max_pool2d_gather")
class MaxPool2dGather(OpFunction):
    """``(input, argmax, *window)`` -> the elements of input that argmax names. It is the transpose of the backward."""

    @staticmethod
    def forward(input: torch.Tensor, *args: Any) -> torch.Tensor:
        return torch.ops.pyops.max_pool2d_gather.default(input, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        input, argmax, *ctx.window = inputs
        ctx.image_size = input.shape[-2:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(argmax)
        ctx.save_for_forward(argmax)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        by_input = None
        if grad is not None:
            by_input = MaxPool2dBackward.call(grad, *ctx.saved_tensors, ctx.image_size, *ctx.window)
        return (by_input, None, None, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: None) -> torch.Tensor:
        return MaxPool2dGather.call(tangent, *ctx.saved_tensors, *ctx.window)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, input: torch.Tensor, argmax: torch.Tensor, *window: Any) -> tuple[Any, Any]:
        return vmap_images(MaxPool2dGather, info, in_dims, [input, argmax], window)

    @staticmethod
    def fake(input: torch.Tensor, argmax: torch.Tensor, *window: Any) -> torch.Tensor:
        return empty_images(input, argmax.shape, channels_last(argmax))


def _indices_fake(argmax: torch.Tensor, input_size: Sequence[int], *window: Any) -> torch.Tensor:
    return empty_images(argmax, argmax.shape, channels_last(argmax), torch.int64)


def _indices_vmap(info: Any, in_dims: Dims, argmax: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, int]:
    argmax = argmax.movedim(in_dims[0], 0)
    return unfold(torch.ops.pyops.max_pool2d_indices(fold(argmax), *rest), *argmax.shape[:-3]), 0


register_shapes("max_pool2d_indices", _indices_fake, _indices_vmap)
