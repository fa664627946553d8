"""Measures times and errors of the CUDA kernels against stock torch: ``python bench/gpu_times.py``.

bench/gpu_check.py runs this script as one of its steps. Each case is timed for stock torch, eagerly, with
cudnn.benchmark and in a CUDA graph, and for pyops, with and without a graph. Successive calls have different inputs,
which together are larger than any cache. A time is the median of five runs of at least a twentieth of a second, between
two events on the GPU. Results are also compared with float64. Times, errors, and whether they meet the aims of
gpu_aims.py, are written to bench/results/<gpu>.json and .md after each case. With ``--device cpu`` the script can be
tried on a machine without a GPU; it then does without graphs.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import harness
import ops
import torch
from gpu_aims import Result, judge, verdicts
from gpu_programs import captured, training_step

import pyops
from pyops.lenet import StockLeNet

RESULTS = Path(__file__).parent / "results"
CACHE_BYTES = 100e6  # the inputs of a case add up to at least this
MOST_INPUTS = 16
WAYS = ("stock", "stock, tuned", "stock, graph", "pyops", "pyops, graph")

Call = Callable[[], Any]


class Setting(NamedTuple):
    """The settings that a case is prepared for."""

    ours: bool
    device: str
    dtype: torch.dtype  # of the computation; the values are always ones that the dtype of the case can represent
    seed: int = 0


class Case(NamedTuple):
    name: str
    dtype: torch.dtype
    prepare: Callable[[Setting], Call]
    bytes: int  # of the inputs
    exact: bool = True  # whether the results can be compared with float64


# ---- what is timed ----


def gradients(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor], dtype: torch.dtype) -> Call:
    leaves = [tensor.requires_grad_() for tensor in tensors]
    output = function(*leaves)
    grad = torch.randn(output.shape, device=output.device).to(dtype).to(output.dtype)
    return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)


def op(name: str, dtype: torch.dtype, sizes: list[tuple[int, ...]], format=torch.contiguous_format, **options) -> list:
    """An op's forward and backward as two cases. The weights are scaled so that outputs are about 1."""

    def prepare(setting: Setting, backward: bool) -> Call:
        torch.manual_seed(setting.seed)
        scales = [1] + [math.prod(size[1:]) ** -0.5 for size in sizes[1:]]
        tensors = [
            (scale * torch.randn(size, device=setting.device)).to(dtype).to(setting.dtype)
            for size, scale in zip(sizes, scales, strict=True)
        ]
        if tensors[0].dim() == 4:
            tensors[0] = tensors[0].contiguous(memory_format=format)
        function = ops.function(pyops.functional if setting.ours else torch.nn.functional, name)
        if backward:
            return gradients(lambda *t: function(*t, **options), tensors, dtype)
        return lambda: function(*tensors, **options)

    shape = "x".join(map(str, sizes[0])) + (f" by {'x'.join(map(str, sizes[1]))}" if len(sizes) > 1 else "")
    shape += "".join(f", {option} {value}" for option, value in options.items())
    shape += ", NHWC" * (format == torch.channels_last)
    size = math.prod(sizes[0]) * dtype.itemsize
    made = []
    for way, backward in (("forward", False), ("backward", True)):
        exact = not (backward and "_relu" in name)  # here rounding decides which elements pass no gradient
        made.append(Case(f"{name} {shape}, {way}", dtype, lambda setting, b=backward: prepare(setting, b), size, exact))
    return made


