"""Layers: the ``torch.nn`` classes of the same name with pyops' kernels underneath.

Each class is a subclass of its namesake in which only ``forward`` is ours. Constructor, ``repr``, initialisation,
``state_dict``, hooks, pickling and copying are torch's own code, so a checkpoint moves freely in both directions and
``isinstance(layer, torch.nn.Linear)`` stays true. To switch an existing model, see :func:`pyops.convert`.

    >>> import torch, pyops.nn
    >>> net = torch.nn.Sequential(pyops.nn.Linear(4, 3), pyops.nn.ReLU())
    >>> net
    Sequential(
      (0): Linear(in_features=4, out_features=3, bias=True)
      (1): ReLU()
    )
    >>> net(torch.ones(2, 4)).shape
    torch.Size([2, 3])
"""

from typing import Any

import torch
from torch import Tensor

from pyops import functional as F

__all__ = [
    "Conv2d",
    "ConvReLU2d",
    "ConvReLUMaxPool2d",
    "Linear",
    "LinearReLU",
    "MaxPool2d",
    "ReLU",
    "add_safe_globals",
]


def _parameter(layer: torch.nn.Module, name: str) -> Tensor | None:
    """``layer.<name>``: a parameter, which is found faster here than by torch.nn.Module's ``__getattr__``, or the
    tensor that a parametrization or pruning has put in its place."""
    return layer._parameters[name] if name in layer._parameters else getattr(layer, name)


class ReLU(torch.nn.ReLU):
    """``max(0, x)``, element by element; NaN stays NaN. Arguments: :class:`torch.nn.ReLU`.

    Shape: ``[*] -> [*]``, any shape. Dtypes and errors: :func:`pyops.functional.relu`.

    >>> ReLU()(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0., 0., 2.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input, inplace=self.inplace)


class Linear(torch.nn.Linear):
    """``x @ weight.T + bias``. Arguments and initialisation: :class:`torch.nn.Linear`.

    Shape: ``[*, in_features] -> [*, out_features]``, any leading dimensions or none.
    Dtypes and errors: :func:`pyops.functional.linear`.

    >>> Linear(4, 3)(torch.ones(2, 5, 4)).shape
    torch.Size([2, 5, 3])
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, _parameter(self, "weight"), _parameter(self, "bias"))


def _conv2d_arguments(layer: torch.nn.Conv2d, input: Tensor) -> tuple[Any, ...]:
    """A layer's arguments for :func:`pyops.functional.conv2d`, which the fused functions share."""
    padding: Any = layer.padding
    if layer.padding_mode != "zeros":
        input = torch.nn.functional.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    weight, bias = _parameter(layer, "weight"), _parameter(layer, "bias")
    return input, weight, bias, layer.stride, padding, layer.dilation, layer.groups


class Conv2d(torch.nn.Conv2d):
    """2-D cross-correlation. Arguments and initialisation: :class:`torch.nn.Conv2d`.

    Shape: ``[N, C_in, H, W] -> [N, C_out, H_out, W_out]``, or both without N. Dtypes and errors:
    :func:`pyops.functional.conv2d`. A ``padding_mode`` other than ``"zeros"`` pads with
    :func:`torch.nn.functional.pad` first, as torch's layer does.

    >>> Conv2d(1, 6, 5)(torch.ones(2, 1, 32, 32)).shape
    torch.Size([2, 6, 28, 28])
    >>> Conv2d(1, 6, 5, padding="same", padding_mode="reflect")(torch.ones(2, 1, 32, 32)).shape
    torch.Size([2, 6, 32, 32])
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(*_conv2d_arguments(self, input))


class MaxPool2d(torch.nn.MaxPool2d):
    """The largest value of each window. Arguments: :class:`torch.nn.MaxPool2d`.

    Shape: ``[N, C, H, W] -> [N, C, H_out, W_out]``, or both without N; with ``return_indices=True``, the result is the
    pair of the values and their int64 positions in the flattened ``H x W`` plane. Dtypes and errors:
    :func:`pyops.functional.max_pool2d`.

    >>> MaxPool2d(2)(torch.arange(16.0).reshape(1, 4, 4))
    tensor([[[ 5.,  7.],
             [13., 15.]]])
    """

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return F.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )


class LinearReLU(Linear):
    """``relu(x @ weight.T + bias)`` in one pass: :class:`Linear` followed by :class:`ReLU`.

    Arguments, shapes and ``state_dict`` keys (``weight`` and ``bias``) are those of :class:`Linear`.

    >>> LinearReLU(4, 3)(torch.ones(2, 4)).min() >= 0
    tensor(True)
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear_relu(input, _parameter(self, "weight"), _parameter(self, "bias"))


