"""Calls of the operators with everything that they return: outputs, gradients and what is saved for them."""

import torch
from tensors import place, random

ops = torch.ops.pyops

POOL = ((3, 3), (2, 2), (1, 1), (1, 1), False)  # overlapping windows, whose gradients are added
WIDE_POOL = ((16, 17), (5, 3), (8, 8), (1, 1), True)  # int64 argmax
CONV = ((1, 1), (1, 1), (1, 1), 1)


def pooled(input, window):
    output, argmax = ops.max_pool2d(input, *window)
    results = [output, argmax, ops.max_pool2d_indices(argmax, input.shape[-2:], *window)]
    if input.is_floating_point():
        grad = random(output.shape, output.dtype)
        results.append(ops.max_pool2d_backward(grad, argmax, input.shape[-2:], *window))
        results.append(ops.max_pool2d_gather(input, argmax, *window))
    return results


def convolved(input, weight, stride, padding, dilation, groups):
    options = (stride, padding, dilation, groups)
    output = ops.conv2d(input, weight, random(weight.shape[:1], weight.dtype), *options)
    grad = random(output.shape, output.dtype)
    sizes = (input.shape, weight.shape)
    return [output, *ops.conv2d_backward(grad, input, weight, *sizes, *options, [True] * 3)]


def multiplied(input, weight):
    output = ops.linear(input, weight, random(weight.shape[:1], weight.dtype))
    return [output, *ops.linear_backward(random(output.shape, output.dtype), input, weight, [True] * 3)]


def rectified(input):
    output = ops.relu(input)
    grad = random(input.shape, input.dtype)
    in_place = input.clone()
    ops.relu_(in_place)
    results = [output, ops.relu_backward(grad, output), in_place]
    if input.is_floating_point():
        _, mask = kept = ops.relu_with_mask(input)
        results += [*kept, ops.relu_mask_backward(grad, mask, output.stride())]
    return results


def images(channels_first, dtype, where):
    return place(random(channels_first, dtype), where)


def fused(input, weight, pool, padding=1):
    options = (1, padding, 1, 1, *pool)
    tensors = (input, weight, random(weight.shape[:1], weight.dtype))
    output, argmax = ops.conv2d_relu_max_pool2d_with_argmax(*tensors, *options)
    grad, sizes = random(output.shape, output.dtype), (input.shape, weight.shape)
    grads = ops.conv2d_relu_max_pool2d_backward(grad, argmax, input, weight, *sizes, *options, [True] * 3)
    return [output, argmax, ops.conv2d_relu_max_pool2d(*tensors, *options), *grads]
