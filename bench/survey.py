"""Layers of many networks, and random ones, against the stock ops: `python bench/survey.py --help`.

bench/ops.py times a list of cases, each with a gate. This script looks where no list does: it draws layers from
shapes.txt, gives them batches, layouts and dtypes, adds layers with random shapes, and tells how often pyops is slower
than stock, by how much, and where.
"""

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import measure
import torch
from harness import LARGEST_ERROR, check_equal, environment
from matplotlib.figure import Figure
from ops import NCHW, NHWC, PASSES, Case
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

SHAPES = Path(__file__).with_name("shapes.txt")
OPS = ("conv2d", "linear", "max_pool2d", "relu")
BATCHES = (1, 8, 64)
# Larger cases are left out, because a call of them would take seconds, and all memory.
MOST_FLOPS, MOST_ELEMENTS = 8e9, 2**25
RANDOM_SHARE = 0.25  # of the cases
WORST = 30
BLOCK_SECONDS, CASE_SECONDS = 5e-3, 0.1


@dataclass(frozen=True)
class Layer:
    """A line of shapes.txt. The shape of the input has no batch."""

    network: str
    op: str
    input: tuple[int, ...]
    weight: tuple[int, ...] | None = None
    options: tuple[int | tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Result:
    """The median seconds per call of a case for one number of threads."""

    network: str
    case: Case
    threads: int
    stock: float
    ours: float

    @property
    def ratio(self) -> float:
        return self.stock / self.ours


def main() -> None:
    args = _parse()
    cases = draw(args.sample, args.seed, args.op, args.timed, args.dtype)
    console = Console(width=140)
    report = environment() | {"seed": args.seed}
    console.print_json(data=report)
    results = []
    for network, case in within(args.seconds, cases, console):
        results += time_case(network, case, args.threads)
    console.print(summary(results))
    console.print(worst(results))
    if args.json:
        args.json.write_text(as_json(report, results))
    if args.plot:
        plot(args.plot, results)


def _parse() -> argparse.Namespace:
    threads = sorted({1, torch.get_num_threads()})
    parser = argparse.ArgumentParser(description="Time layers of many networks, and random ones, against stock torch.")
    add_sample_options(parser)
    parser.add_argument("--threads", type=int, nargs="+", default=threads, help="default: 1, all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times and what they were measured on")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the distribution of the ratios of each op")
    return parser.parse_args()


def add_sample_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that select the cases."""
    parser.add_argument("--sample", type=int, default=50, metavar="N", help="cases of each op and pass (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after so long, whatever is left")
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--pass", dest="timed", nargs="+", choices=PASSES, default=PASSES)
    dtypes = [str(dtype).removeprefix("torch.") for dtype in LARGEST_ERROR]
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=["float32"], help="default: float32")


def within(seconds: float, cases: Sequence[tuple[str, Case]], console: Console) -> Iterator[tuple[str, Case]]:
    """Yields the cases until the time is over, and shows how far it has come."""
    end = time.monotonic() + seconds
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for each in progress.track(cases):
            if time.monotonic() > end:
                console.print("The time is over: the rest of the sample is left out.")
                return
            yield each


def layers() -> list[Layer]:
    """The layers of shapes.txt."""
    found, network = [], ""
    for line in SHAPES.read_text().splitlines():
        if line.startswith("["):
            network = line.strip("[]")
        elif line and not line.startswith("#"):
            op, input, *rest = line.split()
            weight = _sizes(rest.pop(0)) if op in ("conv2d", "linear") else None
            options = tuple(_option(option) for option in rest[0].split(",")) if rest else ()
            found.append(Layer(network, op, _sizes(input), weight, options))
    return found


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


def _option(text: str) -> int | tuple[int, ...]:
    return _sizes(text) if "x" in text else int(text)


def random_layer(op: str, draw: random.Random) -> Layer:
    """A layer whose sizes are drawn evenly on a logarithmic scale."""

    def size(low: int, high: int) -> int:
        return round(math.exp(draw.uniform(math.log(low), math.log(high))))

    if op == "linear":
        inputs = size(1, 4096)
        return Layer("random", op, (inputs,), (size(1, 4096), inputs))
    height, width = size(1, 128), size(1, 128)
    if draw.random() < 0.7:
        width = height
    if op == "relu":
        return Layer("random", op, (size(1, 512), height, width))
    kernel = min(draw.choice((1, 2, 3, 3, 3, 4, 5, 7, 9, 11)), height), min(draw.choice((1, 2, 3, 3, 5, 7)), width)
    if kernel[0] <= width and draw.random() < 0.8:
        kernel = kernel[0], kernel[0]
    stride = draw.choice((1, 1, 1, 2, 2, 3))
    padding = draw.randint(0, min(kernel) // 2)
    if op == "max_pool2d":
        return Layer("random", op, (size(1, 512), height, width), None, (kernel, stride, padding))
    groups = draw.choice((1, 1, 1, 1, size(2, 64), size(2, 512)))
    in_channels, out_channels = (size(1, 512 // groups) if draw.random() < 0.7 else 1 for _ in range(2))
    return Layer(
        "random",
        op,
        (groups * in_channels, height, width),
        (groups * out_channels, in_channels, *kernel),
        (stride, padding, 1, groups),
    )


def draw(sample: int, seed: int, ops: Sequence[str], passes: Sequence[str], dtypes: Sequence[str]):
    """Pairs of a network and a case, in random order: `sample` cases of each op, pass and dtype."""
    chance = random.Random(seed)
    known = layers()
    cases = []
    for op in ops:
        of_op = [layer for layer in known if layer.op == op]
        for timed in passes:
            if timed == "grad_weight" and op not in ("conv2d", "linear"):
                continue
            for dtype in dtypes:
                drawn: dict[Case, str] = {}
                while len(drawn) < sample:
                    is_random = chance.random() < RANDOM_SHARE
                    layer = random_layer(op, chance) if is_random else chance.choice(of_op)
                    case = Case(
                        op,
                        (chance.choice(BATCHES), *layer.input),
                        layer.weight,
                        layer.options,
                        timed,
                        bias=chance.random() < 0.5,
                        dtype=getattr(torch, dtype),
                        layout=chance.choice((NCHW, NHWC)) if op in ("conv2d", "max_pool2d") else NCHW,
                    )
                    if is_feasible(case):
                        drawn.setdefault(case, layer.network)
                cases += [(network, case) for case, network in drawn.items()]
    chance.shuffle(cases)
    return cases


def is_feasible(case: Case) -> bool:
    with torch.device("meta"):
        work = replace(case, timed="forward").prepare()
        largest = max(math.prod(case.input), work.stock().numel(), math.prod(case.weight or ()))
    return work.flops <= MOST_FLOPS and largest <= MOST_ELEMENTS


def time_case(network: str, case: Case, threads: Sequence[int]) -> Iterator[Result]:
    work = case.prepare()
    check_equal(case, work.stock(), work.ours())
    for n in threads:
        timing = measure.compare(work.stock, work.ours, n, BLOCK_SECONDS, CASE_SECONDS)
        yield Result(network, case, n, statistics.median(timing.stock), statistics.median(timing.ours))


def summary(results: Sequence[Result]) -> Table:
    """The geometric mean of the ratios of each op and pass, and how many are below 1 and below 0.9."""
    table = Table(title="stock's time / pyops' time: above 1, pyops is faster", title_justify="left")
    table.add_column("op and pass")
    for name in ("threads", "cases", "geometric mean", "below 1.0", "below 0.9", "worst"):
        table.add_column(name, justify="right")
    for (name, threads), ratios in grouped(results).items():
        shares = [f"{sum(ratio < limit for ratio in ratios) / len(ratios):.1%}" for limit in (1.0, 0.9)]
        mean = f"{statistics.geometric_mean(ratios):.2f}"
        table.add_row(name, str(threads), str(len(ratios)), mean, *shares, f"{min(ratios):.2f}")
    return table


def grouped(results: Sequence[Result]) -> dict[tuple[str, int], list[float]]:
    """The ratios by the name of the op, the pass and the dtype, and by the number of threads."""
    ratios: dict[tuple[str, int], list[float]] = {}
    for result in results:
        dtype = str(result.case.dtype).removeprefix("torch.")
        ratios.setdefault((f"{result.case.op} {result.case.timed} {dtype}", result.threads), []).append(result.ratio)
    return dict(sorted(ratios.items()))


def worst(results: Sequence[Result]) -> Table:
    table = Table(title=f"the worst {WORST}", title_justify="left")
    for name in ("network", "case"):
        table.add_column(name, no_wrap=True)
    for name in ("threads", "stock, us", "pyops, us", "stock/ours"):
        table.add_column(name, justify="right")
    for r in sorted(results, key=lambda result: result.ratio)[:WORST]:
        table.add_row(
            r.network, r.case.name, str(r.threads), f"{1e6 * r.stock:,.1f}", f"{1e6 * r.ours:,.1f}", f"{r.ratio:.2f}"
        )
    return table


def as_json(report: dict[str, Any], results: Sequence[Result]) -> str:
    """The report with a line for each result: network, case, threads, and the microseconds of stock and of pyops."""
    rows = [[r.network, r.case.name, r.threads, _digits(r.stock), _digits(r.ours)] for r in results]
    return json.dumps(report)[:-1] + ',\n"results": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n"


def _digits(seconds: float) -> float:
    return float(f"{1e6 * seconds:.4g}")


def plot(path: Path, results: Sequence[Result]) -> None:
    """Plots for each op and pass, on one thread, the share of cases whose ratio is below each value."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    least = min(result.threads for result in results)
    for (name, threads), ratios in grouped(results).items():
        if threads == least:
            axes.plot(sorted(ratios), [i / len(ratios) for i in range(len(ratios))], label=name)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="stock's time / pyops' time (above 1, pyops is faster)", ylabel="share of the cases")
    axes.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
