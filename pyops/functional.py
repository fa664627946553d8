"""Functions with the names and signatures of those of `torch.nn.functional`, with pyops' kernels underneath.

Results, gradients and errors are stock torch's. All functions take float32, float64, bfloat16 and float16 (the 16-bit
types accumulate in float32 and round once); relu and max_pool2d also take uint8, int8, int16, int32 and int64.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.fx.experimental.symbolic_shapes import guard_scalar
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from pyops import _C
from pyops import autograd as autograd  # tells torch of the operators' derivatives

Ints = int | Sequence[int]

__all__ = ["conv2d", "conv2d_relu", "conv2d_relu_max_pool2d", "linear", "linear_relu", "max_pool2d", "relu"]

_NAMES = "relu", "relu_", "linear", "conv2d", "max_pool2d", "linear_relu", "conv2d_relu", "conv2d_relu_max_pool2d"
_bound = SimpleNamespace(**{name: _C.bind_operator(getattr(torch.ops.pyops, name).default) for name in _NAMES})


def _ops() -> Any:
    """The operators: torch's own objects while Dynamo traces, because it knows them; otherwise our faster callables."""
    return torch.ops.pyops if is_compiling() else _bound


def _known(*options: Ints) -> Sequence[Ints]:
    """The options of a call as numbers. While a call is traced they may be symbols, which operators do not take."""
    if not is_compiling():
        return options
    return [
        [guard_scalar(v) for v in each] if isinstance(each, list | tuple) else guard_scalar(each) for each in options
    ]


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    r"""Rectified linear unit, :math:`\max(x, 0)` element by element, as :func:`torch.nn.functional.relu`.

    NaN stays NaN and -0.0 stays -0.0.

    Args:
        input: any shape, floating or integer dtype.
        inplace: overwrite `input` and return it.

    Raises:
        NotImplementedError: for another dtype.
        RuntimeError: in place on a leaf that requires grad, or on a tensor that overlaps itself.

    >>> relu(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0., 0., 2.])
    """
    if has_torch_function_unary(input):
        return handle_torch_function(relu, (input,), input, inplace=inplace)
    if not inplace:
        return _ops().relu(input)
    if is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _overwrite(input, _ops().relu(input))
    _bound.relu_(input)
    return input


def _overwrite(tensor: Tensor, values: Tensor) -> Tensor:
    """Does `tensor.copy_(values)`, which works in every transform of torch except a derivative of `functionalize`."""
    if not is_compiling():
        levels = torch._C._functorch.get_interpreter_stack() or ()
        if any(level.key() == torch._C._functorch.TransformType.Functionalize for level in levels):
            return tensor.fill_(-0.0).add_(values)  # -0.0 + x is x, also for zeros of either sign
    return tensor.copy_(values)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Affine map :math:`y = x A^T + b`, as :func:`torch.nn.functional.linear`.

    Args:
        input: ``[*, in_features]``, any leading dimensions or none.
        weight: ``[out_features, in_features]``, or ``[in_features]`` for an output without the last dimension.
        bias: ``[out_features]`` or one element for all.

    Returns:
        ``[*, out_features]``

    Raises:
        RuntimeError: for shapes, dtypes or devices that do not fit together.
        NotImplementedError: for a dtype that is not floating.

    >>> linear(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4))
    tensor([[3., 3., 3., 3.],
            [3., 3., 3., 3.]])
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(linear, (input, weight, bias), input, weight, bias=bias)
    try:
        is_vector = weight.dim() == 1 and bias is None
        is_one_bias = bias is not None and bias.dim() <= 1 and bias.numel() == 1 and weight.dim() == 2
    except AttributeError:
        raise _not_tensors("linear", weight, bias) from None
    if is_vector:
        return _ops().linear(input, weight.unsqueeze(0), None).squeeze(-1)
    if is_one_bias:
        bias = bias.expand(weight.shape[0])
    return _ops().linear(input, weight, bias)


