"""conv2d_relu_max_pool2d: a convolution, rectified and pooled without its output ever being stored."""

from typing import Any

import torch

from pyops.autograd._bilinear import Bilinear, MaybeTensor
from pyops.autograd._function import Dims, composition, implements, primals, with_path_to_output
from pyops.autograd._images import empty_images
from pyops.autograd.conv2d import Conv2d, Conv2dBackward, output_is_channels_last, output_size, vmap_images
from pyops.autograd.max_pool2d import MaxPool2d, MaxPool2dBackward, MaxPool2dGather

CONV_OPTIONS = 4  # stride, padding, dilation, groups; the options of the pooling follow


def _backward_fake(grad_output: torch.Tensor, argmax: torch.Tensor, *rest: Any) -> tuple[MaybeTensor, ...]:
    input, weight, input_size, weight_size, *options, mask = rest
    like = torch.empty_like(argmax, dtype=grad_output.dtype)  # determines the memory format if there is no input
    return Conv2dBackward.fake(like, input, weight, input_size, weight_size, *options[:CONV_OPTIONS], mask)


def _backward_vmap(info: Any, in_dims: Dims, grad_output: torch.Tensor, argmax: torch.Tensor, *rest: Any) -> Any:
    input, weight, input_size, weight_size, *options, mask = rest
    conv, pool = options[:CONV_OPTIONS], options[CONV_OPTIONS:]
    conv_size = output_size(input_size[-2:], weight_size[2:], *conv[:3])
    grad_conv, dim = MaxPool2dBackward.vmap(info, in_dims[:2], grad_output, argmax, conv_size, *pool)
    others = input_size, weight_size, *conv, mask
    dims = dim, *in_dims[2:4], *(None for _ in others)
    return Conv2dBackward.vmap(info, dims, grad_conv, input, weight, *others)


@composition("conv2d_relu_max_pool2d_backward", _backward_fake, _backward_vmap)
def conv2d_relu_max_pool2d_backward(
    grad_output: torch.Tensor, argmax: torch.Tensor, *rest: Any
) -> tuple[MaybeTensor, ...]:
    """``(grad_output, argmax, input, weight, input_size, weight_size, *options, output_mask)`` -> the gradients of
    input, weight and bias."""
    input, weight, input_size, weight_size, *options, mask = rest
    conv, pool = options[:CONV_OPTIONS], options[CONV_OPTIONS:]
    conv_size = output_size(input_size[-2:], weight_size[2:], *conv[:3])
    grad_conv = MaxPool2dBackward.call(grad_output, argmax, conv_size, *pool)
    return Conv2dBackward.call(grad_conv, input, weight, input_size, weight_size, *conv, mask)


@implements("conv2d_relu_max_pool2d_with_argmax")
class Conv2dReLUMaxPool2d(Bilinear):
    """``Conv2dReLUMaxPool2d.apply(input, weight, bias, stride, padding, dilation, groups, pool_kernel_size,
    pool_stride, pool_padding, pool_dilation, ceil_mode)`` -> (output, argmax): ``MaxPool2d`` of ``ReLU`` of ``Conv2d``.
    Values and gradients equal theirs to the last bit, except for the sign of a zero.

    The maximum is taken before the rectification. If the maximum of a window is neither above 0 nor NaN, the argmax
    names none of its taps. Saved for backward: argmax, and what :class:`Conv2d` saves.

    >>> x, w = torch.ones(1, 1, 4, 4), torch.ones(2, 1, 3, 3)
    >>> Conv2dReLUMaxPool2d.apply(x, w, None, 1, 0, 1, 1, 2, 2, 0, 1, False)[0].flatten()
    tensor([9., 9.])
    """

    backward_call = conv2d_relu_max_pool2d_backward

    @staticmethod
    def forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.pyops.conv2d_relu_max_pool2d_with_argmax.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        Conv2dReLUMaxPool2d.save(ctx, inputs, sizes=(inputs[0].shape, inputs[1].shape), kept=(output[1],))

    @staticmethod
    def backward(ctx: Any, grad_output: MaybeTensor, _: None) -> tuple[MaybeTensor, ...]:
        return Conv2dReLUMaxPool2d.pull_back(ctx, None if grad_output is None else with_path_to_output(grad_output))

    @staticmethod
    def jvp(ctx: Any, *tangents: MaybeTensor) -> tuple[MaybeTensor, None]:
        argmax, input, weight = primals(ctx)
        conv, pool = ctx.options[:CONV_OPTIONS], ctx.options[CONV_OPTIONS:]
        tangent = Conv2d.product_rule(input, weight, *tangents[:3], conv)
        return MaxPool2dGather.call(tangent, argmax, *pool), None

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Any, Any]:
        return vmap_images(Conv2dReLUMaxPool2d.call, info, in_dims, args)

    @staticmethod
    def fake(input: torch.Tensor, weight: torch.Tensor, bias: MaybeTensor, *options: Any) -> tuple[Any, Any]:
        conv = Conv2d.fake(input, weight, bias, *options[:CONV_OPTIONS])
        pooled = MaxPool2d.fake(conv, *options[CONV_OPTIONS:])
        last = output_is_channels_last(input, weight)
        images = (empty_images(t, t.shape, last, t.dtype) for t in pooled)
        return tuple(images if input.dim() == 4 else (t.contiguous() for t in images))


def _output_fake(*args: Any) -> torch.Tensor:
    return Conv2dReLUMaxPool2d.fake(*args)[0]


def _output_vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[torch.Tensor, int]:
    return vmap_images(torch.ops.pyops.conv2d_relu_max_pool2d.default, info, in_dims, args)


@composition("conv2d_relu_max_pool2d", _output_fake, _output_vmap)
def conv2d_relu_max_pool2d(*args: Any) -> torch.Tensor:
    """The output of :class:`Conv2dReLUMaxPool2d` without argmax, which the operator does not compute if no derivative
    is needed."""
    return Conv2dReLUMaxPool2d.call(*args)[0]
