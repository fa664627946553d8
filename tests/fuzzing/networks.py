"""Random small networks that are converted, fused, reverted, patched or compiled, and compared with stock torch."""

import copy
import functools
import inspect
import random
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyops
from fuzzing.network_layers import BATCHES, CHANNELS, MOST_ELEMENTS
from fuzzing.network_results import Results, assert_same, fill, results
from fuzzing.network_source import FEATURES, Body, Value, sequential
from fuzzing.rounding import Noise

COMPILED = 0.02  # the fraction of networks that is compiled, because Dynamo is slow
SIDES = (1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 17)
MOST_FROZEN = 24  # few networks have more parameters
IMPORTS = """import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyops
"""
STOCK_LAYERS = (nn.ReLU, nn.Linear, nn.Conv2d, nn.MaxPool2d)


@dataclass(frozen=True)
class Problem:
    """A network, how it is called, and which gradients are needed."""

    seed: int  # determines all values
    source: str  # the code that makes `net`
    size: tuple[int, ...]  # the size of the input
    dtype: torch.dtype
    training: bool
    needs_grad: bool  # whether the input needs a gradient
    frozen: tuple[int, ...]  # the numbers of the parameters that are not trained
    channels_last: tuple[str, ...]  # which of "input" and "model" are
    compiled: bool

    def network(self) -> tuple[nn.Module, Tensor]:
        """The stock network and its input."""
        namespace: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "__name__": "network"}
        exec(self.source, namespace)
        net = namespace["net"].to(self.dtype)
        torch.manual_seed(self.seed)
        fill(net)
        x = torch.randn(self.size, dtype=torch.float64).to(self.dtype)
        for i, parameter in enumerate(net.parameters()):
            parameter.requires_grad_(i not in self.frozen)
        if "model" in self.channels_last:
            net = net.to(memory_format=torch.channels_last)
        if "input" in self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return net, x

    def run(self, net: nn.Module, x: Tensor, **options: Any) -> Results:
        return results(net, x, self.needs_grad, self.training, **options)

    def ways(self, stock: nn.Module, x: Tensor) -> dict[str, Callable[[], Results]]:
        """Functions that give the network's results by each route to our kernels, and after reverting."""

        @functools.cache
        def fused() -> nn.Module:
            return converted(stock, fuse=True)

        def reverted() -> Results:
            net = pyops.revert(fused())
            assert_reverted(net, stock)
            net.load_state_dict(stock.state_dict())
            return self.run(net, x)

        def patched() -> Results:
            with pyops.patch():
                return self.run(copy.deepcopy(stock), x)

        def compiled() -> Results:
            torch._dynamo.reset()
            net = copy.deepcopy(stock)
            return self.run(net, x, run=torch.compile(net, backend="pyops"))

        ways = {
            "convert": lambda: self.run(converted(stock), x),
            "convert(fuse=True)": lambda: self.run(fused(), x),
            "revert": reverted,
            "patch": patched,
        }
        if self.compiled:
            ways["torch.compile"] = compiled
        return ways

    def check(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of even kernels with padding="same"
            # oneDNN overruns buffers in the float32 gradients of strided 1x1 convolutions with channels-last weights.
            with torch.backends.mkldnn.flags(enabled=False):
                self._check()

    def _check(self) -> None:
        stock, x = self.network()

        def noisy(level: float) -> Iterator[Results]:
            yield self.run(copy.deepcopy(stock), x)  # in the problem's dtype, which rounds more than the reference
            for seed in range(12):
                with Noise(level, seed, forward=seed % 3 > 0):
                    yield self.run(copy.deepcopy(stock), x)

        try:
            expected = self.run(copy.deepcopy(stock).double(), x.double())
        except RuntimeError as error:
            if "inplace operation" not in str(error) and "in-place operation" not in str(error):
                raise
            return  # stock refuses to overwrite a tensor that it saved; we may not have saved it
        if not all(value.isfinite().all() for value in expected.values()):
            return  # two steps were enough to diverge
        # In float32 and bfloat16, stock's memory formats are those of oneDNN. In float64, its convolutions join the
        # results of groups by torch.cat, which treats channels-last 1x1 maps as contiguous.
        strides = self.dtype == torch.float64 and "groups=" not in self.source
        for way, run in self.ways(stock, x).items():
            try:
                assert_same(run(), expected, self.dtype, noisy, strides)
            except Exception as error:
                kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                raise AssertionError(f"{way}: {kind}{error}") from error

    def as_test(self) -> str:
        """A test, with its imports, that trains the network by every route and compares with stock."""
        asked = f"needs_grad={self.needs_grad}, training={self.training}"
        bounds = {torch.float64: "rtol=1e-7, atol=1e-9", torch.float32: "rtol=1e-3, atol=1e-3"}
        body = [inspect.getsource(fill), inspect.getsource(results), self.source, ""]
        body += [f"net.to({self.dtype})", f"torch.manual_seed({self.seed})", "fill(net)"]
        body += [f"x = torch.randn({self.size}, dtype=torch.float64).to({self.dtype})"]
        if self.frozen:
            body += ["for i, parameter in enumerate(net.parameters()):"]
            body += [f"    parameter.requires_grad_(i not in {self.frozen})"]
        if "model" in self.channels_last:
            body += ["net.to(memory_format=torch.channels_last)"]
        if "input" in self.channels_last:
            body += ["x = x.contiguous(memory_format=torch.channels_last)"]
        body += [f"expected = results(copy.deepcopy(net).double(), x.double(), {asked})"]
        body += [f"outcomes = [results(pyops.convert(copy.deepcopy(net), fuse=fuse), x, {asked}) for fuse in (0, 1)]"]
        body += [f"outcomes += [results(pyops.revert(pyops.convert(copy.deepcopy(net), fuse=True)), x, {asked})]"]
        body += ["with pyops.patch():", f"    outcomes += [results(copy.deepcopy(net), x, {asked})]"]
        if self.compiled:
            body += [f'outcomes += [results(net, x, {asked}, run=torch.compile(net, backend="pyops"))]']
        body += ["for outcome in outcomes:"]
        close = f"{bounds.get(self.dtype, 'rtol=0.1, atol=0.1')}, check_dtype=False"
        body += [f"    torch.testing.assert_close(outcome, expected, {close})"]
        function = f"def test_network_{self.seed}():\n" + textwrap.indent("\n".join(body), "    ") + "\n"
        return f"{IMPORTS}\n\n{function}"


def converted(stock: nn.Module, fuse: bool = False) -> nn.Module:
    net = pyops.convert(copy.deepcopy(stock), fuse=fuse)
    assert not any(type(layer) in STOCK_LAYERS for layer in net.modules()), "a layer was not converted"
    assert [*net.state_dict()] == [*stock.state_dict()], "other keys of the state_dict"
    return net


def assert_reverted(net: nn.Module, stock: nn.Module) -> None:
    ours, stocks = ([(type(layer), set(vars(layer))) for layer in each.modules()] for each in (net, stock))
    assert ours == stocks, "revert left other classes or attributes"
    assert [*net.state_dict()] == [*stock.state_dict()], "other keys of the state_dict"


# ---- drawing ----


def draw(seed: int) -> Problem:
    rng = random.Random(seed)
    batch = rng.choice(BATCHES) if rng.random() < 0.92 else None
    needs_grad = rng.random() < 0.6
    shape: tuple[int, ...] = (rng.choice(FEATURES),)
    if rng.random() < 0.85:
        shape = rng.choice(CHANNELS), rng.choice(SIDES), rng.choice(SIDES)
        while (batch or 1) * shape[0] * shape[1] * shape[2] > MOST_ELEMENTS:
            shape = (shape[0] + 1) // 2, (shape[1] + 1) // 2, shape[2]
    source = draw_source(rng, Value("x", shape, fresh=not needs_grad), batch)
    frozen: tuple[int, ...] = ()
    if rng.random() < 0.3:
        frozen = tuple(i for i in range(MOST_FROZEN) if rng.random() < rng.choice((0.3, 0.3, 1.0)))
    formats = [("input",), ("model",), ("input", "model")]
    channels_last = rng.choice(formats) if len(shape) == 3 and batch is not None and rng.random() < 0.3 else ()
    return Problem(
        seed=seed,
        source=source,
        size=shape if batch is None else (batch, *shape),
        dtype=rng.choices((torch.float64, torch.float32, torch.bfloat16), (7, 2, 1))[0],
        training=rng.random() < 0.7,
        needs_grad=needs_grad,
        frozen=frozen,
        channels_last=channels_last,
        compiled=rng.random() < COMPILED,
    )


def draw_source(rng: random.Random, value: Value, batch: int | None) -> str:
    """The source of a torch.nn.Sequential of layers, or of a class, which may use further classes of blocks."""
    classes: list[str] = []
    body = Body(rng, classes, value, batch)
    if rng.random() < 0.2:
        children, _ = sequential(body, rng.randint(2, 6))
        if any("Conv2d" in child or "Linear" in child for child in children):
            return f"net = nn.Sequential({', '.join(children)})"
    body.steps(rng.randint(1, 6))
    if len(body.value.shape) == 3 and rng.random() < 0.6:
        body.flatten()
        body.linear()
        body.steps(rng.randint(0, 4))
    while not any(word in line for line in (*classes, *body.layers) for word in ("Conv2d", "Linear", "Parameter")):
        body.linear()
    returned = body.value.name
    if body.names and rng.random() < 0.15:
        returned = f"{returned}, {rng.choice(body.names)}"
    return "\n\n\n".join([*classes, body.source("Net", returned)]) + "\n\n\nnet = Net()"
