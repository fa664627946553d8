"""Estimates how far rounding can move the results of a network, by running its ops with noise on their results.

The rounding errors of a network cannot be bounded from its shapes, as those of a sum can: a value next to a kink of
ReLU, two values that nearly tie in a pooling, or a gradient that cancels out can make them arbitrarily large. So
results that differ are compared with those of the stock network under noise that is larger than any rounding error.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# The functions that compute new values. The others return values of their arguments, some of them, or zeros in their
# place; they get no noise, so that equal values remain equal and the rules for ties stay stock's.
_COMPUTE = {F.linear, torch.conv2d, F.batch_norm, F.adaptive_avg_pool2d, F.avg_pool2d, torch.tanh, torch.sigmoid}
_COMPUTE |= {F.gelu, F.leaky_relu, torch.add, Tensor.add, Tensor.__add__, Tensor.__iadd__, Tensor.__mul__, Tensor.mul}


class Noise(TorchFunctionMode):
    """Adds noise to the gradient of each op's result and, if `forward`, to the result. The noise is `level` times the
    largest magnitude of the tensor, times a normal variable. Zeros stay zeros, because a value that is zero without
    cancellation is exact.

    Noise in the forward can be left out, because it is no model of rounding if all values of a channel are equal, for
    example after a ReLU that passes nothing: a batch normalization of such values has much larger gradients without
    noise.
    """

    def __init__(self, level: float, seed: int, forward: bool) -> None:
        super().__init__()
        self.level, self.generator, self.forward = level, torch.Generator().manual_seed(seed), forward

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _COMPUTE:
            return result
        if self.forward:
            result = result + self.noise(result.detach())
        if result.requires_grad:
            result.register_hook(lambda grad: grad + self.noise(grad))
        return result

    def noise(self, values: Tensor) -> Tensor:
        if values.numel() == 0:
            return values
        draws = torch.randn(values.shape, generator=self.generator, dtype=values.dtype)
        return draws * (values != 0) * (self.level * values.abs().max())
