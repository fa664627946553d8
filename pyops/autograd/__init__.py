"""The ops as `torch.autograd.Function` subclasses, of which the functionals and layers are made.

Like the Functions in torch's tutorials, each one is called through ``apply``:

>>> import torch, pyops
>>> pyops.autograd.ReLU.apply(torch.tensor([-1.0, 2.0]))
tensor([0., 2.])
"""

from pyops.autograd.conv2d import Conv2d
from pyops.autograd.conv2d_relu import Conv2dReLU
from pyops.autograd.conv2d_relu_max_pool2d import Conv2dReLUMaxPool2d
from pyops.autograd.linear import Linear
from pyops.autograd.linear_relu import LinearReLU
from pyops.autograd.max_pool2d import MaxPool2d
from pyops.autograd.relu import ReLU

__all__ = ["Conv2d", "Conv2dReLU", "Conv2dReLUMaxPool2d", "Linear", "LinearReLU", "MaxPool2d", "ReLU"]
