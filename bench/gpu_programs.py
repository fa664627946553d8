"""Checks on a GPU what the emulator of the tests cannot show: ``python bench/gpu_programs.py [NAME...]``.

Results are compared with stock torch's on the CPU in float64. Each program takes the device, so that those without
streams and graphs run on "cpu" too; this is how they are tested on a machine without a GPU.
"""

import argparse
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import pyops
from pyops import functional

BATCHES = (65535, 65536, 65537, 200_000)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def assert_close(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Asserts that the values agree within the tolerance of the dtype, relative to the largest value."""
    error = (actual.cpu().double() - expected.cpu().double()).abs().max() if actual.numel() else torch.tensor(0.0)
    size = expected.double().abs().max().item() if expected.numel() else 0.0
    assert error.item() <= TOLERANCE[actual.dtype] * max(size, 1.0), f"{what}: off by {error.item():.3g} of {size:.3g}"


def operands(*sizes: Sequence[int], dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]


def results(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and the gradient of each tensor, for a gradient of ones."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))]


def calls(module) -> dict[str, tuple[Callable[..., torch.Tensor], list[Sequence[int]]]]:
    """A call of each op, of stock's functional or ours, with sizes that fill no tile and no warp."""
    image, weight, bias = (3, 5, 13, 11), (7, 5, 3, 3), (7,)
    channels = (2, 16, 12, 9)
    tiny = [(3, 6, 14, 14), (16, 6, 5, 5), (16,)]

    def pooled(x, w, b):
        if module is functional:
            return functional.conv2d_relu_max_pool2d(x, w, b, pool_kernel_size=2)
        return module.max_pool2d(module.relu(module.conv2d(x, w, b)), 2)

    return {
        "relu": (module.relu, [(1003,)]),
        "linear": (module.linear, [(65, 131), (70, 131), (70,)]),
        "conv2d": (module.conv2d, [image, weight, bias]),
        "conv2d, padded": (lambda *t: module.conv2d(*t, padding=1, stride=2), [image, weight, bias]),
        "conv2d, depthwise": (lambda *t: module.conv2d(*t, padding=1, groups=16), [channels, (16, 1, 3, 3), (16,)]),
        "conv2d, narrow groups": (lambda *t: module.conv2d(*t, padding=1, groups=4), [channels, (24, 4, 3, 3), (24,)]),
        "conv2d, grouped": (lambda *t: module.conv2d(*t, padding=1, groups=5), [image, (10, 1, 3, 3), (10,)]),
        "conv2d, few channels": (module.conv2d, tiny),
        "conv2d_relu_max_pool2d": (pooled, tiny),
        "max_pool2d, non-overlapping": (lambda x: module.max_pool2d(x, 2), [channels]),
        "max_pool2d": (lambda x: module.max_pool2d(x, 3, 2, 1), [image]),
    }


def every_op(device: str) -> None:
    """Every op runs forward, with and without a gradient, and backward, in each dtype and layout."""
    ours, stock = calls(functional), calls(torch.nn.functional)
    for name, (function, sizes) in ours.items():
        for dtype in TOLERANCE:
            for format in (torch.contiguous_format, torch.channels_last):
                torch.manual_seed(0)
                tensors = operands(*sizes, dtype=dtype)
                if tensors[0].dim() == 4:
                    tensors[0] = tensors[0].contiguous(memory_format=format)
                expected = results(stock[name][0], [tensor.double() for tensor in tensors])
                tensors = [tensor.to(device) for tensor in tensors]
                actual = results(function, tensors)
                assert torch.equal(function(*tensors), actual[0]), f"{name}, {dtype}: another output without gradient"
                if dtype in (torch.bfloat16, torch.float16) and ("pool" in name or "relu" in name):
                    actual, expected = actual[:1], expected[:1]  # rounding decides the winners, and so the gradients
                for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
                    assert_close(f"{name}, {dtype}, result {i}", a, e)


def training_step(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], torch.Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def lenet(device: str, batch: int) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = pyops.LeNet(fused=True).to(device)
    return net, torch.randn(batch, 1, 32, 32).to(device), torch.randint(10, (batch,)).to(device)


def same_bits(device: str) -> None:
    """Training gives the same bits in every run."""
    runs = []
    for _ in range(2):
        net, x, y = lenet(device, 64)
        step = training_step(net, x, y)
        losses = [step().item() for _ in range(5)]
        runs.append([torch.tensor(losses), *(p.detach().cpu() for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@dataclass
class Replay:
    """A call that was captured as a graph. A replay returns the tensors that hold its results."""

    graph: torch.cuda.CUDAGraph
    result: Any
    call: Callable[[], Any]  # keeps the tensors alive that the graph reads and writes

    def __call__(self) -> Any:
        self.graph.replay()
        return self.result


def captured(prepare: Callable[[], Callable[[], Any]]) -> Replay:
    """A graph of the call that `prepare` gives, captured after the call has been run three times.

    All of this happens on one stream, because autograd runs a backward on the stream of its forward, and this must be
    the stream that is captured.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = prepare()
        for _ in range(3):
            call()
    with torch.cuda.graph(graph, stream=stream):
        result = call()
    torch.cuda.current_stream().wait_stream(stream)
    return Replay(graph, result, call)


def graph(device: str) -> None:
    """A captured training step, replayed, gives the bits of the step itself."""
    net, x, y = lenet(device, 64)
    step = training_step(net, x, y)
    expected = [step().item() for _ in range(8)][3:]  # three steps precede the capture, which itself computes nothing
    replay = captured(lambda: training_step(*lenet(device, 64)))
    actual = [replay().item() for _ in expected]
    assert actual == expected, (actual, expected)


def stream(device: str) -> None:
    """The ops run on the current stream: a result is right although its input is ready only late on that stream."""
    x = torch.randn(1 << 20, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        y = x * -1
        z = functional.relu(y)
    side.synchronize()
    assert torch.equal(z, (-x).clamp(min=0))


def threads(device: str) -> None:
    """Two threads run every op at the same time."""
    failures = []

    def work() -> None:
        try:
            every_op(device)
        except BaseException as error:
            failures.append(error)

    both = [threading.Thread(target=work) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert not failures, failures


def batches(device: str) -> None:
    """Batches around the limit of a grid's second and third dimension, and far beyond it, give right results."""
    for batch in BATCHES:
        torch.manual_seed(0)
        for name in ("conv2d_relu_max_pool2d", "conv2d, many", "conv2d, depthwise", "linear", "max_pool2d"):
            image, weight, options = (batch, 2, 6, 6), (2, 2, 3, 3), {}
            match name:
                case "conv2d, many":  # computed as a matrix product
                    image, weight = (batch, 17, 3, 3), (3, 17, 3, 3)
                case "conv2d, depthwise":
                    weight, options = (2, 1, 3, 3), {"groups": 2}
                case "linear":
                    image, weight = (batch, 8), (3, 8)

            def compute(module, *t, name=name, options=options):
                if name == "max_pool2d":
                    return module.max_pool2d(t[0], 2) + 0 * t[1].sum() + 0 * t[2].sum()
                if "relu" in name:
                    return calls(module)[name][0](*t)
                return getattr(module, name.split(",")[0])(*t, **options)

            tensors = operands(image, weight, weight[:1], dtype=torch.float32)
            expected = results(lambda *t: compute(torch.nn.functional, *t), [t.double() for t in tensors])
            actual = results(lambda *t: compute(functional, *t), [t.to(device) for t in tensors])
            compared = 1 if "relu" in name else None  # rounding decides some of the million winners
            for i, (a, e) in enumerate(zip(actual[:compared], expected[:compared], strict=True)):
                assert_close(f"{name}, batch {batch}, result {i}", a, e)


def large(device: str) -> None:
    """Results are right for more than 2^31 elements: 2 GB of int8 for relu, 4.3 GB of bfloat16 for the others."""
    x = torch.full((2**31 + 77,), -1, dtype=torch.int8, device=device)
    x[-1] = 5
    y = functional.relu(x)
    assert y[-1] == 5 and y[:-1].max() == 0
    del x, y
    x = torch.zeros(2**15 + 1, 1, 256, 256, dtype=torch.bfloat16, device=device)
    x[-1, 0, -1, -1], x[0, 0, 0, 0] = 3, 2
    pooled = functional.max_pool2d(x.requires_grad_(), 2)
    (grad,) = torch.autograd.grad(pooled, x, torch.ones_like(pooled))
    assert grad[-1, 0, -1, -1] == 1 and grad[0, 0, 0, 0] == 1 and grad.count_nonzero() == pooled.numel()
    del grad
    x.requires_grad_(False)
    assert pooled[-1, 0, -1, -1] == 3 and pooled[0, 0, 0, 0] == 2 and pooled.count_nonzero() == 2
    out = functional.conv2d(x, torch.full((1, 1, 1, 1), 2, dtype=torch.bfloat16, device=device))
    assert out[-1, 0, -1, -1] == 6 and out[0, 0, 0, 0] == 4 and out.count_nonzero() == 2
    del pooled, out
    out = functional.linear(x.view(-1, 256), torch.ones(3, 256, dtype=torch.bfloat16, device=device))
    assert out[-1].tolist() == [3] * 3 and out[0].tolist() == [2] * 3 and out.count_nonzero() == 6


def tf32(device: str) -> None:
    """Products of float32 use TF32 if torch's flag for the op allows it, and only then."""
    backends = {"linear": torch.backends.cuda.matmul, "conv2d": torch.backends.cudnn}
    before = {name: backend.allow_tf32 for name, backend in backends.items()}
    sizes = {"linear": [(70, 300), (80, 300)], "conv2d": [(2, 40, 9, 9), (70, 40, 3, 3)]}
    try:
        for allowed in backends:
            for name, backend in backends.items():
                backend.allow_tf32 = name == allowed
            for name, shapes in sizes.items():
                tensors = operands(*shapes, dtype=torch.float32)
                expected = results(getattr(torch.nn.functional, name), [tensor.double() for tensor in tensors])
                actual = results(getattr(functional, name), [tensor.to(device) for tensor in tensors])
                for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
                    error = ((a.cpu().double() - e).abs().max() / e.abs().max()).item()
                    right = 2e-5 < error < 5e-3 if name == allowed else error < 2e-6
                    assert right, f"{name}, TF32 for {allowed}, result {i}: error {error:.2e}"
    finally:
        for name, backend in backends.items():
            backend.allow_tf32 = before[name]


ALL = (every_op, same_bits, tf32, graph, stream, threads, batches, large)
PROGRAMS = {function.__name__: function for function in ALL}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="*", help=f"of {', '.join(PROGRAMS)}; default: all")
    names = parser.parse_args().name or list(PROGRAMS)
    if not torch.cuda.is_available():
        sys.exit("there is no GPU")
    torch.backends.cudnn.allow_tf32 = False  # because the tolerances are those of float32
    if len(names) == 1:
        PROGRAMS[names[0]]("cuda")
        torch.cuda.synchronize()
        print(f"{names[0]}: passed")
        return
    # Each program runs in a process of its own, because after an error in a kernel nothing else runs on the GPU.
    failed = [name for name in names if subprocess.run([sys.executable, __file__, name]).returncode]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