def lenet(batch: int, dtype: torch.dtype, training: bool) -> Case:
    def prepare(setting: Setting) -> Call:
        torch.manual_seed(setting.seed)
        net = (pyops.LeNet(fused=True) if setting.ours else StockLeNet()).to(setting.device, dtype).to(setting.dtype)
        x = torch.randn(batch, 1, 32, 32, device=setting.device).to(dtype).to(setting.dtype)
        if training:
            return training_step(net, x, torch.randint(10, (batch,), device=setting.device))
        net.requires_grad_(False)
        return lambda: net(x)

    what = "training step" if training else "forward"
    return Case(f"LeNet {what}, batch {batch}", dtype, prepare, batch * 1024 * dtype.itemsize, exact=not training)


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
            yield from op("conv2d", dtype, [(64, 256, 28, 28), (256, 256, 1, 1)], format)
            yield from op("conv2d", dtype, [(64, 256, 28, 28), (256, 1, 3, 3)], format, padding=1, groups=256)
            yield from op("conv2d", dtype, [(64, 256, 28, 28), (256, 1, 3, 3)], format, padding=1, stride=2, groups=256)
            yield from op("conv2d", dtype, [(64, 96, 56, 56), (96, 1, 7, 7)], format, padding=3, groups=96)
            yield from op("conv2d", dtype, [(64, 128, 56, 56), (128, 4, 3, 3)], format, padding=1, groups=32)
            yield from op("conv2d", dtype, [(64, 256, 28, 28), (256, 8, 3, 3)], format, padding=1, groups=32)
            yield from op("conv2d_relu", dtype, [(64, 64, 56, 56), (64, 64, 3, 3)], format, padding=1)
        for name in ("conv2d", "conv2d_relu_max_pool2d"):
            yield from op(name, dtype, [(1024, 1, 32, 32), (6, 1, 5, 5)])
            yield from op(name, dtype, [(1024, 6, 14, 14), (16, 6, 5, 5)])
        for name in ("linear", "linear_relu"):
            yield from op(name, dtype, [(1, 400), (120, 400)])
            yield from op(name, dtype, [(1024, 400), (120, 400)])
        yield from op("linear", dtype, [(65536, 84), (10, 84)])
        yield from op("linear", dtype, [(4096, 4096), (4096, 4096)])


# ---- how it is timed ----


def timed(device: str, run: Callable[[], None]) -> float:
    """The seconds until all work that `run` starts is done."""
    if device != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def seconds_per_call(calls: list[Call], device: str, least: float) -> float:
    """The median time of a call. The calls take turns, in runs that take at least `least` seconds."""

    def run(count: int) -> float:
        return timed(device, lambda: [calls[i % len(calls)]() for i in range(count)] and None)

    count = len(calls)
    run(count)
    while run(count) < least:
        count *= 2
    return statistics.median(run(count) for _ in range(5)) / count


def calls_of(case: Case, way: str, device: str) -> list[Call]:
    count = max(1, min(MOST_INPUTS, math.ceil(CACHE_BYTES / case.bytes)))
    settings = [Setting(way.startswith("pyops"), device, case.dtype, seed) for seed in range(count)]
    if not way.endswith("graph"):
        return [case.prepare(setting) for setting in settings]
    if device != "cuda":
        raise RuntimeError(f"there are no graphs on {device}")
    return [captured(lambda s=setting: case.prepare(s)) for setting in settings]


def tensors_of(call: Call) -> list[torch.Tensor]:
    result = call()
    return [tensor.detach() for tensor in ([result] if isinstance(result, torch.Tensor) else result)]


def error(actual: list[torch.Tensor], exact: list[torch.Tensor]) -> tuple[float, float]:
    """The largest and the root mean square difference, relative to those of the exact values, for the worst tensor."""
    largest, rms = 0.0, 0.0
    for a, e in zip(actual, exact, strict=True):
        difference = a.double() - e
        largest = max(largest, (difference.abs().max() / e.abs().max()).item())
        rms = max(rms, (difference.square().mean() / e.square().mean()).sqrt().item())
    return largest, rms


