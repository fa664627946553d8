"""Records which operators a piece of code calls, forward and backward, to prove that the kernels are ours."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

STOCK_NAMES = ("relu", "threshold", "clamp", "addmm", "bmm", "mm", "matmul", "linear", "conv", "max_pool")


class KernelLog(TorchDispatchMode):
    """``with KernelLog() as log: ...`` puts the names of pyops' ops in ``log.ours``, and of rivals in ``log.stock``."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: set[str] = set()
        self.stock: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "pyops":
            self.ours.add(name)
        elif any(part in name for part in STOCK_NAMES):
            self.stock.add(name)
        return func(*args, **(kwargs or {}))


def kernels_of_training(op: str) -> set[str]:
    """The operators that a call of `op` and its backward reach if a gradient is needed."""
    special = {
        "relu": {"relu_with_mask", "relu_mask_backward"},
        "relu_": {"relu_", "relu_backward"},
        "conv2d_relu_max_pool2d": {"conv2d_relu_max_pool2d_with_argmax", "conv2d_relu_max_pool2d_backward"},
    }
    return special.get(op, {op, f"{op}_backward"})


def run_backward(output: torch.Tensor) -> None:
    """Runs backward from every element of ``output``, with gradients that differ."""
    output.backward(torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).reshape(output.shape))
