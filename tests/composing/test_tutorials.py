"""The programs of the PyTorch tutorials that pyops grew from give equal results on stock torch and pyops in each step.

Each program takes the library to run on and yields the values that the tutorial prints or inspects, as (name, value)
pairs. The pairs of the two runs are compared one by one: tensors to the rounding of their dtype, everything else
exactly. (The timing loops of the fourth tutorial are benchmarks, in bench/.)
"""

import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import pyops


class MyReLU(torch.autograd.Function):
    """The fifth tutorial's own ReLU, on stock operations."""

    @staticmethod
    def forward(ctx, input):
        ctx.save_for_backward(input)
        return input.clamp(min=0)

    @staticmethod
    def backward(ctx, grad_output):
        (input,) = ctx.saved_tensors
        grad_input = grad_output.clone()
        grad_input[input < 0] = 0
        return grad_input


class Library(NamedTuple):
    """The library that a program runs on."""

    nn: ModuleType
    F: ModuleType
    MyReLU: type[torch.autograd.Function]
    matmul: Callable[[Any, Any], Any]  # multiplies two matrices
    relu: Callable[[Any], Any]


STOCK = Library(
    nn,
    nn.functional,
    MyReLU,
    lambda a, b: a @ b,
    lambda a: a.clip(min=0),
)
PYOPS = Library(
    pyops.nn,
    pyops.functional,
    pyops.autograd.ReLU,
    lambda a, b: pyops.functional.linear(a, b.T),
    pyops.functional.relu,
)
Trace = Iterator[tuple[str, Any]]


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def assert_same_trace(program: Callable[[Library], Trace], seed: int = 0) -> dict[str, Any]:
    """Runs ``program`` on both libraries from the same seed, compares, and returns the values that pyops gave."""
    traces = []
    for library in (STOCK, PYOPS):
        torch.manual_seed(seed)
        traces.append(list(program(library)))
    for (stock_name, stock), (name, ours) in zip(*traces, strict=True):
        assert name == stock_name
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, stock, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert ours == stock, name
    trace = dict(traces[1])
    assert len(trace) == len(traces[1])
    return trace


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


# The fifth tutorial: one network, y = relu(x w1) w2, in all its forms.
STEPS = 500
BATCH, D_IN, HIDDEN, D_OUT = 64, 1000, 100, 10
ADAM_LEARNING_RATE = 1e-4


def data() -> tuple[torch.Tensor, ...]:
    """x, y, w1, w2."""
    return tuple(torch.randn(size) for size in ((BATCH, D_IN), (BATCH, D_OUT), (D_IN, HIDDEN), (HIDDEN, D_OUT)))


def by_hand(library: Library) -> Iterator[float]:
    """Trains on tensors, with gradients computed by hand."""
    matmul, relu = library.matmul, library.relu
    x, y, w1, w2 = data()
    for _ in range(STEPS):
        h = matmul(x, w1)
        h_relu = relu(h)
        y_pred = matmul(h_relu, w2)
        yield (y_pred - y).pow(2).sum().item()
        grad_y_pred = 2.0 * (y_pred - y)
        grad_w2 = matmul(h_relu.T, grad_y_pred)
        grad_h = matmul(grad_y_pred, w2.T)
        grad_h[h < 0] = 0
        grad_w1 = matmul(x.T, grad_h)
        w1 -= 1e-6 * grad_w1
        w2 -= 1e-6 * grad_w2


def in_numpy(library: Library) -> Iterator[float]:
    """Trains on numpy arrays, with gradients computed by hand; pyops shares the memory of the arrays."""
    if library is STOCK:
        matmul, relu = np.dot, lambda a: np.maximum(a, 0)
    else:

        def matmul(a, b):
            return library.matmul(torch.from_numpy(a), torch.from_numpy(b)).numpy()

        def relu(a):
            return library.relu(torch.from_numpy(a)).numpy()

    x, y, w1, w2 = (tensor.numpy() for tensor in data())
    for _ in range(STEPS):
        h = matmul(x, w1)
        h_relu = relu(h)
        y_pred = matmul(h_relu, w2)
        yield float(np.square(y_pred - y).sum())
        grad_y_pred = 2.0 * (y_pred - y)
        grad_w2 = matmul(h_relu.T, grad_y_pred)
        grad_h = matmul(grad_y_pred, w2.T)
        grad_h[h < 0] = 0
        grad_w1 = matmul(x.T, grad_h)
        w1 -= 1e-6 * grad_w1
        w2 -= 1e-6 * grad_w2