def _not_tensors(op: str, weight: Any, bias: Any) -> TypeError:
    types = f"weight={type(weight).__name__} and bias={type(bias).__name__}"
    return TypeError(f"{op}: weight must be a Tensor, and bias a Tensor or None, but got {types}")


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: str | Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    r"""2-D cross-correlation, as :func:`torch.nn.functional.conv2d`.

    .. math:: y[n, o, i, j] = b[o] + \sum_{c, k, l} w[o, c, k, l] \; x[n, c, i s + k d - p, j s + l d - p]

    over the c of o's group, the sum running over the taps that lie inside the input. The output is stored
    channels-last if input or weight is.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        weight: ``[O, C / groups, kH, kW]``.
        bias: ``[O]``.
        stride, dilation: one integer or two.
        padding: one integer or two, ``"valid"`` (none) or ``"same"`` (output as large as the input; stride 1 only).
            Where ``"same"`` needs more padding on one side, that is right and bottom; no padded copy is made.
        groups: number of blocks that input and output channels are divided into.

    Returns:
        ``[N, O, H_out, W_out]`` or without N, with ``H_out = (H + 2 p - d (kH - 1) - 1) // s + 1``.

    Raises:
        RuntimeError: for shapes, dtypes, devices or values that do not fit.
        NotImplementedError: for a dtype that is not floating.

    >>> conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2))
    tensor([[[[4., 4.],
              [4., 4.]]]])
    """
    if has_torch_function_variadic(input, weight, bias):
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return handle_torch_function(conv2d, (input, weight, bias), input, weight, bias=bias, **options)
    if isinstance(padding, str):
        padding = _padding_by_name(padding, input, weight, stride, dilation)
    return _ops().conv2d(input, weight, bias, *_known(stride, padding, dilation, groups))


