"""The networks that bench/compile.py times, as stock models for tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))  # as `python bench/compile.py` does

from networks import NETWORKS as MODELS  # noqa: F401

# The fused calls that each network becomes.
FUSED = {
    "LeNet": {"conv2d_relu_max_pool2d": 2, "linear_relu": 2},
    "AlexNet": {"conv2d_relu_max_pool2d": 2, "conv2d_relu": 1, "linear_relu": 2},
    "VGG": {"conv2d_relu": 1, "conv2d_relu_max_pool2d": 1, "linear_relu": 1},
    "ResNet": {},
    "MobileNet": {"conv2d_relu": 2},
}