def with_autograd(library: Library, relu: Callable[[Any], Any] | None = None) -> Iterator[float]:
    """Trains with gradients computed by autograd."""
    relu = relu or library.relu
    x, y, w1, w2 = data()
    w1.requires_grad_()
    w2.requires_grad_()
    for _ in range(STEPS):
        loss = (library.matmul(relu(library.matmul(x, w1)), w2) - y).pow(2).sum()
        yield loss.item()
        loss.backward()
        with torch.no_grad():
            for weight in (w1, w2):
                weight -= 1e-6 * weight.grad
                weight.grad.zero_()


def with_my_relu(library: Library) -> Iterator[float]:
    """Trains with a user-defined Function."""
    return with_autograd(library, library.MyReLU.apply)


def sequential(library: Library) -> nn.Module:
    return nn.Sequential(library.nn.Linear(D_IN, HIDDEN), library.nn.ReLU(), library.nn.Linear(HIDDEN, D_OUT))


def with_sequential(library: Library) -> Iterator[float]:
    """Trains a module, with the update computed by hand."""
    x, y, *_ = data()
    model = sequential(library)
    for _ in range(STEPS):
        loss = nn.MSELoss(reduction="sum")(model(x), y)
        yield loss.item()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-4 * parameter.grad


def optimized(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> Iterator[float]:
    for _ in range(STEPS):
        loss = nn.MSELoss(reduction="sum")(model(x), y)
        yield loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def with_adam(library: Library) -> Iterator[float]:
    x, y, *_ = data()
    model = sequential(library)
    return optimized(model, torch.optim.Adam(model.parameters(), lr=ADAM_LEARNING_RATE), x, y)


def with_custom_module(library: Library) -> Iterator[float]:
    """Trains a user-defined module, with a clamp for the ReLU."""

    class TwoLayerNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear1 = library.nn.Linear(D_IN, HIDDEN)
            self.linear2 = library.nn.Linear(HIDDEN, D_OUT)

        def forward(self, x):
            return self.linear2(self.linear1(x).clamp(min=0))

    x, y, *_ = data()
    model = TwoLayerNet()
    return optimized(model, torch.optim.SGD(model.parameters(), lr=1e-4), x, y)


FORMS = [in_numpy, by_hand, with_autograd, with_my_relu, with_sequential, with_adam, with_custom_module]


@pytest.mark.parametrize("form", FORMS)
def test_two_layer_net(dtype, form):
    torch.set_num_threads(1)  # a network this small gains nothing from more, and loses much on a busy machine
    curves = []
    for library in (STOCK, PYOPS):
        torch.manual_seed(0)
        curves.append(list(form(library)))
    stock, ours = (torch.tensor(curve, dtype=torch.float64) for curve in curves)
    assert len(ours) == STEPS
    # The square root of the loss is the norm of the residual y_pred - y. Each rounding error in it is proportional to
    # the numbers that were rounded, however small the residual has become; those of the first step are the largest.
    rounding = 16 * torch.finfo(dtype).eps
    if form is with_adam and dtype is torch.float32:
        # Adam moves a weight by the learning rate however small its gradient is, so a weight whose gradient is mostly
        # rounding error moves in either direction. Some of 100,000 weights do so in float32, and none in float64.
        rounding = ADAM_LEARNING_RATE
    torch.testing.assert_close(ours.sqrt(), stock.sqrt(), rtol=rounding, atol=rounding * stock[0].sqrt().item())
    assert ours[-1] < 1e-6 * ours[0]
