"""Runs the whole benchmark, and makes the Markdown tables of docs/benchmarks.md and the README from its results.

`python bench/report.py --run NAME` times everything and writes bench/results/NAME-lenet.json, NAME-ops.json and
NAME-compile.json, with a plot of the ratios of each and a roofline of the ops. `python bench/report.py FILE.json ...`
prints the tables of such files. `python bench/report.py --headline` prints the table of the README, made from all of
them.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

HERE = Path(__file__).parent
SCRIPTS = ("lenet", "ops", "compile")

# The rows of the README's table: each case, and its name in that table.
HEADLINE = {
    "LeNet(fused=True) training, batch 64": "LeNet with fused blocks, forward and backward, batch 64",
    "LeNet training, batch 64": "LeNet with drop-in layers, forward and backward, batch 64",
    "LeNet(fused=True) inference, batch 1": "LeNet with fused blocks, inference, batch 1",
    "conv2d_relu_max_pool2d 64x1x32x32 6x1x5x5 forward": "conv2d + ReLU + pooling, 64x1x32x32 to 6 channels, forward",
    "conv2d 64x6x14x14 16x6x5x5 grad_weight": "conv2d 64x6x14x14 to 16 channels, 5x5, grad_weight",
    "conv2d 8x64x56x56 64x64x3x3 1,1 forward": "conv2d 8x64x56x56 to 64 channels, 3x3, forward",
    "max_pool2d 8x64x112x112 3,2,1 forward": "max_pool2d 8x64x112x112, 3x3, stride 2, forward",
    "linear 64x400 120x400 forward": "linear 64x400 to 120, forward",
    "linear 16x4096 4096x4096 bfloat16 forward": "linear 16x4096 to 4096, bfloat16, forward",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Time everything, or print a Markdown table with a line for each group."
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.json")
    parser.add_argument("--run", metavar="NAME", help="time everything first; NAME says what machine it is")
    parser.add_argument("--headline", action="store_true", help="print the table of the README")
    args = parser.parse_args()
    if args.headline:
        print("\n".join(headline(sorted(HERE.glob("results/*.json")))))
    for file in args.files + (run(args.run) if args.run else []):
        print("\n".join(table(file.name, json.loads(file.read_text()))), end="\n\n")


def run(name: str) -> list[Path]:
    """Times everything, each script in a process of its own."""
    files = []
    (HERE / "results").mkdir(exist_ok=True)
    for script in SCRIPTS:
        file = HERE / "results" / f"{name}-{script}.json"
        outputs = ["--json", str(file), "--plot", str(file.with_suffix(".png"))]
        subprocess.run([sys.executable, str(HERE / f"{script}.py"), *outputs], check=True)
        files.append(file)
    ops = files[SCRIPTS.index("ops")]
    roofline(json.loads(ops.read_text()), HERE / "results" / f"{name}-roofline.png")
    return files


def roofline(report: dict[str, Any], path: Path) -> None:
    """Plots operations per second over operations per byte, for float32 on one thread, and the machine's limits."""
    limits = report["limits"]["1"]
    flops, bandwidth = limits["torch.float32 GFLOP/s"], limits["copy GB/s"]
    drawn = [r for r in report["results"] if r["threads"] == 1 and r["dtype"] == "torch.float32" and r["flops"]]
    intensity = [r["flops"] / r["bytes"] for r in drawn]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for side in ("stock", "ours"):
        axes.plot(intensity, [r["flops"] / r[f"{side}_min"] / 1e9 for r in drawn], "o", markersize=3, label=side)
    ends = [min(intensity), flops / bandwidth, max(intensity)]
    axes.plot(ends, [min(flops, bandwidth * x) for x in ends], "k-", linewidth=0.8, label="copying, multiply-adds")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that has to move", ylabel="GFLOP/s")
    axes.legend()
    figure.savefig(path, dpi=100)


def table(name: str, report: dict[str, Any]) -> list[str]:
    """A table of the speed-up of each group over stock: geometric mean (worst to best), by number of threads."""
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


def headline(files: list[Path]) -> list[str]:
    """A table of the median times on one thread and their ratio, with three columns for each run that has files."""
    runs: dict[str, dict[str, Any]] = {}
    for file in files:
        results = json.loads(file.read_text())["results"]
        run = runs.setdefault(file.stem.rpartition("-")[0], {})
        run |= {result["name"]: result for result in results if result["threads"] == 1}
    lines = [
        f"| one thread, float32 unless noted |{' stock | pyops | speed-up |' * len(runs)}",
        f"|---|{'--:|' * 3 * len(runs)}",
    ]
    for name, title in HEADLINE.items():
        cells = [
            f" {duration(case['stock_median'])} | {duration(case['ours_median'])} | {case['ratio']:.1f} |"
            for case in (run[name] for run in runs.values())
        ]
        lines.append(f"| {title} |{''.join(cells)}")
    return lines


def duration(seconds: float) -> str:
    """The duration to three digits, in milliseconds or microseconds."""
    unit, value = ("ms", seconds * 1e3) if seconds >= 1e-3 else ("µs", seconds * 1e6)
    return f"{float(f'{value:.3g}'):g} {unit}"


if __name__ == "__main__":
    main()
