"""Layers: the ``torch.nn`` classes of the same name with pyops' kernels underneath.

Each class is a subclass of its namesake in which only ``forward`` is ours. Constructor, ``repr``, initialisation,
``state_dict``, hooks, pickling and copying are torch's own code, so a checkpoint moves freely in both directions and
``isinstance(layer, torch.nn.Linear)`` stays true. To switch a model that is built already, see :func:`pyops.convert`.

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

import torch
from torch import Tensor

from pyops import functional as F

__all__ = ["Conv2d", "Linear", "MaxPool2d", "ReLU", "add_safe_globals"]


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
        return F.linear(input, self.weight, self.bias)


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
        padding = self.padding
        if self.padding_mode != "zeros":
            input = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return F.conv2d(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class MaxPool2d(torch.nn.MaxPool2d):
    """Largest value of each window. Arguments: :class:`torch.nn.MaxPool2d`.

    Shape: ``[N, C, H, W] -> [N, C, H_out, W_out]``, or both without N; with ``return_indices=True`` a pair of the
    values and their int64 positions in the flattened ``H x W`` plane. Dtypes and errors:
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


def add_safe_globals(*containers: type) -> None:
    """Let ``torch.load(..., weights_only=True)`` read whole saved modules made of our layers.

    torch's safe loader accepts state dicts and refuses every class it was not told of. This tells it of the classes of
    this module, by :func:`torch.serialization.add_safe_globals`, for the rest of the process.

    Args:
        containers: further classes the file may hold, such as the one of the network itself.

    >>> add_safe_globals(torch.nn.Sequential)
    """
    torch.serialization.add_safe_globals([ReLU, Linear, Conv2d, MaxPool2d, *containers])
