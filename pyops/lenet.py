"""LeNet, the network of the PyTorch tutorials, on pyops' layers and on torch's."""

from functools import partial
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from pyops import functional, nn

__all__ = ["LeNet", "StockLeNet"]

# Side of the second pooled plane by kernel size: 32 -> 28 -> 14 -> 10 -> 5 and 32 -> 30 -> 15 -> 13 -> 6.
_POOLED_SIDE = {5: 5, 3: 6}


class LeNet(torch.nn.Module):
    """Two convolutions and three fully connected layers that tell handwritten digits apart.

    ``conv1 (1 -> 6), ReLU, 2x2 max-pool, conv2 (6 -> 16), ReLU, 2x2 max-pool, fc1 (-> 120), ReLU, fc2 (-> 84), ReLU,
    fc3 (-> num_classes)``; after LeCun et al., "Gradient-based learning applied to document recognition", 1998, as the
    PyTorch tutorials write it.

    Args:
        kernel_size: side of both convolution kernels, 5 or 3 (the tutorials show both).
        num_classes: number of outputs.
        fused: make each convolution with its ReLU and pooling, and each linear layer with its ReLU, one layer. This is
            faster and needs less memory; the results and the ``state_dict`` are the same.

    Shape: ``[N, 1, 32, 32] -> [N, num_classes]``, or ``[1, 32, 32] -> [num_classes]``.

    Raises:
        ValueError: ``kernel_size`` is neither 5 nor 3.

    >>> LeNet()(torch.ones(2, 1, 32, 32)).shape
    torch.Size([2, 10])
    >>> LeNet(kernel_size=3).fc1
    Linear(in_features=576, out_features=120, bias=True)
    """

    _layers: ClassVar[ModuleType] = nn
    _functional: ClassVar[ModuleType] = functional

    def __init__(self, kernel_size: int = 5, num_classes: int = 10, fused: bool = False) -> None:
        super().__init__()
        if kernel_size not in _POOLED_SIDE:
            raise ValueError(f"LeNet: kernel_size must be 5 or 3, got {kernel_size}")
        side = _POOLED_SIDE[kernel_size]
        self.fused = fused
        conv = partial(nn.ConvReLUMaxPool2d, pool_kernel_size=2) if fused else self._layers.Conv2d
        linear = nn.LinearReLU if fused else self._layers.Linear
        self.conv1 = conv(1, 6, kernel_size)
        self.conv2 = conv(6, 16, kernel_size)
        self.fc1 = linear(16 * side * side, 120)
        self.fc2 = linear(120, 84)
        self.fc3 = self._layers.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        layers = self._modules  # a faster look-up than that of attributes like self.conv1
        conv1, conv2, fc1, fc2, fc3 = (layers[name] for name in ("conv1", "conv2", "fc1", "fc2", "fc3"))
        if self.fused:
            return fc3(fc2(fc1(conv2(conv1(x)).flatten(-3))))
        F = self._functional
        x = F.max_pool2d(F.relu(conv1(x)), 2)  # [N, 6, 14, 14]; 3x3: [N, 6, 15, 15]
        x = F.max_pool2d(F.relu(conv2(x)), 2)  # [N, 16, 5, 5];  3x3: [N, 16, 6, 6]
        x = x.flatten(-3)
        x = F.relu(fc1(x))
        x = F.relu(fc2(x))
        return fc3(x)


class StockLeNet(LeNet):
    """LeNet on ``torch.nn`` and ``torch.nn.functional`` alone, with which :class:`LeNet` is compared.

    Arguments and ``state_dict`` keys are those of :class:`LeNet`, and equal seeds give equal initial parameters.

    >>> net = StockLeNet()
    >>> net.load_state_dict(LeNet().state_dict())
    <All keys matched successfully>
    """

    _layers = torch.nn
    _functional = torch.nn.functional

    def __init__(self, kernel_size: int = 5, num_classes: int = 10) -> None:
        super().__init__(kernel_size, num_classes)
