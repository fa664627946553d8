"""Times of the CUDA kernels against stock torch: ``python bench/gpu_times.py`` (of bench/gpu_check.py the last step).

Each case is timed as stock runs it, with cudnn.benchmark, and in a CUDA graph, and as pyops does, in a graph or not.
The inputs of successive calls are different ones, together larger than any cache. A time is the median of five runs of
a twentieth of a second at least, between two events on the GPU.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
from gpu_programs import captured, training_step

import pyops
from pyops.lenet import StockLeNet

RESULTS = Path(__file__).parent / "results"
CACHE_BYTES = 100e6  # inputs of a case add up to this at least
MOST_INPUTS = 16
WAYS = ("stock", "stock, tuned", "stock, graph", "pyops", "pyops, graph")


class Case(NamedTuple):
    name: str
    dtype: torch.dtype
    # (whether it is ours, a seed) to a call
    prepare: Callable[[bool, int], Callable[[], Any]]
    bytes: int  # of the inputs


@dataclass(frozen=True)
class Result:
    name: str
    dtype: str
    seconds: dict[str, float]  # by way; without those that failed
    failed: dict[str, str]  # the error by way

    def ratio(self, way: str, ours: str) -> float:
        """How many times as fast as that way of stock's ours is."""
        both = self.seconds.get(way), self.seconds.get(ours)
        return both[0] / both[1] if all(both) else math.nan


def gradients(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> Callable[[], Any]:
    leaves = [tensor.requires_grad_() for tensor in tensors]
    output = function(*leaves)
    grad = torch.ones_like(output)
    return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)


def op(name: str, dtype: torch.dtype, sizes: list[tuple[int, ...]], format=torch.contiguous_format, **options) -> list:
    """An op's forward and backward as two cases."""

    def tensors(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        made = [torch.randn(size, device="cuda").to(dtype) for size in sizes]
        return [made[0].contiguous(memory_format=format) if made[0].dim() == 4 else made[0], *made[1:]]

    def function(ours: bool) -> Callable[..., torch.Tensor]:
        functional = pyops.functional if ours else torch.nn.functional
        return lambda *t: getattr(functional, name)(*t, **options)

    def forward(ours: bool, seed: int) -> Callable[[], Any]:
        inputs, f = tensors(seed), function(ours)
        return lambda: f(*inputs)

    def backward(ours: bool, seed: int) -> Callable[[], Any]:
        return gradients(function(ours), tensors(seed))

    shape = "x".join(map(str, sizes[0])) + (f" by {'x'.join(map(str, sizes[1]))}" if len(sizes) > 1 else "")
    shape += "".join(f", {option} {value}" for option, value in options.items())
    shape += ", NHWC" * (format == torch.channels_last)
    size = math.prod(sizes[0]) * dtype.itemsize
    return [
        Case(f"{name} {shape}, {way}", dtype, prepare, size)
        for way, prepare in (("forward", forward), ("backward", backward))
    ]


def lenet(batch: int, dtype: torch.dtype, training: bool) -> Case:
    def prepare(ours: bool, seed: int) -> Callable[[], Any]:
        torch.manual_seed(seed)
        net = (pyops.LeNet(fused=True) if ours else StockLeNet()).cuda().to(dtype)
        x, y = torch.randn(batch, 1, 32, 32, device="cuda").to(dtype), torch.randint(10, (batch,), device="cuda")
        if training:
            return training_step(net, x, y)
        net.requires_grad_(False)
        return lambda: net(x)

    what = "training step" if training else "forward"
    return Case(f"LeNet {what}, batch {batch}", dtype, prepare, batch * 1024 * dtype.itemsize)


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (1, 64, 1024, 65536):
            yield lenet(batch, dtype, training=False)
            yield lenet(batch, dtype, training=True)
        yield from op("relu", dtype, [(1 << 26,)])
        for format in (torch.contiguous_format, torch.channels_last):
            yield from op("max_pool2d", dtype, [(64, 64, 112, 112)], format, kernel_size=2)
            yield from op("max_pool2d", dtype, [(64, 64, 112, 112)], format, kernel_size=3, stride=2, padding=1)
            yield from op("conv2d", dtype, [(64, 64, 56, 56), (64, 64, 3, 3)], format, padding=1)
            yield from op("conv2d", dtype, [(64, 256, 28, 28), (256, 1, 3, 3)], format, padding=1, groups=256)
        yield from op("conv2d", dtype, [(1024, 1, 32, 32), (6, 1, 5, 5)])
        yield from op("conv2d", dtype, [(1024, 6, 14, 14), (16, 6, 5, 5)])
        yield from op("linear", dtype, [(1024, 400), (120, 400)])
        yield from op("linear", dtype, [(4096, 4096), (4096, 4096)])


def seconds_per_call(calls: list[Callable[[], Any]]) -> float:
    """The calls take turns."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(count: int) -> float:
        torch.cuda.synchronize()
        start.record()
        for i in range(count):
            calls[i % len(calls)]()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    count = len(calls)
    run(count)
    while run(count) < 0.05:
        count *= 2
    return statistics.median(run(count) for _ in range(5)) / count


def measure(case: Case) -> Result:
    seconds, failed = {}, {}
    inputs = max(1, min(MOST_INPUTS, math.ceil(CACHE_BYTES / case.bytes)))
    for way in WAYS:
        torch.backends.cudnn.benchmark = way == "stock, tuned"
        try:
            calls = [case.prepare(way.startswith("pyops"), seed) for seed in range(inputs)]
            if way.endswith("graph"):
                calls = [captured(call)[0].replay for call in calls]
            seconds[way] = seconds_per_call(calls)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            failed[way] = str(error).splitlines()[0]
    return Result(case.name, str(case.dtype).removeprefix("torch."), seconds, failed)


def table(results: list[Result]) -> str:
    """Markdown: the times in us, and how many times as fast as stock's best way ours is."""
    lines = ["| case | dtype | " + " | ".join(f"{way}, us" for way in WAYS) + " | eager ratio | best ratio |"]
    lines.append("|---|---|" + "--:|" * (len(WAYS) + 2))
    for result in results:
        times = [f"{result.seconds[way] * 1e6:.1f}" if way in result.seconds else "failed" for way in WAYS]
        stock = [result.seconds[way] for way in WAYS[:3] if way in result.seconds]
        ours = [result.seconds[way] for way in WAYS[3:] if way in result.seconds]
        best = f"{min(stock) / min(ours):.2f}" if stock and ours else "-"
        eager = result.ratio("stock", "pyops")
        ratios = ["-" if math.isnan(eager) else f"{eager:.2f}", best]
        lines.append(f"| {result.name} | {result.dtype} | " + " | ".join([*times, *ratios]) + " |")
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    gpu = {"name": torch.cuda.get_device_name(), "driver": driver[0] if driver else None, "cuda": torch.version.cuda}
    return harness.environment() | {"gpu": gpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--filter", default="", help="a regular expression that the names of cases must contain")
    pattern = parser.parse_args().filter
    report = environment()
    results = []
    for case in cases():
        if re.search(pattern, case.name):
            results.append(measure(case))
            print(results[-1].name, results[-1].dtype, results[-1].seconds, results[-1].failed, flush=True)
    name = re.sub(r"\W+", "-", report["gpu"]["name"]).lower()
    (RESULTS / f"{name}.json").write_text(json.dumps(report | {"results": [asdict(r) for r in results]}, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
