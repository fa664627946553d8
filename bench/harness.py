"""The parts that the benchmark scripts share: the command line, the tables, the gates, and the files they write."""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import measure
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import pyops

FLOOR = 0.9  # the gate of a case that has no other one: nothing may be slower than this
# The largest allowed error of a result as a whole, as a norm relative to that of the result. If a ReLU is fused,
# rounding decides the sign of some outputs, and with it whether their gradients pass.
LARGEST_ERROR = {torch.float64: 1e-10, torch.float32: 5e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Work:
    """A computation on both libraries, and how much work it is."""

    stock: Callable[[], Any]  # stock and ours return a tensor or a tuple of tensors, which are compared
    ours: Callable[[], Any]
    flops: int
    bytes: int  # the least that must be read and written


class Case(Protocol):
    """One line of a benchmark."""

    name: str
    dtype: torch.dtype
    gate: float  # the smallest ratio allowed
    limit_gate: float  # the smallest allowed share of the machine's limit

    def prepare(self) -> Work: ...


@dataclass(frozen=True)
class Group:
    """Cases that belong together, and the gate for the geometric mean of their ratios, if there is one."""

    title: str
    cases: Sequence[Case]
    mean_gate: float | None = None


@dataclass(frozen=True)
class Result:
    """The result of one case for one number of threads. Times are in seconds per call."""

    group: str
    name: str
    dtype: str
    threads: int
    stock_min: float
    stock_median: float
    ours_min: float
    ours_median: float
    ratio: float  # stock_median / ours_median, above 1 if pyops is faster
    gate: float
    flops: int
    bytes: int
    limit: str  # what bounds such work on this machine: "FMA" or "copy"
    of_limit: float  # the shortest time that the limit allows / ours_min; above 1 if the data stays in a cache
    limit_gate: float
    passed: bool


@dataclass(frozen=True)
class Mean:
    """The geometric mean of a group's ratios for one number of threads."""

    group: str
    name: str
    threads: int
    ratio: float
    gate: float
    passed: bool


def main(description: str, groups: Sequence[Group]) -> None:
    """Runs the command line of a script whose benchmarks are `groups`."""
    args = _parser(description).parse_args()
    chosen = [
        Group(group.title, cases, group.mean_gate)
        for group in groups
        if (cases := [case for case in group.cases if re.search(args.filter, f"{group.title}: {case.name}")])
    ]
    dtypes = {case.dtype for group in chosen for case in group.cases}
    report = environment() | {"limits": {n: limits(dtypes, n) for n in args.threads}}
    console = Console(width=175)
    console.print_json(data=report)

    results: list[Result] = []
    means: list[Mean] = []
    for group in chosen:
        cases = track(group.cases, group.title, console=console, transient=True, disable=not console.is_terminal)
        of_group = [result for case in cases for result in run(group.title, case, args.threads)]
        mean_of_group = geometric_means(group, of_group)
        console.print(table(group.title, [*of_group, *mean_of_group]))
        results += of_group
        means += mean_of_group
    failed = sorted((r for r in [*results, *means] if not r.passed), key=lambda r: r.ratio / r.gate)
    console.print(table(f"{len(failed)} of {len(results) + len(means)} gates failed, worst first", failed))

    if args.json:
        report |= {"results": [asdict(result) for result in results], "means": [asdict(mean) for mean in means]}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        plot(args.plot, results)


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=f"{description} Both sides take turns in one process. The column stock/ours is stock's median time "
        f"divided by pyops': above 1, pyops is faster. A case without a gate of its own has {FLOOR}."
    )
    parser.add_argument("--filter", metavar="REGEX", default="", help="the cases whose 'group: name' contains it")
    parser.add_argument(
        "--threads",
        metavar="N",
        type=int,
        nargs="+",
        default=sorted({1, torch.get_num_threads()}),
        help="default: 1, all",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results and what they were measured on")
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="draw the ratios")
    return parser


def run(group: str, case: Case, threads: Sequence[int]) -> list[Result]:
    """Checks that both sides compute the same results, then times them with each number of threads."""
    work = case.prepare()
    check_equal(case, work.stock(), work.ours())
    results = []
    for n in threads:
        timing = measure.compare(work.stock, work.ours, n)
        least = {
            "FMA": work.flops / measure.peak_flops(case.dtype, n),
            "copy": work.bytes / measure.copy_bandwidth(n),
        }
        limit = max(least, key=least.__getitem__)
        of_limit = least[limit] / min(timing.ours)
        results.append(
            Result(
                group=group,
                name=case.name,
                dtype=str(case.dtype),
                threads=n,
                stock_min=min(timing.stock),
                stock_median=statistics.median(timing.stock),
                ours_min=min(timing.ours),
                ours_median=statistics.median(timing.ours),
                ratio=timing.ratio,
                gate=case.gate,
                flops=work.flops,
                bytes=work.bytes,
                limit=limit,
                of_limit=of_limit,
                limit_gate=case.limit_gate,
                passed=timing.ratio >= case.gate and of_limit >= case.limit_gate,
            )
        )
    return results