def _padding_by_name(padding: str, input: Tensor, weight: Tensor, stride: Ints, dilation: Ints) -> Ints:
    if padding == "valid":
        return 0
    if padding != "same":
        raise RuntimeError(f"conv2d: Invalid padding string: '{padding}', expected 'same' or 'valid'")
    strides, dilations = _numbers(stride), _numbers(dilation)
    if any(s > 1 for s in strides):
        raise RuntimeError(f"conv2d: padding='same' is not supported for strided convolutions, got stride={strides}")
    if not isinstance(weight, Tensor) or weight.dim() != 4 or min(dilations, default=0) < 1:
        return 0  # the op raises the error
    totals = dilations[0] * (weight.shape[2] - 1), dilations[-1] * (weight.shape[3] - 1)
    before = [total // 2 for total in totals]
    return [*before, *(total - b for total, b in zip(totals, before, strict=True))]


def _numbers(values: Ints) -> list[int]:
    """The value or values as a list, which is empty if they are not all integers (the op will refuse them)."""
    values = values if isinstance(values, list | tuple) else [values]
    return list(values) if all(isinstance(v, int | torch.SymInt) for v in values) else []


def max_pool2d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The largest value of each window, as :func:`torch.nn.functional.max_pool2d`.

    Among equal values the first one of a window wins, and a NaN wins over everything. Padding never wins.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``, floating or integer dtype.
        kernel_size, stride, padding, dilation: one integer or two; `stride` is `kernel_size` by default.
        ceil_mode: also use the windows that fit only partly.
        return_indices: return the pair of the values and their positions, int64, in the flattened ``H x W`` plane.

    Returns:
        ``[N, C, H_out, W_out]`` or without N, with ``H_out = (H + 2 p - d (k - 1) - 1) // s + 1`` (rounded up with
        `ceil_mode`).

    Raises:
        RuntimeError: for shapes or values that do not fit.
        NotImplementedError: for another dtype.

    >>> max_pool2d(torch.arange(16.0).reshape(1, 4, 4), 2, return_indices=True)
    (tensor([[[ 5.,  7.],
             [13., 15.]]]), tensor([[[ 5,  7],
             [13, 15]]]))
    """
    if has_torch_function_unary(input):
        options = {"stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode}
        return handle_torch_function(max_pool2d, (input,), input, kernel_size, **options, return_indices=return_indices)
    window = _known(kernel_size, kernel_size if stride is None else stride, padding, dilation, ceil_mode)
    output, argmax = _ops().max_pool2d(input, *window)
    if not return_indices:
        return output
    return output, torch.ops.pyops.max_pool2d_indices(argmax, input.shape[-2:], *window)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``relu(linear(input, weight, bias))`` in one pass, equal to the last bit.

    Arguments, shapes and errors are :func:`linear`'s.

    >>> linear_relu(torch.ones(2, 3), torch.tensor([[1.0, 1.0, 1.0], [-1.0, 0.0, 0.0]]))
    tensor([[3., 0.],
            [3., 0.]])
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(linear_relu, (input, weight, bias), input, weight, bias=bias)
    try:
        is_usual = weight.dim() == 2 and (bias is None or bias.shape == weight.shape[:1])
    except AttributeError:
        raise _not_tensors("linear_relu", weight, bias) from None
    if not is_usual:
        return relu(linear(input, weight, bias))
    return _ops().linear_relu(input, weight, bias)


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: str | Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """``relu(conv2d(input, weight, bias, ...))`` in one pass, equal to the last bit.

    Arguments, shapes and errors are :func:`conv2d`'s.

    >>> conv2d_relu(torch.ones(1, 1, 3, 3), -torch.ones(1, 1, 2, 2)).max()
    tensor(0.)
    """
    if has_torch_function_variadic(input, weight, bias):
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return handle_torch_function(conv2d_relu, (input, weight, bias), input, weight, bias=bias, **options)
    if isinstance(padding, str):
        padding = _padding_by_name(padding, input, weight, stride, dilation)
    return _ops().conv2d_relu(input, weight, bias, *_known(stride, padding, dilation, groups))


def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: str | Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    pool_kernel_size: Ints,
    pool_stride: Ints | None = None,
    pool_padding: Ints = 0,
    pool_dilation: Ints = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """``max_pool2d(relu(conv2d(input, weight, bias, ...)), pool_kernel_size, ...)`` in one pass.

    The result of the convolution is pooled while it is in cache and never stored; the backward needs input, weight and
    one byte for each pooled value. Values and gradients equal those of the three functions to the last bit, except for
    the sign of a zero.

    Args:
        input, weight, bias, stride, padding, dilation, groups: those of :func:`conv2d`.
        pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode: those of :func:`max_pool2d`.

    Returns:
        ``[N, O, H_out, W_out]`` or without N, the size that :func:`max_pool2d` gives.

    Raises:
        RuntimeError, NotImplementedError: as :func:`conv2d` and :func:`max_pool2d` raise them.

    >>> conv2d_relu_max_pool2d(torch.ones(1, 1, 5, 5), torch.ones(2, 1, 2, 2), pool_kernel_size=2).shape
    torch.Size([1, 2, 2, 2])
    """
    window_stride = pool_kernel_size if pool_stride is None else pool_stride
    pool = (pool_kernel_size, window_stride, pool_padding, pool_dilation, ceil_mode)
    if has_torch_function_variadic(input, weight, bias):
        names = ("pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation", "ceil_mode")
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        options |= dict(zip(names, (pool_kernel_size, pool_stride, *pool[2:]), strict=True))
        return handle_torch_function(conv2d_relu_max_pool2d, (input, weight, bias), input, weight, bias=bias, **options)
    if isinstance(padding, str):
        padding = _padding_by_name(padding, input, weight, stride, dilation)
    return _ops().conv2d_relu_max_pool2d(input, weight, bias, *_known(stride, padding, dilation, groups, *pool))
