"""The ops as `torch.autograd.Function` subclasses: what the functionals and layers are made of.

Each is used as the Functions of torch's tutorials are, by ``apply``:

>>> import torch, pyops
>>> pyops.autograd.ReLU.apply(torch.tensor([-1.0, 2.0]))
tensor([0., 2.])
"""

from pyops.autograd.conv2d import Conv2d
from pyops.autograd.linear import Linear
from pyops.autograd.max_pool2d import MaxPool2d
from pyops.autograd.relu import ReLU

__all__ = ["Conv2d", "Linear", "MaxPool2d", "ReLU"]
