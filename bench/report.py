"""The Markdown table of the README, from files that bench/ops.py and bench/lenet.py wrote with --json.

`python bench/report.py bench/results/*.json`
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description="Print a Markdown table of benchmark results, a line for each group.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    for file in parser.parse_args().files:
        print("\n".join(table(file.name, json.loads(file.read_text()))), end="\n\n")


def table(name: str, report: dict[str, Any]) -> list[str]:
    """How many times faster than stock each group is: geometric mean (worst to best), by number of threads."""
    machine, versions = report["machine"], report["versions"]
    threads = list(dict.fromkeys(result["threads"] for result in report["results"]))
    lines = [
        f"`{name}`: {machine['cpu']}, {machine['cores']} cores, {machine['capability']}; torch {versions['torch']}, "
        f"pyops {versions['pyops']} at commit {report['commit']}; {report['date'][:10]}.",
        "",
        "| stock's time / pyops' time | cases | " + " | ".join(f"{n} thread{'s' * (n > 1)}" for n in threads) + " |",
        "|---|--:|" + "--:|" * len(threads),
    ]
    for group in dict.fromkeys(result["group"] for result in report["results"]):
        results = [result for result in report["results"] if result["group"] == group]
        cells = []
        for n in threads:
            ratios = [result["ratio"] for result in results if result["threads"] == n]
            cells.append(f"{statistics.geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append(f"| {group} | {len(results) // len(threads)} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