class ConvReLU2d(Conv2d):
    """A rectified 2-D cross-correlation in one pass: :class:`Conv2d` followed by :class:`ReLU`.

    Arguments, shapes and ``state_dict`` keys are those of :class:`Conv2d`.

    >>> ConvReLU2d(1, 6, 5)(torch.ones(2, 1, 32, 32)).shape
    torch.Size([2, 6, 28, 28])
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d_relu(*_conv2d_arguments(self, input))


class ConvReLUMaxPool2d(Conv2d):
    """A rectified and max-pooled 2-D cross-correlation in one pass, which keeps one byte per pooled value for the
    backward: :class:`Conv2d`, :class:`ReLU` and :class:`MaxPool2d` in turn.

    Arguments and ``state_dict`` keys are those of :class:`Conv2d`. The arguments of the pooling are passed by name:

    Args:
        pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode: those of :class:`MaxPool2d`;
            `pool_stride` is `pool_kernel_size` by default.

    Shape: ``[N, C_in, H, W] -> [N, C_out, H_out, W_out]``, or both without N. Dtypes and errors:
    :func:`pyops.functional.conv2d_relu_max_pool2d`.

    >>> ConvReLUMaxPool2d(1, 6, 5, pool_kernel_size=2)
    ConvReLUMaxPool2d(1, 6, kernel_size=(5, 5), stride=(1, 1), pool_kernel_size=2)
    """

    def __init__(
        self,
        *args: Any,
        pool_kernel_size: F.Ints,
        pool_stride: F.Ints | None = None,
        pool_padding: F.Ints = 0,
        pool_dilation: F.Ints = 1,
        ceil_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.pool_kernel_size, self.pool_stride = pool_kernel_size, pool_stride
        self.pool_padding, self.pool_dilation, self.ceil_mode = pool_padding, pool_dilation, ceil_mode

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d_relu_max_pool2d(
            *_conv2d_arguments(self, input),
            pool_kernel_size=self.pool_kernel_size,
            pool_stride=self.pool_stride,
            pool_padding=self.pool_padding,
            pool_dilation=self.pool_dilation,
            ceil_mode=self.ceil_mode,
        )

    def extra_repr(self) -> str:
        given = {"pool_kernel_size": self.pool_kernel_size}
        if self.pool_stride not in (None, self.pool_kernel_size):
            given["pool_stride"] = self.pool_stride
        for name, default in (("pool_padding", 0), ("pool_dilation", 1), ("ceil_mode", False)):
            if getattr(self, name) != default:
                given[name] = getattr(self, name)
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in given.items())])


def add_safe_globals(*containers: type) -> None:
    """Let ``torch.load(..., weights_only=True)`` read whole saved modules made of our layers.

    torch's safe loader accepts state dicts and refuses every class that is not registered with it. This registers the
    classes of this module, by :func:`torch.serialization.add_safe_globals`, for the rest of the process.

    Args:
        containers: further classes that the file may hold, such as the class of the network itself.

    >>> add_safe_globals(torch.nn.Sequential)
    """
    layers = [ReLU, Linear, Conv2d, MaxPool2d, LinearReLU, ConvReLU2d, ConvReLUMaxPool2d]
    torch.serialization.add_safe_globals([*layers, *containers])
