"""The programs of the PyTorch tutorials that pyops grew from give equal results on stock torch and pyops in each step.

Each program takes the library to run on and yields the values that the tutorial prints or inspects, as (name, value)
pairs. The pairs of the two runs are compared one by one: tensors to the rounding of their dtype, everything else
exactly. (The timing loops of the fourth tutorial are benchmarks, in bench/.)
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from libraries import PYOPS, Library, Trace, assert_same_trace
from torch import nn

import pyops


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def named_grads(net: nn.Module, when: str) -> Trace:
    return ((f"gradient of {name} {when}", parameter.grad) for name, parameter in net.named_parameters())


def named_values(net: nn.Module, when: str) -> Trace:
    return ((f"{name} {when}", parameter.detach().clone()) for name, parameter in net.named_parameters())


def fully_connected(library: Library) -> Trace:
    """The first tutorial."""
    F = library.F

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = library.nn.Linear(2, 2)
            self.fc2 = library.nn.Linear(2, 1)

        def forward(self, x):
            x = F.relu(self.fc1(x))
            return F.relu(self.fc2(x))

    net = Net()
    yield "repr", repr(net)
    yield "sizes", [parameter.size() for parameter in net.parameters()]
    input = torch.randn(1, 2)
    out = net(input)
    yield "out", out
    net.zero_grad()
    with pytest.raises(RuntimeError, match="Mismatch in shape") as info:
        out.backward(torch.randn(1, 10))
    yield "error", str(info.value)
    out.backward(torch.randn(1, 1))
    yield from named_grads(net, "after backward")

    target = torch.randn(4).view(1, -1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = nn.MSELoss()(net(input), target)
    yield "warnings", [(warning.category, str(warning.message)) for warning in caught]
    yield "loss", loss
    net.zero_grad()
    loss.backward()
    yield from named_grads(net, "of the loss")
    torch.optim.SGD(net.parameters(), lr=0.01).step()
    yield from named_values(net, "after SGD")


def test_fully_connected(dtype):
    trace = assert_same_trace(fully_connected, seed=176)  # with this seed no ReLU gives 0, so no gradient is 0
    for name, value in trace.items():
        assert not name.startswith("gradient") or value.all()
    assert trace["error"] == (
        "Mismatch in shape: grad_output[0] has a shape of torch.Size([1, 10]) "
        "and output[0] has a shape of torch.Size([1, 1])."
    )
    ((category, message),) = trace["warnings"]
    assert category is UserWarning
    assert message.startswith("Using a target size (torch.Size([1, 4]))")


# Parts of the names of both libraries' graph nodes, and the kinds that they stand for; the first match counts.
NODE_KINDS = {"mse": "loss", "addmm": "linear", "linear": "linear", "conv": "conv2d", "pool": "max_pool2d"}
NODE_KINDS |= {"relu": "relu", "view": "view"}


def walk(node: Any, names: dict[int, str]) -> Iterator[str | list[str]]:
    """Walks from the loss back to the input along ``next_functions``: the kind of each node, and its parameters."""
    while node is not None:
        yield next(kind for part, kind in NODE_KINDS.items() if part in node.name().lower())
        parameters, following = set(), None
        for parent in (parent for parent, _ in node.next_functions if parent is not None):
            if parent.name() == "TBackward0":  # stock's linear transposes its weight in the graph
                ((parent, _),) = parent.next_functions
            if parent.name() == "torch::autograd::AccumulateGrad":
                parameters.add(names[id(parent.variable)])
            else:
                assert following is None
                following = parent
        yield sorted(parameters)
        node = following


def tutorial_net(library: Library, kernel_size: int) -> nn.Module:
    """The network as it is written in the tutorials."""
    F = library.F
    side = {3: 6, 5: 5}[kernel_size]

    class LeNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = library.nn.Conv2d(1, 6, kernel_size)
            self.conv2 = library.nn.Conv2d(6, 16, kernel_size)
            self.fc1 = library.nn.Linear(16 * side * side, 120)
            self.fc2 = library.nn.Linear(120, 84)
            self.fc3 = library.nn.Linear(84, 10)

        def forward(self, x):
            x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
            x = F.max_pool2d(F.relu(self.conv2(x)), 2)
            x = x.view(-1, self.num_flat_features(x))
            x = F.relu(self.fc1(x))
            x = F.relu(self.fc2(x))
            return self.fc3(x)

        def num_flat_features(self, x):
            return x[0].numel()

    return LeNet()


def lenet(library: Library, build: Callable[[Library], nn.Module]) -> Trace:
    """The second tutorial has 3x3 kernels, the third has 5x5."""
    net = build(library)
    yield "repr", repr(net)
    params = list(net.parameters())
    yield "sizes", [tuple(parameter.size()) for parameter in params]
    input = torch.randn(1, 1, 32, 32)
    out = net(input)
    yield "out", out
    net.zero_grad()
    out.backward(torch.randn(1, 10))
    yield from named_grads(net, "after backward")

    output = net(input)
    target = torch.randn(10).view(1, -1)
    criterion = nn.MSELoss()
    loss = criterion(output, target)
    yield "loss", loss
    yield "graph", list(walk(loss.grad_fn, {id(parameter): name for name, parameter in net.named_parameters()}))

    net.zero_grad()
    yield "conv1.bias.grad before backward", net.conv1.bias.grad
    loss.backward()
    yield "conv1.bias.grad after backward", net.conv1.bias.grad
    yield from named_grads(net, "of the loss")

    learning_rate = 0.01
    for parameter in params:
        parameter.data.sub_(parameter.grad.data * learning_rate)
    yield from named_values(net, "after SGD by hand")

    optimizer = torch.optim.SGD(params, lr=learning_rate)
    for step in range(3):
        optimizer.zero_grad()
        loss = criterion(net(input), target)
        loss.backward()
        optimizer.step()
        yield f"loss of step {step}", loss
        yield from named_values(net, f"after step {step} of torch.optim.SGD")


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_lenet(dtype, kernel_size):
    trace = assert_same_trace(lambda library: lenet(library, lambda library: tutorial_net(library, kernel_size)))
    k, in_features = kernel_size, {3: 16 * 6 * 6, 5: 16 * 5 * 5}[kernel_size]
    assert trace["sizes"] == [
        *((6, 1, k, k), (6,), (16, 6, k, k), (16,)),
        *((120, in_features), (120,), (84, 120), (84,), (10, 84), (10,)),
    ]
    assert trace["graph"] == [
        *("loss", [], "linear", ["fc3.bias", "fc3.weight"]),
        *("relu", [], "linear", ["fc2.bias", "fc2.weight"], "relu", [], "linear", ["fc1.bias", "fc1.weight"]),
        *("view", [], "max_pool2d", [], "relu", [], "conv2d", ["conv2.bias", "conv2.weight"]),
        *("max_pool2d", [], "relu", [], "conv2d", ["conv1.bias", "conv1.weight"]),
    ]
    assert trace["conv1.bias.grad before backward"] is None
    assert trace["conv1.bias.grad after backward"].abs().max() > 0
    losses = [trace["loss"], *(trace[f"loss of step {step}"] for step in range(3))]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_our_lenet_is_the_tutorials(dtype, kernel_size):
    assert_same_trace(
        lambda library: lenet(
            library,
            lambda library: pyops.LeNet(kernel_size) if library is PYOPS else tutorial_net(library, kernel_size),
        )
    )
