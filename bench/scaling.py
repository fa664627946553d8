"""How far pyops scales with more cores than there are, by simulation: `python bench/scaling.py --help`.

The kernels cut their parallel regions as they would for that many threads, and one thread computes the parts in turn
(csrc/cpu/runtime/simulation.h). Every part is timed, and the least of several times counts. A call is then taken to
last as long as what lies outside of the regions, the longest part of each region, and a fork and a barrier for each.
Ideally, n threads take an n-th of the time of one; the efficiency is that ideal time divided by the simulated one.

Only the CPU time of the kernels counts: not Python, autograd and allocation, nor what else runs on the machine. The
simulation leaves out what threads do to one another. They share the bandwidth of the memory and the L3 cache, the clock
of a busy processor is lower, and an operand that one core has written is not in the cache of another. One core that
computes all parts finds in its caches what earlier parts have read. So the efficiencies tell about the division of the
work, and are an upper bound.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from harness import environment
from ops import Case
from rich.console import Console
from rich.table import Table
from survey import BATCHES, WORST, add_sample_options, draw, is_feasible, within

from pyops import _load

THREADS = (4, 8, 16, 64)
# Cases with at least LARGE operations should reach LEAST_EFFICIENCY on GATED_THREADS threads.
LARGE, LEAST_EFFICIENCY, GATED_THREADS = 50e6, 0.8, 16
FORK_MICROSECONDS = 2.0
LEAST_ROUNDS, CASE_SECONDS = 5, 0.5  # of CPU time


@dataclass(frozen=True)
class Recording:
    """The least times of several runs of a call: outside of the parallel regions, and of each part of each region."""

    serial: float
    tasks: tuple[int, ...]
    parts: tuple[tuple[float, ...], ...]

    def merged(self, other: "Recording") -> "Recording":
        parts = (tuple(map(min, *regions)) for regions in zip(self.parts, other.parts, strict=True))
        return replace(self, serial=min(self.serial, other.serial), parts=tuple(parts))

    def seconds(self, fork: float) -> float:
        return self.serial + sum(max(parts) + fork for parts in self.parts)


@dataclass(frozen=True)
class Result:
    """The simulated seconds per call by the number of threads, and what the kernels did with the most of them."""

    network: str
    case: Case
    flops: int
    algorithm: str
    regions: int
    tasks: int  # of the region that takes longest
    seconds: dict[int, float]

    def efficiency(self, threads: int) -> float:
        return self.seconds[1] / threads / self.seconds[threads]

    @property
    def gated(self) -> bool:
        return self.flops >= LARGE

    @property
    def passed(self) -> bool:
        return self.efficiency(GATED_THREADS) >= LEAST_EFFICIENCY


def main() -> None:
    args = _parse()
    cases = draw(args.sample, args.seed, args.op, args.timed, args.dtype)
    if args.batch:
        cases = with_batch(cases, args.batch)
    console = Console(width=165)
    report = environment() | {"seed": args.seed, "fork, us": args.fork}
    console.print_json(data=report)
    torch.set_num_threads(1)
    results = [simulate(network, case, 1e-6 * args.fork) for network, case in within(args.seconds, cases, console)]
    console.print(f"A fork and a barrier are taken to last {args.fork} us.")
    console.print(summary(results))
    console.print(worst(results))
    if args.json:
        args.json.write_text(as_json(report, results))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Simulate layers of many networks with more threads than cores.")
    add_sample_options(parser)
    batches = ", ".join(map(str, BATCHES))
    parser.add_argument(
        "--batch", type=int, metavar="N", help=f"of all cases (default: {batches}, drawn for each case)"
    )
    parser.add_argument(
        "--fork",
        type=float,
        default=FORK_MICROSECONDS,
        metavar="US",
        help=f"the microseconds of a fork and a barrier (default: {FORK_MICROSECONDS})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the efficiencies")
    return parser.parse_args()


def with_batch(cases: Sequence[tuple[str, Case]], batch: int) -> list[tuple[str, Case]]:
    """The cases with this batch, each once, without those that are too large then."""
    changed = {replace(case, input=(batch, *case.input[1:])): network for network, case in cases}
    return [(network, case) for case, network in changed.items() if is_feasible(case)]


def simulate(network: str, case: Case, fork: float) -> Result:
    work = case.prepare()
    before = _load.cpu_module.algorithm_counts()
    work.ours()
    ran = [name for name, runs in _load.cpu_module.algorithm_counts().items() if runs > before[name]]
    recordings: dict[int, Recording] = {}
    end, rounds = time.process_time() + CASE_SECONDS, 0
    while rounds < LEAST_ROUNDS or time.process_time() < end:
        for threads in (1, *THREADS):
            recording = record(work.ours, threads)
            known = recordings.setdefault(threads, recording)
            recordings[threads] = known.merged(recording)
        rounds += 1
    largest = recordings[THREADS[-1]]
    return Result(
        network,
        case,
        work.flops,
        ", ".join(name.split(":")[-1] for name in ran if not name.endswith(":separate")),
        len(largest.parts),
        max(zip(map(sum, largest.parts), largest.tasks, strict=True), default=(0, 1))[1],
        {threads: known.seconds(fork) for threads, known in recordings.items()},
    )


def record(call: Any, threads: int) -> Recording:
    """Runs the call once while the kernels simulate this number of threads."""
    _load.cpu_module.simulate_threads(threads)
    try:
        call()
        seconds, regions = _load.cpu_module.simulated_regions()
    finally:
        _load.cpu_module.simulate_threads(0)
    parts = tuple(tuple(times) for _, times in regions)
    return Recording(seconds - sum(map(sum, parts)), tuple(tasks for tasks, _ in regions), parts)


def summary(results: Sequence[Result]) -> Table:
    """The geometric mean of the efficiencies of each op and pass, and how many large cases are below the least."""
    table = Table(title="efficiency: the ideal time / the simulated time", title_justify="left")
    table.add_column("op and pass")
    for name in ("cases", *(f"{threads} threads" for threads in THREADS)):
        table.add_column(name, justify="right")
    table.add_column(f"{LARGE / 1e6:.0f} MFLOP", justify="right")
    table.add_column(f"of these, below {LEAST_EFFICIENCY} with {GATED_THREADS}", justify="right")
    for name, group in grouped(results).items():
        means = [statistics.geometric_mean(result.efficiency(threads) for result in group) for threads in THREADS]
        large = [result for result in group if result.gated]
        below = f"{sum(not result.passed for result in large) / len(large):.1%}" if large else ""
        table.add_row(name, str(len(group)), *(f"{mean:.2f}" for mean in means), str(len(large)), below)
    return table


def grouped(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results by the name of the op, the pass and the dtype."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        dtype = str(result.case.dtype).removeprefix("torch.")
        groups.setdefault(f"{result.case.op} {result.case.timed} {dtype}", []).append(result)
    return dict(sorted(groups.items()))


def worst(results: Sequence[Result]) -> Table:
    """The least efficient large cases."""
    table = Table(title=f"the worst {WORST} of at least {LARGE / 1e6:.0f} MFLOP", title_justify="left")
    table.add_column("case", no_wrap=True)
    table.add_column("algorithm")
    for name in ("MFLOP", "forks", "tasks", *map(str, THREADS)):
        table.add_column(name, justify="right", no_wrap=True)
    for r in sorted(filter(lambda r: r.gated, results), key=lambda r: r.efficiency(GATED_THREADS))[:WORST]:
        efficiencies = (f"{r.efficiency(threads):.2f}" for threads in THREADS)
        table.add_row(r.case.name, r.algorithm, f"{r.flops / 1e6:,.0f}", str(r.regions), str(r.tasks), *efficiencies)
    return table


def as_json(report: dict[str, Any], results: Sequence[Result]) -> str:
    """The report with a line for each result: network, case, FLOP, algorithm, forks, tasks, and the efficiencies."""
    rows = []
    for r in results:
        efficiencies = {threads: round(r.efficiency(threads), 3) for threads in THREADS}
        rows.append([r.network, r.case.name, r.flops, r.algorithm, r.regions, r.tasks, efficiencies])
    return json.dumps(report)[:-1] + ',\n"results": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n"


if __name__ == "__main__":
    main()
