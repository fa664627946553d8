"""The networks that bench/compile.py times, as stock models for tests."""

from networks import NETWORKS as MODELS  # noqa: F401
from torch import nn

# The fused calls that each network becomes.
FUSED = {
    "LeNet": {"conv2d_relu_max_pool2d": 2, "linear_relu": 2},
    "AlexNet": {"conv2d_relu_max_pool2d": 2, "conv2d_relu": 1, "linear_relu": 2},
    "VGG": {"conv2d_relu": 1, "conv2d_relu_max_pool2d": 1, "linear_relu": 1},
    "ResNet": {},
    "MobileNet": {"conv2d_relu": 2},
}


def kinds(net: nn.Module) -> list[str]:
    """The class names of the layers, in order."""
    return [type(layer).__name__ for layer in net.modules()][1:]