def check_equal(case: Case, stock: Any, ours: Any) -> None:
    """Raises an error if the results of both sides differ by more than rounding."""
    pairs = [(stock, ours)] if isinstance(stock, torch.Tensor) else zip(stock, ours, strict=True)
    for expected, actual in pairs:
        error, size = (actual - expected).norm().item(), expected.norm().item()
        if not error <= LARGEST_ERROR[case.dtype] * size:
            raise AssertionError(f"{case.name}: pyops and stock differ by {error:.1e} in results of norm {size:.1e}")


def geometric_means(group: Group, results: Sequence[Result]) -> list[Mean]:
    """The group's mean for each number of threads, if the group has a gate for it."""
    if group.mean_gate is None:
        return []
    means = []
    for threads in dict.fromkeys(result.threads for result in results):
        ratio = statistics.geometric_mean(result.ratio for result in results if result.threads == threads)
        name = f"geometric mean of {group.title}"
        means.append(Mean(group.title, name, threads, ratio, group.mean_gate, ratio >= group.mean_gate))
    return means


def environment() -> dict[str, Any]:
    """The machine, the versions, the commit and the date, which are kept with the results."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return {
        "machine": {
            "cpu": model[1] if model else platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "load": os.getloadavg()[0],  # runnable processes in the last minute; above 0, the times are disturbed
        },
        "versions": {"torch": torch.__version__, "pyops": pyops.__version__, "python": platform.python_version()},
        "commit": _git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _git_commit() -> str | None:
    """The commit, with "-dirty" if files other than results have changed; the scripts write the results themselves."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or an unpacked archive
        return None


def limits(dtypes: set[torch.dtype], threads: int) -> dict[str, float]:
    """The machine's limits, measured now, in 1e9 floating point operations or bytes per second."""
    giga = {f"{dtype} GFLOP/s": round(measure.peak_flops(dtype, threads) / 1e9, 1) for dtype in dtypes}
    return giga | {"copy GB/s": round(measure.copy_bandwidth(threads) / 1e9, 1)}


def table(title: str, rows: Sequence[Result | Mean]) -> Table:
    """A table of the results, with times in microseconds."""
    result = Table(title=title, title_justify="left")
    result.add_column("case, times in us", no_wrap=True)
    for name in ("threads", "stock min", "median", "ours min", "median", "stock/ours", "gate", "", "of limit"):
        result.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        times, of_limit = [""] * 4, ""
        if isinstance(row, Result):
            seconds = (row.stock_min, row.stock_median, row.ours_min, row.ours_median)
            times = [f"{1e6 * s:,.1f}" for s in seconds]
            of_limit = f"{row.of_limit:.0%} {row.limit:>4}" + (
                f" (gate {row.limit_gate:.0%})" if row.limit_gate else ""
            )
        verdict = "[green]PASS" if row.passed else "[red]FAIL"
        result.add_row(row.name, str(row.threads), *times, f"{row.ratio:.2f}", f"{row.gate:.2f}", verdict, of_limit)
    return result


def plot(path: Path, results: Sequence[Result]) -> None:
    """Plots a band for each group: its cases from top to bottom, a colour for each number of threads, and the gates."""
    groups = list(dict.fromkeys(result.group for result in results))
    figure = Figure(figsize=(11, 1.5 + 0.7 * len(groups)), layout="constrained")
    axes = figure.subplots()
    for threads in dict.fromkeys(result.threads for result in results):
        drawn = [result for result in results if result.threads == threads]
        heights = []
        for band, group in enumerate(groups):
            count = sum(result.group == group for result in drawn)
            heights += [band + (i + 0.5) / count for i in range(count)]
        axes.plot([result.ratio for result in drawn], heights, "o", markersize=4, label=f"threads: {threads}")
    axes.plot([result.gate for result in drawn], heights, "k|", markersize=5, label="gate")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="stock's time / pyops' time (above 1, pyops is faster)", ylim=(len(groups), 0))
    axes.set_yticks([band + 0.5 for band in range(len(groups))], groups)
    axes.legend()
    figure.savefig(path, dpi=120)
