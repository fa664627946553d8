"""Runs every check of the CUDA kernels that needs a GPU, in one command.

``python bench/gpu_check.py`` builds pyops with CUDA. It then runs all tests (those of the ops on the GPU), the programs
of gpu_programs.py (graphs, streams, threads, large batches, more than 2^31 elements) and the timings of gpu_times.py,
which are written to bench/results/<gpu>.json and .md with the aims that they meet or miss. Last it runs the program
that is small enough under each of the four tools of compute-sanitizer. If a step fails or hangs, the following steps
still run, and the exit status reports the failure. ``--only`` chooses steps, ``--list`` shows their commands. Nothing
is downloaded: setuptools, ninja and the packages of the extras test and bench must be installed.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


class Step(NamedTuple):
    name: str
    command: list[str]
    environment: dict[str, str]


def steps() -> list[Step]:
    python, pip = [sys.executable], [sys.executable, "-m", "pip", "install"]
    pytest = [sys.executable, "-P", "-m", "pytest"]  # -P because pyops is not built in this folder
    sanitizer = ["compute-sanitizer", "--error-exitcode=1", "--require-cuda-init=no"]
    return [
        Step("build", [*pip, "--no-build-isolation", "--no-deps", "--force-reinstall", "."], {"PYOPS_CUDA": "1"}),
        # If a package is missing, only the tests that need it fail.
        Step("tests", [*pytest, "-q", "--continue-on-collection-errors", "--device=cuda"], {}),
        Step("programs", [*python, "bench/gpu_programs.py"], {}),
        Step("times", [*python, "bench/gpu_times.py"], {}),
        *(
            # torch's allocator would hide reads and writes beyond a tensor.
            Step(
                tool,
                [*sanitizer, f"--tool={tool}", *python, "bench/gpu_programs.py", "every_op"],
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            for tool in SANITIZERS
        ),
    ]


def run(chosen: list[Step], minutes: float) -> dict[str, bool]:
    """Runs each step for at most that many minutes, and returns whether it succeeded."""
    succeeded = {}
    for step in chosen:
        print(f"\n=== {step.name}: {' '.join(step.command)}", flush=True)
        try:
            environment = os.environ | step.environment
            code = subprocess.run(step.command, cwd=ROOT, env=environment, timeout=60 * minutes).returncode
        except FileNotFoundError:
            print(f"there is no {step.command[0]}")
            code = 127
        except subprocess.TimeoutExpired:
            print(f"stopped after {minutes} minutes")
            code = 124
        succeeded[step.name] = code == 0
    return succeeded


def main(argv: list[str] | None = None) -> None:
    names = [step.name for step in steps()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STEP", help=", ".join(names))
    parser.add_argument("--list", action="store_true", help="show the commands, run none")
    parser.add_argument("--minutes", type=float, default=20, help="after which a step is stopped; default: 20")
    args = parser.parse_args(argv)
    chosen = [step for step in steps() if step.name in args.only]
    if args.list:
        for step in chosen:
            print(f"{step.name}: {' '.join([*(f'{k}={v}' for k, v in step.environment.items()), *step.command])}")
        return
    succeeded = run(chosen, args.minutes)
    print("\n" + "\n".join(f"{name}: {'passed' if passed else 'FAILED'}" for name, passed in succeeded.items()))
    sys.exit(not all(succeeded.values()))


if __name__ == "__main__":
    main()
