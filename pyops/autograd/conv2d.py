"""conv2d: 2-D cross-correlation of images with a bank of filters, and its gradients."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyops.autograd._bilinear import Bilinear, BilinearBackward, MaybeTensor
from pyops.autograd._function import (
    Dims,
    add_path_to_factors,
    batch_first,
    dims_of,
    fold,
    implements,
    merge,
    split,
    unfold,
    vmap_by_loop,
)
from pyops.autograd._images import channels_last, dense, empty_images, is_empty, pair


def output_size(image: Sequence[int], kernel: Sequence[int], stride: Any, padding: Any, dilation: Any) -> list[int]:
    """H_out and W_out."""
    top, left = pair(padding[:2] if isinstance(padding, Sequence) else padding)
    bottom, right = padding[2:] if isinstance(padding, Sequence) and len(padding) == 4 else (top, left)
    padded = image[0] + top + bottom, image[1] + left + right
    return [
        (p - d * (k - 1) - 1) // s + 1 for p, k, s, d in zip(padded, kernel, pair(stride), pair(dilation), strict=True)
    ]


def output_is_channels_last(input: torch.Tensor, weight: torch.Tensor) -> bool:
    return (channels_last(input) or channels_last(weight)) and not is_empty(input.shape)


# Samples that have weights of their own and fewer images than this are computed as one convolution with a group for
# each sample. Samples with more images fill the vectors by themselves and are convolved one after another. The limit
# was fitted to measurements.
MANY_IMAGES = 8


def has_many_images(size: Sequence[int]) -> bool:
    return len(size) == 4 and size[0] >= MANY_IMAGES


def vmap_images(call: Callable[..., Any], info: Any, in_dims: Dims, args: tuple[Any, ...]) -> tuple[Any, Any]:
    """The batching rule of a convolution, also of a fused one. If all samples share weight and bias, their images form
    one batch; if they share the images, their weights form one weight with more output channels. Otherwise each sample
    becomes a group of channels or, if it has many images, is convolved by a call of its own."""
    input, weight, bias, stride, padding, dilation, groups, *pool = args
    by_input, by_weight, by_bias = in_dims[:3]
    size = int(info.batch_size)
    if by_weight is None and by_bias is None:
        x = input.movedim(by_input, 0)
        outputs = call(fold(x), *args[1:])
        batch = x.shape[:-3]

        def undo(output: torch.Tensor) -> torch.Tensor:
            return unfold(output, *batch)

    else:
        parts, x = groups, input  # in each of the parts, the output channels of all samples are neighbours
        if by_input is not None:
            x = input.movedim(by_input, 0)
            if has_many_images(x.shape[1:]):
                return vmap_by_loop(call, info, in_dims, args)
            parts, x, groups = 1, merge(x, -3), size * groups
        w, b = batch_first(weight, by_weight, size), batch_first(bias, by_bias, size)
        outputs = call(x, merge(w, -4, parts), merge(b, -1, parts), stride, padding, dilation, groups, *pool)

        def undo(output: torch.Tensor) -> torch.Tensor:
            samples = split(output, -3, size, parts)
            # If the samples have weights of their own, stock leaves the result of a convolution in one piece too, which
            # saves a copy.
            if by_weight is not None and call is Conv2d.call:
                return samples
            return dense(samples, channels_last(output))

    if isinstance(outputs, torch.Tensor):
        return undo(outputs), 0
    return tuple(map(undo, outputs)), (0,) * len(outputs)


@implements("conv2d_backward")
class Conv2dBackward(BilinearBackward):
    """``(grad_output, input, weight, input_size, weight_size, stride, padding, dilation, groups, output_mask)`` -> the
    gradients of input, weight and bias that the mask asks for.

    grad_input is the transposed convolution of grad_output with weight; grad_weight correlates input with grad_output;
    grad_bias is the sum of grad_output over all but the channels.
    """

    size_count = 2

    @staticmethod
    def forward(grad_output: torch.Tensor, *args: Any) -> tuple[MaybeTensor, ...]:
        return torch.ops.pyops.conv2d_backward.default(grad_output, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        Conv2dBackward.save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *grads: MaybeTensor) -> tuple[MaybeTensor, ...]:
        return Conv2dBackward.pull_back(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: MaybeTensor) -> tuple[MaybeTensor, ...]:
        return Conv2dBackward.push_forward(ctx, *tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Any, Any]:
        """As `vmap_images`. Which case applies to the gradient of input depends on weight, and for weight on input."""
        grad_output, input, weight, input_size, weight_size, *window, groups, (want_input, *others) = args
        by_grad_output, by_input, by_weight = in_dims[:3]
        size = int(info.batch_size)
        grads: list[MaybeTensor] = [None, None, None]
        if want_input and by_weight is None:
            g, batch = fold(batch_first(grad_output, by_grad_output, size)), (size, *input_size[:-3])
            sizes = (math.prod(batch), *input_size[-3:]), weight_size
            grad = Conv2dBackward.call(g, None, weight, *sizes, *window, groups, [True, False, False])[0]
            grads[0] = unfold(grad, *batch)
            want_input = False
        mask = [want_input, *others]
        if not any(mask):
            return tuple(grads), dims_of(grads)

        parts, x = groups, input
        g, w = batch_first(grad_output, by_grad_output, size), batch_first(weight, by_weight, size)
        if by_input is not None or want_input:
            if has_many_images(input_size):
                rest, _ = vmap_by_loop(Conv2dBackward.call, info, in_dims, (*args[:-1], mask))
                grads = [a if b is None else b for a, b in zip(grads, rest, strict=True)]
                return tuple(grads), dims_of(grads)
            parts, groups = 1, size * groups
            x = merge(batch_first(input, by_input, size), -3)
            input_size = (*input_size[:-3], size * input_size[-3], *input_size[-2:])
        weight_size = (size * weight_size[0], *weight_size[1:])
        tensors = merge(g, -3, parts), x, merge(w, -4, parts) if want_input else None
        rest = Conv2dBackward.call(*tensors, input_size, weight_size, *window, groups, mask)
        if want_input:
            grads[0] = split(rest[0], -3, size)
        grads[1:] = split(rest[1], -4, size, parts), split(rest[2], -1, size, parts)
        return tuple(grads), dims_of(grads)

    @staticmethod
    def fake(
        grad_output: torch.Tensor,
        input: MaybeTensor,
        weight: MaybeTensor,
        input_size: Sequence[int],
        weight_size: Sequence[int],
        *options: Any,
    ) -> tuple[MaybeTensor, ...]:
        output_mask = options[-1]
        weight_last = weight is not None and channels_last(weight)
        last = weight_last or channels_last(grad_output if input is None else input)
        return (
            empty_images(grad_output, input_size, last and not is_empty(input_size)) if output_mask[0] else None,
            empty_images(grad_output, weight_size, weight_last) if output_mask[1] else None,
            grad_output.new_empty((weight_size[0],)) if output_mask[2] else None,
        )

    @classmethod
    def broadcast_bias(cls, bias: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return bias[:, None, None].expand_as(like)


@implements("conv2d")
class Conv2d(Bilinear):
    """``Conv2d.apply(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1)``: input [N, C, H, W] or
    [C, H, W], weight [O, C / groups, kH, kW], bias [O], of one floating dtype -> [N, O, H_out, W_out] or without N.

    stride and dilation are one or two integers; padding is one, two or four (top, left, bottom, right). Saved for
    backward: input if weight needs a gradient, weight if input needs one.

    >>> Conv2d.apply(torch.ones(1, 1, 32, 32), torch.ones(6, 1, 5, 5)).shape
    torch.Size([1, 6, 28, 28])
    """

    backward_call = Conv2dBackward.call

    @staticmethod
    def forward(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: MaybeTensor = None,
        stride: Sequence[int] | int = 1,
        padding: Sequence[int] | int = 0,
        dilation: Sequence[int] | int = 1,
        groups: int = 1,
    ) -> torch.Tensor:
        return torch.ops.pyops.conv2d.default(input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        Conv2d.save(ctx, inputs, sizes=(inputs[0].shape, inputs[1].shape))

    @staticmethod
    def backward(ctx: Any, grad_output: MaybeTensor) -> tuple[MaybeTensor, ...]:
        grads = Conv2d.pull_back(ctx, grad_output)
        for grad in grads:
            if grad is not None:
                add_path_to_factors(grad)
        return grads

    @staticmethod
    def jvp(ctx: Any, *tangents: MaybeTensor) -> MaybeTensor:
        return Conv2d.push_forward(ctx, *tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[torch.Tensor, int]:
        return vmap_images(Conv2d.call, info, in_dims, args)

    @staticmethod
    def fake(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: MaybeTensor = None,
        stride: Sequence[int] | int = 1,
        padding: Sequence[int] | int = 0,
        dilation: Sequence[int] | int = 1,
        groups: int = 1,
    ) -> torch.Tensor:
        size = output_size(input.shape[-2:], weight.shape[2:], stride, padding, dilation)
        out_channels = weight.shape[0] if input.shape[-3] != 0 else 0  # as in stock: without channels in, none out
        return empty_images(input, (*input.shape[:-3], out_channels, *size), output_is_channels_last(input, weight))


Conv2dBackward.forward_op = Conv2d
