"""Builds the CUDA kernels so that they run without a GPU: g++ compiles the .cu files on the emulator of tests/emulator.

The objects are kept in build/ and rebuilt if their sources are newer. PYOPS_SANITIZE=1 builds with AddressSanitizer and
UndefinedBehaviorSanitizer (tests/sanitize.py).
"""

import functools
import os
import platform
import shlex
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

import pyops
from pyops import _algorithms

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "emulator"
FORWARD, REVERSE, SHUFFLED, ALTERNATING = range(4)  # orders of threads and blocks
SANITIZE = os.environ.get("PYOPS_SANITIZE") == "1"

AVAILABLE = platform.machine() == "x86_64"
needed = pytest.mark.skipif(not AVAILABLE, reason="the emulator is for x86-64")

COMPILER = [*shlex.split(os.environ.get("CXX", "g++")), "-std=c++17", "-fPIC", "-fvisibility=hidden"]
COMPILER += ["-fno-strict-aliasing"]
# The kernels ask for every contraction by fma, and nvcc contracts nothing else, so neither does this compiler. With
# -mfma, fma is an instruction instead of a function call.
COMPILER += ["-O2", "-ffp-contract=off", "-mfma", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
COMPILER += [
    "-DPYOPS_EMULATED",
    "-DPYOPS_LARGEST_32_BIT_OFFSET=emulator::largest_32_bit_offset",
    "-DPYOPS_MOST_BLOCKS=2",
    f"-I{FOLDER}",
]
if SANITIZE:
    COMPILER += ["-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def _compile(target: Path, sources: list[Path], *options: str) -> Path:
    """Compiles `target`, unless it is newer than everything that it can depend on."""
    headers = [*ROOT.glob("cuda/**/*.h"), *FOLDER.glob("*.h"), *ROOT.glob("csrc/*.h")]
    inputs = [*sources, *headers, Path(__file__)]
    if not target.exists() or target.stat().st_mtime < max(path.stat().st_mtime for path in inputs):
        target.parent.mkdir(parents=True, exist_ok=True)
        finished = target.with_suffix(f".{os.getpid()}")  # another process may build this target at the same time
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # is for Python only
        subprocess.run([*COMPILER, *options, *map(str, sources), "-o", finished], env=environment, check=True)
        finished.rename(target)
    return target


def build_program(name: str) -> Path:
    """Builds the program of tests/emulator/<name>.cpp."""
    return _compile(_build_folder() / name, [FOLDER / f"{name}.cpp"])


def _build_folder() -> Path:
    return ROOT / "build" / ("emulated-sanitized" if SANITIZE else "emulated")


def build_module() -> Path:
    """Builds the Python module of the kernels."""
    folder = _build_folder()
    sources = {path: path.stem for path in sorted(ROOT.glob("cuda/**/*.cu"))} | {FOLDER / "module.cpp": "module"}
    include = f"-I{sysconfig.get_path('include')}"

    def compile_one(path: Path) -> Path:
        return _compile(folder / f"{sources[path]}.o", [path], "-c", include, "-x", "c++")

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as compilers:
        objects = list(compilers.map(compile_one, sources))
    return _compile(folder / "emulated_kernels.so", objects, "-shared")


@functools.cache
def load() -> ModuleType:
    """The module, which is built if necessary; pyops._C.set_cpu_kernels takes its `kernels`."""
    loader = ExtensionFileLoader("emulated_kernels", str(build_module()))
    module = module_from_spec(spec_from_loader("emulated_kernels", loader))
    loader.exec_module(module)
    return module


def installed() -> bool:
    """Whether the CUDA kernels compute on CPU tensors at the moment."""
    return load.cache_info().currsize > 0 and load() in _algorithms.modules


@contextmanager
def kernels(order: int = ALTERNATING, largest_32_bit_offset: int = 20_000, tf32: bool = False) -> Iterator[None]:
    """While the context lasts, the CUDA kernels compute on CPU tensors, with threads and blocks in the given order.

    The limit above which offsets have 64 bits is low, so that tests reach both kinds of offsets. `tf32` replaces
    torch's flags, which are consulted for CUDA tensors only.
    """
    module = load()
    module.set_order(order)
    module.set_largest_32_bit_offset(largest_32_bit_offset)
    module.set_tf32(tf32)
    pyops._C.set_cpu_kernels(module.kernels)
    of_cpu, _algorithms.modules[:] = _algorithms.modules[:], [module]
    try:
        yield
    finally:
        pyops._C.set_cpu_kernels(pyops._load.cpu_module.kernels)
        _algorithms.modules[:] = of_cpu
