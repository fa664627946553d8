"""The two-layer network of the fifth PyTorch tutorial trains alike on stock torch and pyops, in all its forms."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from libraries import PYOPS, STOCK, Library
from torch import nn


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


# The network is y = relu(x w1) w2.
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
