"""pyops.convert(fuse=True) leaves everything around the layers as it is: hooks, modes and parametrizations."""

import contextlib

import pytest
import torch
from models import kinds
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import pyops


class TwoParts(nn.Module):
    """A layer inside a module of its own, followed by a ReLU that may run without gradients."""

    def __init__(self, mode=contextlib.nullcontext) -> None:
        super().__init__()
        self.part, self.relu, self.mode = nn.Sequential(nn.Linear(4, 3)), nn.ReLU(), mode

    def forward(self, x):
        y = self.part(x)
        with self.mode():
            return self.relu(y)


def test_fuse_leaves_alone_what_hooks_of_a_part_see():
    assert kinds(pyops.convert(TwoParts(), fuse=True)) == ["Sequential", "LinearReLU", "_FusedReLU"]
    net, seen = TwoParts(), []
    net.part.register_forward_hook(lambda module, args, output: seen.append(output))
    assert kinds(pyops.convert(net, fuse=True)) == ["Sequential", "Linear", "ReLU"]
    whole = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    whole.register_forward_hook(lambda module, args, output: seen.append(output))
    assert kinds(pyops.convert(whole, fuse=True)) == ["LinearReLU", "_FusedReLU"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fuse_keeps_what_has_no_gradient(mode):
    """A ReLU within torch.no_grad is not fused into the layer before it, which has a gradient."""
    net = pyops.convert(TwoParts(mode), fuse=True)
    assert kinds(net) == ["Sequential", "Linear", "ReLU"]
    assert not net(torch.ones(2, 4)).requires_grad


def test_fuse_does_not_call_train():
    """A model may do more in train() than set the mode, such as adding an adapter to its weights."""

    class Merging(TwoParts):
        def train(self, mode=True):
            raise AssertionError

    net = Merging()
    assert kinds(pyops.convert(net, fuse=True))[1] == "LinearReLU"
    assert net.training and net.relu.training


def test_a_layer_that_was_parametrized_after_fusing_is_reverted():
    net = pyops.convert(nn.Sequential(nn.Linear(4, 3), nn.ReLU()).double(), fuse=True)
    parametrizations.weight_norm(net[0])
    x = torch.randn(2, 4, dtype=torch.float64)
    expected = net(x)
    pyops.revert(net)
    assert kinds(net)[0] == "ParametrizedLinear" and type(net[1]) is nn.ReLU
    torch.testing.assert_close(net(x), expected)
    parametrize.remove_parametrizations(net[0], "weight")
    assert type(net[0]) is nn.Linear
