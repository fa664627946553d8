"""What must be true on a GPU and the emulator of the tests cannot see: ``python bench/gpu_programs.py [NAME...]``.

Results are held against stock torch's on the CPU in float64. Each program takes the device, so that those without
streams and graphs run on "cpu" too, which is how they are tested where there is no GPU.
"""

import argparse
import sys
import threading
from collections.abc import Callable, Sequence

import torch

import pyops
from pyops import functional

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def assert_close(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the tolerance of the dtype, relative to the largest value."""
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
    """Each op with sizes that fill no tile and no warp, for stock's functional or ours."""
    image, weight, bias = (3, 5, 13, 11), (7, 5, 3, 3), (7,)
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
        "conv2d, grouped": (lambda *t: module.conv2d(*t, padding=1, groups=5), [image, (10, 1, 3, 3), (10,)]),
        "conv2d, few channels": (module.conv2d, tiny),
        "conv2d_relu_max_pool2d": (pooled, tiny),
        "max_pool2d": (lambda x: module.max_pool2d(x, 3, 2, 1), [image]),
    }


def every_op(device: str) -> None:
    """Every op, forward and backward, in each dtype and layout."""
    ours, stock = calls(functional), calls(torch.nn.functional)
    for name, (function, sizes) in ours.items():
        for dtype in TOLERANCE:
            for format in (torch.contiguous_format, torch.channels_last):
                torch.manual_seed(0)
                tensors = operands(*sizes, dtype=dtype)
                if tensors[0].dim() == 4:
                    tensors[0] = tensors[0].contiguous(memory_format=format)
                expected = results(stock[name][0], [tensor.double() for tensor in tensors])
                actual = results(function, [tensor.to(device) for tensor in tensors])
                if dtype in (torch.bfloat16, torch.float16) and ("pool" in name or "relu" in name):
                    actual, expected = actual[:1], expected[:1]  # rounding decides the winners, and with them gradients
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


def captured(step: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of the step, which has been run three times before, and the tensor that its result is in."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def graph(device: str) -> None:
    """A captured training step, replayed, gives the bits of the step itself."""
    net, x, y = lenet(device, 64)
    step = training_step(net, x, y)
    expected = [step().item() for _ in range(8)][3:]
    net, x, y = lenet(device, 64)
    replayed, loss = captured(training_step(net, x, y))
    actual = []
    for _ in expected:
        replayed.replay()
        actual.append(loss.item())
    assert actual == expected, (actual, expected)


def stream(device: str) -> None:
    """The ops run on the current stream: a result is right although its input is late there, and early elsewhere."""
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
    """Two threads at a time."""
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
    """Around the limit of a grid's second and third dimension, and far beyond."""
    for batch in (65535, 65536, 65537, 200_000):
        x, w, b = operands((batch, 1, 6, 6), (3, 1, 3, 3), (3,), dtype=torch.float32)
        expected = torch.nn.functional.max_pool2d(torch.nn.functional.conv2d(x, w, b).relu(), 2)
        actual = functional.conv2d_relu_max_pool2d(x.to(device), w.to(device), b.to(device), pool_kernel_size=2)
        assert_close(f"batch {batch}", actual, expected)


def large(device: str) -> None:
    """More than 2^31 elements: 2 GB of bytes for relu, 4.3 GB of bfloat16 for the others."""
    x = torch.full((2**31 + 77,), -1, dtype=torch.int8, device=device)
    x[-1] = 5
    y = functional.relu(x)
    assert y[-1] == 5 and y[:-1].max() == 0
    del x, y
    x = torch.zeros(2**15 + 1, 1, 256, 256, dtype=torch.bfloat16, device=device)
    x[-1, 0, -1, -1], x[0, 0, 0, 0] = 3, 2
    pooled = functional.max_pool2d(x, 2)
    assert pooled[-1, 0, -1, -1] == 3 and pooled[0, 0, 0, 0] == 2 and pooled.count_nonzero() == 2
    out = functional.conv2d(x, torch.full((1, 1, 1, 1), 2, dtype=torch.bfloat16, device=device))
    assert out[-1, 0, -1, -1] == 6 and out[0, 0, 0, 0] == 4 and out.count_nonzero() == 2


PROGRAMS = {function.__name__: function for function in (every_op, same_bits, graph, stream, threads, batches, large)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="*", help=f"of {', '.join(PROGRAMS)}; default: all")
    names = parser.parse_args().name or list(PROGRAMS)
    if not torch.cuda.is_available():
        sys.exit("there is no GPU")
    for name in names:
        PROGRAMS[name]("cuda")
        torch.cuda.synchronize()
        print(f"{name}: passed", flush=True)


if __name__ == "__main__":
    main()
