"""How far rounding can move the results of a network: its ops are run with noise on what they compute.

A network's results are no sums whose rounding errors could be bounded from its shapes: a value next to a kink of ReLU,
two that nearly tie in a pooling, or a gradient that cancels out, make them as inexact as they like. So what was found
to differ is held against the same stock network under noise that is larger than any rounding error.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# What computes new values. The others pass on values that they are given, in order, in part, or zeros in their place;
# equal values remain equal there, and the rules for ties stay stock's.
_COMPUTE = {F.linear, torch.conv2d, F.batch_norm, F.adaptive_avg_pool2d, F.avg_pool2d, torch.tanh, torch.sigmoid}
_COMPUTE |= {F.gelu, F.leaky_relu, torch.add, Tensor.add, Tensor.__add__, Tensor.__iadd__, Tensor.__mul__, Tensor.mul}


class Noise(TorchFunctionMode):
    """Adds noise to the result of each op and to the gradient that comes back to it: `level` times the largest
    magnitude of the tensor, times a normal variable. Zeros stay zeros: what is zero without cancellation is exact."""

    def __init__(self, level: float, seed: int) -> None:
        super().__init__()
        self.level, self.generator = level, torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _COMPUTE:
            return result
        noisy = result + self.noise(result.detach())
        if noisy.requires_grad:
            noisy.register_hook(lambda grad: grad + self.noise(grad))
        return noisy

    def noise(self, values: Tensor) -> Tensor:
        if values.numel() == 0:
            return values
        draws = torch.randn(values.shape, generator=self.generator, dtype=values.dtype)
        return draws * (values != 0) * (self.level * values.abs().max())