def cudnn_benchmark(wanted: bool) -> AbstractContextManager[None]:
    """Sets whether cuDNN times its algorithms and takes the fastest; its other flags keep their values."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(cudnn.enabled, wanted, cudnn.benchmark_limit, cudnn.deterministic, cudnn.allow_tf32)


def measure(case: Case, device: str = "cuda", least: float = 0.05) -> Result:
    """Measures a case in each of WAYS. If one fails, its message is recorded, and the others are still measured."""
    seconds, errors, failed = {}, {}, {}
    for way in WAYS:
        try:
            with cudnn_benchmark(way == "stock, tuned"):
                seconds[way] = seconds_per_call(calls_of(case, way, device), device, least)
        except Exception as problem:  # any exception is a finding
            failed[way] = f"{type(problem).__name__}: {problem}".splitlines()[0]
    try:
        if case.exact:
            exact = tensors_of(case.prepare(Setting(False, device, torch.float64)))
            for name, ours in (("stock", False), ("pyops", True)):
                errors[name] = error(tensors_of(case.prepare(Setting(ours, device, case.dtype))), exact)
    except Exception as problem:
        failed["error"] = f"{type(problem).__name__}: {problem}".splitlines()[0]
    return Result(case.name, str(case.dtype).removeprefix("torch."), seconds, errors, failed)


# ---- what is written ----


def table(results: list[Result]) -> str:
    """A Markdown table of times in us, of speed-ups over stock run eagerly and at its best, and of errors."""
    columns = [*(f"{way}, us" for way in WAYS), "eager ratio", "best ratio", "stock's rms error", "pyops' rms error"]
    lines = ["| case | dtype | " + " | ".join(columns) + " |", "|---|---|" + "--:|" * len(columns)]
    for result in results:
        cells = [f"{result.seconds[way] * 1e6:.1f}" if way in result.seconds else "failed" for way in WAYS]
        stock = [result.seconds[way] for way in WAYS[:3] if way in result.seconds]
        ours = [result.seconds[way] for way in WAYS[3:] if way in result.seconds]
        eager = result.ratio("stock", "pyops")
        cells.append("-" if math.isnan(eager) else f"{eager:.2f}")
        cells.append(f"{min(stock) / min(ours):.2f}" if stock and ours else "-")
        cells += [f"{result.errors[side][1]:.1e}" if side in result.errors else "-" for side in ("stock", "pyops")]
        lines.append(f"| {result.name} | {result.dtype} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def environment(device: str) -> dict[str, Any]:
    report = harness.environment()
    if device != "cuda":
        return report
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError:
        driver = []
    gpu = {"name": torch.cuda.get_device_name(), "driver": driver[0] if driver else None, "cuda": torch.version.cuda}
    return report | {"gpu": gpu}


def write(folder: Path, report: dict[str, Any], results: list[Result]) -> str:
    """Writes both files and returns the text of the Markdown file."""
    gpu = report.get("gpu", {"name": report["machine"]["cpu"], "driver": None, "cuda": None})
    judged = judge(results)
    head = (
        f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}; torch {report['versions']['torch']}, pyops "
        f"{report['versions']['pyops']} at commit {report['commit']}; {report['date'][:10]}."
    )
    text = "\n\n".join([head, verdicts(judged), table(results)]) + "\n"
    file = folder / re.sub(r"\W+", "-", gpu["name"]).lower().strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    contents = report | {"aims": [asdict(v) for v in judged], "results": [asdict(r) for r in results]}
    file.with_name(file.name + ".json").write_text(json.dumps(contents, indent=1) + "\n")
    file.with_name(file.name + ".md").write_text(text)
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--filter", default="", help="a regular expression that the names of cases must contain")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=0.05, help="that each of the five runs takes at least")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU")
    report, results, text = environment(args.device), [], "no case has such a name"
    for case in cases():
        if re.search(args.filter, case.name):
            results.append(measure(case, args.device, args.seconds))
            text = write(args.output, report, results)
            print(results[-1].name, results[-1].dtype, results[-1].seconds, results[-1].failed, flush=True)
    print(text)
    sys.exit(not all(verdict.passed for verdict in judge(results)))


if __name__ == "__main__":
    main()
