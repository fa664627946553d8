"""Builds what runs the CUDA kernels without a GPU: cuda/*.cu by g++ on the emulator of tests/emulator.

The objects are kept in build/, and those are built anew whose sources are younger. PYOPS_SANITIZE=1 builds with
AddressSanitizer and UndefinedBehaviorSanitizer (tests/sanitize.py).
"""

import os
import platform
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "emulator"
SANITIZE = os.environ.get("PYOPS_SANITIZE") == "1"

needed = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is for x86-64")

COMPILER = [*shlex.split(os.environ.get("CXX", "g++")), "-std=c++17", "-fPIC", "-fno-strict-aliasing"]
# As nvcc contracts no more than the kernels ask for by fma; and the instruction for that rather than a function.
COMPILER += ["-O2", "-ffp-contract=off", "-mfma", "-Wall", "-Wextra", "-Werror", f"-I{FOLDER}"]
if SANITIZE:
    COMPILER += ["-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def _compile(target: Path, *arguments: str | Path) -> Path:
    """Runs the compiler for `target` unless that is younger than all that it can depend on."""
    inputs = [*ROOT.glob("cuda/*"), *FOLDER.iterdir(), ROOT / "csrc" / "kernels.h", Path(__file__)]
    if not target.exists() or target.stat().st_mtime < max(path.stat().st_mtime for path in inputs):
        target.parent.mkdir(parents=True, exist_ok=True)
        finished = target.with_suffix(f".{os.getpid()}")  # another process may build the same
        subprocess.run([*COMPILER, *map(str, arguments), "-o", finished], check=True)
        finished.rename(target)
    return target


def build_program(name: str) -> Path:
    """The program of tests/emulator/<name>.cpp."""
    return _compile(_build_folder() / name, FOLDER / f"{name}.cpp")


def _build_folder() -> Path:
    return ROOT / "build" / ("emulated-sanitized" if SANITIZE else "emulated")
