"""Whole networks on pyops' layers against the same networks on stock torch's: `python bench/lenet.py --help`."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from harness import FLOOR, Group, Work, main
from torch import Tensor, func
from torch.utils.flop_counter import FlopCounterMode

import pyops
from pyops.lenet import StockLeNet


class Library(NamedTuple):
    """The library that the layers come from."""

    nn: ModuleType
    LeNet: Callable[[], torch.nn.Module]


@dataclass(frozen=True)
class Program:
    """One computation: the function that `build` makes from the layers of either library."""

    name: str
    build: Callable[[Library], Callable[[], Tensor | tuple[Tensor, ...]]]
    gate: float = FLOOR
    dtype: torch.dtype = torch.float32
    limit_gate: float = 0
    fused: bool = False  # whether ours is LeNet(fused=True)

    def prepare(self) -> Work:
        steps = []
        for library in (Library(torch.nn, StockLeNet), Library(pyops.nn, partial(pyops.LeNet, fused=self.fused))):
            torch.manual_seed(0)  # so that both have equal parameters and data
            steps.append(self.build(library))
        stock, ours = steps
        with FlopCounterMode(display=False) as counter:
            stock()
        ours()  # as often as stock's, because a training step changes the parameters
        return Work(stock, ours, flops=counter.get_total_flops(), bytes=0)


def training_pass(net: torch.nn.Module, input: Tensor) -> Callable[[], Tensor]:
    grad_output = torch.randn_like(net(input))

    def step() -> Tensor:
        net.zero_grad()
        output = net(input)
        output.backward(grad_output)
        return output

    return step


def lenet_training_pass(batch: int, library: Library) -> Callable[[], Tensor]:
    return training_pass(library.LeNet(), torch.randn(batch, 1, 32, 32))


def lenet_forward(batch: int, library: Library) -> Callable[[], Tensor]:
    return torch.no_grad()(partial(library.LeNet(), torch.randn(batch, 1, 32, 32)))


def lenet_gradients_of_each_sample(batch: int, library: Library) -> Callable[[], tuple[Tensor, ...]]:
    net = library.LeNet()
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}
    images, labels = torch.randn(batch, 1, 32, 32), torch.randint(10, (batch,))

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(func.functional_call(net, parameters, (image,)), label)

    gradients = func.vmap(func.grad(loss), in_dims=(None, 0, 0))
    return lambda: tuple(gradients(parameters, images, labels).values())


CALLS = 8


def lenet_forward_in_python_threads(threads: int, library: Library) -> Callable[[], Tensor]:
    forward, inputs = torch.no_grad()(library.LeNet()), torch.randn(CALLS, 64, 1, 32, 32)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    return lambda: torch.cat(list(pool.map(forward, inputs)))


def two_layer_net(library: Library) -> Callable[[], Tensor]:
    nn = library.nn
    return training_pass(
        torch.nn.Sequential(nn.Linear(1000, 100), nn.ReLU(), nn.Linear(100, 10)), torch.randn(64, 1000)
    )


def tutorial_backward(library: Library) -> Callable[[], Tensor]:
    net, input = library.LeNet(), torch.randn(1, 1, 32, 32)

    def step() -> Tensor:
        output = net(input)
        net.zero_grad()
        output.backward(torch.randn(1, 10))
        return output

    return step


def tutorial_sgd_step(library: Library) -> Callable[[], Tensor]:
    net, input, target = library.LeNet(), torch.randn(1, 1, 32, 32), torch.randn(1, 10)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    criterion = torch.nn.MSELoss()

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = criterion(net(input), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


# Kernels with narrower vectors gain less over stock.
CAPABILITY_FACTOR = 0.8 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 1

GROUPS = [
    Group(
        "zero_grad, forward and backward of LeNet 5x5",
        [
            Program(f"LeNet training, batch {batch}", partial(lenet_training_pass, batch), gate * CAPABILITY_FACTOR)
            for batch, gate in ((1, 1.7), (64, 2.8), (1024, 3.5))
        ],
    ),
    Group(
        "the same with fused blocks",
        [
            Program(
                f"LeNet(fused=True) training, batch {batch}",
                partial(lenet_training_pass, batch),
                gate * CAPABILITY_FACTOR,
                fused=True,
            )
            for batch, gate in ((1, 2.3), (64, 3.3), (1024, 4.5))
        ],
    ),
    Group(
        "forward of LeNet 5x5 under no_grad",
        [Program(f"LeNet inference, batch {batch}", partial(lenet_forward, batch)) for batch in (1, 64, 1024)]
        + [
            Program(
                f"LeNet(fused=True) inference, batch {batch}",
                partial(lenet_forward, batch),
                gate * CAPABILITY_FACTOR,
                fused=True,
            )
            for batch, gate in ((1, 3), (64, 6), (1024, 8))
        ],
    ),
    Group(
        "gradients of each sample of LeNet 5x5, by vmap(grad)",
        [
            Program(
                f"LeNet{'(fused=True)' * fused} vmap(grad), batch {n}",
                partial(lenet_gradients_of_each_sample, n),
                fused=fused,
            )
            for n in (8, 64, 256)
            for fused in (False, True)
        ],
    ),
    # Each Python thread computes on itself alone, whatever number of threads the lines of this group state. The time of
    # the first line divided by that of another line tells how the threads scale.
    Group(
        "forward of LeNet 5x5 by several threads of Python at once",
        [
            Program(
                f"{CALLS} of LeNet inference, batch 64, by {n} of Python", partial(lenet_forward_in_python_threads, n)
            )
            for n in (1, 2, 4)
        ],
    ),
    Group(
        "zero_grad, forward and backward of the two-layer net",
        [Program("64x1000-100-10 training", two_layer_net, 1.1)],
    ),
    Group(
        "timing loops of the tutorial: LeNet 5x5, batch 1 (its author saw 955 us and 896 us)",
        [
            Program("forward + backward (author: 955 us)", tutorial_backward),
            Program("step of SGD (author: 896 us)", tutorial_sgd_step),
        ],
    ),
]

if __name__ == "__main__":
    main("Time training and inference of whole networks on pyops' layers against stock torch's.", GROUPS)
