"""Custom autograd ops for PyTorch with hand-written C++ and CUDA kernels.

`pyops.functional` and `pyops.nn` hold the replacements for torch's relu, linear, conv2d and max_pool2d.
`pyops.autograd` holds the `torch.autograd.Function`s that they are made of, and `torch.ops.pyops` the operators
beneath.

>>> import torch, pyops
>>> pyops.functional.relu(torch.tensor([-1.0, 2.0]))
tensor([0., 2.])
"""

from pyops import _load, autograd, functional, nn, testing
from pyops.convert import convert, revert
from pyops.lenet import LeNet
from pyops.patch import patch

__version__ = _load.build_info.version
__all__ = ["LeNet", "autograd", "convert", "functional", "nn", "patch", "revert", "testing"]
