"""Times every algorithm of the kernels that supports a case of bench/ops.py: `python bench/algorithms.py --help`.

The kernels choose an algorithm by the shape, by costs that were fitted to measurements (csrc/algorithms.h). This script
measures how good the choices are on this machine: it forces each algorithm in turn, in one process, and tells where the
chosen one takes over 10 % longer than the best.
"""

import argparse
import json
import re
import statistics
import timeit
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measure
import ops
import torch
from harness import Case, environment

import pyops
from pyops import _algorithms

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[1] / "docs" / "algorithms.md"
GOOD = 1.1  # the time of the chosen algorithm, relative to the best, up to which the choice is good
ROUNDS = 7


@dataclass(frozen=True)
class Result:
    """The seconds per call of a case by each algorithm of one op that supports it."""

    case: str
    op: str
    chosen: str
    seconds: dict[str, float]

    @property
    def best(self) -> str:
        return min(self.seconds, key=self.seconds.__getitem__)

    @property
    def loss(self) -> float:
        """The time of the chosen algorithm relative to the best, at least 1."""
        return self.seconds[self.chosen] / self.seconds[self.best]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time every algorithm that supports a case, and judge the choices.")
    parser.add_argument("--filter", default="", metavar="REGEX", help="of the cases' names (default: all cases)")
    parser.add_argument("--algorithm", metavar="OP:NAME", help="only the cases for which it is chosen")
    parser.add_argument("--run", metavar="NAME", help="keep the results; NAME says what machine it is")
    parser.add_argument("--document", action="store_true", help=f"write {DOCUMENT.name} anew from the kept results")
    args = parser.parse_args()
    if args.run or not args.document:
        torch.set_num_threads(1)
        report = environment() | {"results": []}
        cases = {case.name: case for group in ops.GROUPS for case in group.cases if re.search(args.filter, case.name)}
        for case in cases.values():
            for result in measure_case(case, args.algorithm):
                report["results"].append(asdict(result))
                print(line(result), flush=True)
        if args.run:
            file = RESULTS / f"{args.run}-algorithms.json"
            file.write_text(json.dumps(report, indent=1) + "\n")
    if args.document:
        reports = {file.stem: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*-algorithms.json"))}
        DOCUMENT.write_text("\n".join(document(reports)) + "\n")


def measure_case(case: Case, algorithm: str | None) -> Iterator[Result]:
    call = case.prepare().ours
    for op, rows in _algorithms.run_by(call).items():
        if algorithm not in (None, f"{op}:{rows[0].name}") or len(rows) > 1:
            continue
        names = [row.name for row in _algorithms.supporting(op, call)]
        if len(names) > 1:
            yield Result(case.name, op, rows[0].name, time_each(op, names, call))


def time_each(op: str, names: Sequence[str], call: Callable[[], Any]) -> dict[str, float]:
    """The median seconds of a call by each algorithm. The algorithms take turns."""
    timer = timeit.Timer(call)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    numbers = {}
    for turn in range(ROUNDS):
        for name in names if turn % 2 else reversed(names):
            with pyops.testing.force_algorithm(op, name):
                if name not in numbers:
                    numbers[name] = measure.calls_per_block(timer)
                seconds[name].append(timer.timeit(numbers[name]) / numbers[name])
    return {name: statistics.median(times) for name, times in seconds.items()}


def line(result: Result) -> str:
    times = ", ".join(
        f"{name} {1e6 * seconds:,.1f} us" for name, seconds in sorted(result.seconds.items(), key=lambda x: x[1])
    )
    verdict = "" if result.loss <= GOOD else f"  [{result.chosen} is chosen: {result.loss:.2f} times the best]"
    return f"{result.case}, {result.op}: {times}{verdict}"


def document(reports: dict[str, dict[str, Any]]) -> list[str]:
    """The text of docs/algorithms.md."""
    lines = [
        "# The choice of algorithms",
        "",
        "Every algorithm that supports a case of `bench/ops.py` was timed on one thread, in turns within one process.",
        "This page is written by `python bench/algorithms.py --run NAME --document`, and the files in `bench/results/`",
        "hold all times. `pyops info --algorithm` tells what is chosen for a shape on your machine, and",
        "[architecture.md](architecture.md) says what the algorithms are.",
    ]
    for name, report in reports.items():
        machine, results = report["machine"], [Result(**result) for result in report["results"]]
        lines += [
            "",
            f"## {machine['cpu']}, {machine['capability']}",
            "",
            f"`{name}.json`: torch {report['versions']['torch']}, pyops at commit {report['commit']}, "
            f"{report['date'][:10]}. Times are in microseconds.",
            "",
            "| op | algorithm | chosen for | of these good | example | its time | the others' times |",
            "|---|---|--:|--:|---|--:|---|",
        ]
        for op in dict.fromkeys(result.op for result in results):
            for algorithm in dict.fromkeys(result.chosen for result in results if result.op == op):
                lines.append(row([result for result in results if (result.op, result.chosen) == (op, algorithm)]))
        poor = sorted((result for result in results if result.loss > GOOD), key=lambda result: -result.loss)
        lines += [
            "",
            f"The choice is good if the best algorithm is at most 10 % faster, as for {len(results) - len(poor)}",
        ]
        lines[-1] += f" of {len(results)} cases. The others, the worst first:"
        lines += ["", "| case | op | chosen | its time / the best's | best |", "|---|---|---|--:|---|"]
        lines += [f"| {r.case} | {r.op} | {r.chosen} | {r.loss:.2f} | {r.best} |" for r in poor]
    return lines


def row(results: Sequence[Result]) -> str:
    """The row of an algorithm: its example is the case in which it is furthest ahead of the second best."""

    def lead(result: Result) -> float:
        return min(s for name, s in result.seconds.items() if name != result.chosen) / result.seconds[result.chosen]

    example = max(results, key=lead)
    others = sorted((s, name) for name, s in example.seconds.items() if name != example.chosen)
    good = sum(result.loss <= GOOD for result in results)
    times = ", ".join(f"{name} {digits(seconds)}" for seconds, name in others)
    return (
        f"| {example.op} | {example.chosen} | {len(results)} | {good} | {example.case} | "
        f"{digits(example.seconds[example.chosen])} | {times} |"
    )


def digits(seconds: float) -> str:
    return f"{float(f'{1e6 * seconds:.3g}'):g}"


if __name__ == "__main__":
    main()
