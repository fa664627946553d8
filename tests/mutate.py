"""Plants faults in the CPU kernels, one at a time, and lets tests/fuzz.py look for each, which tests the fuzzer itself.

    python tests/mutate.py                      # every fault, up to two minutes each
    python tests/mutate.py --only "sums: of a bias only the last image counts" --minutes 5
    python tests/mutate.py --list

The faults are in the tables of tests/fuzzing/faults. First the unchanged kernels have to pass. A problem that finds a
fault is then run on the unchanged kernels too, and has to pass there. Everything is compiled with the flags that `pip
install --no-build-isolation -e .` has left in build/, but with -O1. If a fault is not found, its build stays in
build/mutants.
"""

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from fuzz import SEEDS_OF_A_RUN
from fuzzing import campaign
from fuzzing.faults import FAULTS
from fuzzing.faults.fault import Fault
from torch.utils.cpp_extension import get_cxx_compiler, library_paths

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc"
TORCH_HEADERS = ("ATen/Parallel.h", "ATen/cpu/vec/functional.h", "ATen/cpu/vec/vec.h")


class Outcome(NamedTuple):
    """What the fuzzer found in some kernels."""

    seconds: float
    seed: int | None = None  # of the problem that failed, or None if none failed
    difference: str = ""


# ---- the table ----


def stale(faults: Iterable[Fault]) -> list[str]:
    """The faults in the table that do not match the sources, as messages."""
    messages = []
    for fault in faults:
        count = (SOURCES / "cpu" / fault.file).read_text().count(fault.old)
        if count != 1:
            messages.append(f"{fault.name}: csrc/cpu/{fault.file} has {count} times instead of once: {fault.old}")
    return messages


def without_fault(kernels: ModuleType, faults: Iterable[Fault]) -> list[str]:
    """The algorithms and parts of these kernels in which no fault is planted. Ops may share an algorithm."""
    files = {f"{op}:{name}": file for op, rows in kernels.algorithms().items() for name, file in rows}

    def code(algorithm: str) -> tuple[str, str]:
        return algorithm.rpartition(":")[2], files.get(algorithm, "")

    planted = {code(fault.algorithm) for fault in faults if fault.algorithm}
    elsewhere = {algorithm for algorithm, file in files.items() if not file.startswith("csrc/cpu/")}
    return sorted(name for name in kernels.algorithm_counts() if name not in elsewhere and code(name) not in planted)


def includes(path: Path) -> set[Path]:
    names = re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
    return {(path.parent / name).resolve() for name in names}


def affected(changed: Path) -> set[Path]:
    """`changed` itself and the files that include it, directly or indirectly."""
    files = {path: includes(path) for path in SOURCES.rglob("*") if path.suffix in (".h", ".cpp")}
    found: set[Path] = set()
    more = {changed}
    while more:
        found |= more
        more = {path for path, included in files.items() if included & found} - found
    return found


# ---- building ----


def commands_of_build(capability: str) -> list[dict[str, str]]:
    """The commands with which setup.py has compiled the kernels, one for each source, as ninja knows them."""
    tag = f"{sys.implementation.cache_tag}-torch-{torch.__version__}"
    folder = ROOT / "build" / tag / f"pyops._cpu_{capability}"
    if not (folder / "build.ninja").exists():
        raise SystemExit(f"there is no {folder}/build.ninja: run `pip install --no-build-isolation -e .` first")
    database = subprocess.check_output(["ninja", "-C", folder, "-t", "compdb"], text=True)
    return json.loads(database[database.index("[") :])


@dataclass(frozen=True)
class Kernels:
    """A copy of pyops in a folder of its own, whose kernels of one instruction set are compiled from other sources."""

    folder: Path
    capability: str

    @property
    def module(self) -> Path:
        return self.folder / "pyops" / f"_cpu_{self.capability}{sysconfig.get_config_var('EXT_SUFFIX')}"

    @property
    def header(self) -> Path:
        """torch's headers, precompiled because they take most of the time of a compilation."""
        return self.folder / "torch.h"

    def precompile_header(self) -> None:
        self.header.write_text("".join(f"#include <{name}>\n" for name in TORCH_HEADERS))
        entry = commands_of_build(self.capability)[0]
        run_compiler(command_for(entry, self.header, self.header.with_suffix(".h.gch")))

    def object_of(self, source: Path) -> Path:
        return self.folder / f"{source.stem}.o"

    def make_package(self) -> None:
        """Makes the package from links to all of pyops except the kernels."""
        package = self.folder / "pyops"
        package.mkdir(parents=True)
        for path in (ROOT / "pyops").iterdir():
            if path.name not in ("__pycache__", self.module.name):
                (package / path.name).symlink_to(path)

    def compile(self, fault: Fault | None, original: "Kernels | None", jobs: int) -> None:
        """Builds the module with a fault in it; objects that the fault does not affect are taken from the original."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.make_package()
        shutil.copytree(SOURCES, self.folder / "csrc")
        header = (original or self).header
        if original is None:
            self.precompile_header()
        if fault is not None:
            changed = self.folder / "csrc" / "cpu" / fault.file
            changed.write_text(changed.read_text().replace(fault.old, fault.new))
        anew = affected(SOURCES / "cpu" / fault.file) if fault else None
        objects, work = [], []
        for entry in commands_of_build(self.capability):
            source = (Path(entry["directory"]) / entry["file"]).resolve()
            if anew is None or source in anew:
                objects.append(self.object_of(source))
                copy = self.folder / source.relative_to(ROOT)
                work.append([*command_for(entry, copy, objects[-1]), "-include", str(header)])
            else:
                objects.append(original.object_of(source))
        with ThreadPoolExecutor(jobs) as compilers:
            list(compilers.map(run_compiler, work))
        libraries = [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch_python"]
        compiler = shlex.split(get_cxx_compiler())
        run_compiler([*compiler, "-shared", *map(str, objects), *libraries, "-o", str(self.module)])

    # ---- fuzzing ----

    def environment(self) -> dict[str, str]:
        others = os.environ.get("PYTHONPATH")
        return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(self.folder), others)))}

    def check_import(self) -> None:
        """Checks that the fuzzer imports this module and no other."""
        program = f"import pyops._cpu_{self.capability} as module; print(module.__file__)"
        command = [sys.executable, "-P", "-c", program]
        imported = subprocess.check_output(command, env=self.environment(), text=True).strip()
        assert imported == str(self.module), f"{imported} is imported instead of {self.module}"

    def fuzz(self, op: str | None, *options: str) -> Outcome:
        command = [sys.executable, ROOT / "tests" / "fuzz.py", "--capability", self.capability, *options]
        command += ["--op", op] if op else []
        begin = time.monotonic()
        process = subprocess.run(command, env=self.environment(), text=True, capture_output=True)
        seconds = time.monotonic() - begin
        failure = re.search(r"--one (\d+)\n\s+(.*)", process.stdout)
        if failure:
            return Outcome(seconds, int(failure[1]), failure[2].removeprefix("AssertionError: "))
        if "problems, 0 failures" not in process.stdout:
            raise SystemExit(f"{shlex.join(map(str, command))} failed:\n{process.stdout}{process.stderr}")
        return Outcome(seconds)

    def solves(self, op: str, seed: int) -> bool:
        """Whether the problem of one seed passes."""
        command = [sys.executable, ROOT / "tests" / "fuzz.py", "--capability", self.capability, "--op", op]
        process = subprocess.run([*command, "--one", str(seed)], env=self.environment(), capture_output=True)
        return process.returncode == 0


def command_for(entry: dict[str, str], source: Path, target: Path) -> list[str]:
    """The command of the build, changed to compile another source to another object with little optimization."""
    command = entry["command"].replace(entry["file"], str(source)).replace(entry["output"], str(target))
    return [*shlex.split(command), "-O1", "-w"]


def run_compiler(command: list[str]) -> None:
    process = subprocess.run(command, text=True, capture_output=True)
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{process.stderr}")


# ---- the run ----


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    best = list(campaign.capabilities())[-1]
    parser.add_argument("--only", action="append", metavar="NAME", help="this fault alone; may be given several times")
    parser.add_argument("--minutes", type=float, default=2.0, help="for each fault (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument(
        "--capability", choices=("default", "avx2", "avx512"), default=best, help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the fuzzer's runs (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the table and do nothing")
    return parser.parse_args()


def choose(arguments: argparse.Namespace) -> list[Fault]:
    faults = [fault for fault in FAULTS if fault.capability in (None, arguments.capability)]
    if arguments.only is None:
        return faults
    unknown = set(arguments.only) - {fault.name for fault in faults}
    if unknown:
        raise SystemExit(f"no fault of {arguments.capability} is named {', '.join(sorted(unknown))}")
    return [fault for fault in faults if fault.name in arguments.only]


def show(name: str, file: str, seconds: object, problems: object, difference: str) -> None:
    print(f"{name:70.70} {file:38} {seconds:>7} {problems:>8}  {difference:.80}", flush=True)


def look_for(fault: Fault, original: Kernels, folder: Path, options: list[str], jobs: int) -> bool:
    """Builds the kernels with a fault, fuzzes them, prints the outcome, and returns whether the fault was found."""
    kernels = Kernels(folder, original.capability)
    kernels.compile(fault, original, jobs)
    kernels.check_import()
    outcome = kernels.fuzz(fault.op, *options, "--until-failure")
    difference, problems, found = "NOT FOUND", "", False
    if outcome.seed is not None:
        found = original.solves(fault.op, outcome.seed)
        problems = outcome.seed % SEEDS_OF_A_RUN + 1
        difference = outcome.difference if found else f"NOT FOUND, for it fails without: {outcome.difference}"
    show(fault.name, fault.file, round(outcome.seconds), problems, difference)
    if found:
        shutil.rmtree(folder)
    return found


def main() -> int:
    arguments = parse()
    faults = choose(arguments)
    if arguments.list:
        for fault in faults:
            print(f"{fault.name}\n    {fault.file}, {fault.op}: {fault.algorithm or 'shared'}")
        return 0
    kernels = importlib.import_module(f"pyops._cpu_{arguments.capability}")
    wrong = stale(faults) + [f"no fault is planted in {name}" for name in without_fault(kernels, FAULTS)]
    if wrong:
        raise SystemExit("tests/fuzzing/faults has to follow the code:\n" + "\n".join(wrong))
    begin = time.monotonic()
    folder = ROOT / "build" / "mutants" / arguments.capability
    options = ["--minutes", str(arguments.minutes), "--jobs", str(arguments.jobs), "--seed", str(arguments.seed)]
    show("fault", "file", "seconds", "problems", "found by")
    original = Kernels(folder / "original", arguments.capability)
    original.compile(None, None, arguments.jobs)
    original.check_import()
    outcome = original.fuzz(None, *options)
    if outcome.seed is not None:
        raise SystemExit(f"the kernels as they are fail the problem of seed {outcome.seed}: {outcome.difference}")
    show("none", "", round(outcome.seconds), "", "nothing, as it should be")
    missed = sum(
        not look_for(fault, original, folder / f"fault{FAULTS.index(fault)}", options, arguments.jobs)
        for fault in faults
    )
    minutes = (time.monotonic() - begin) / 60
    print(f"{len(faults) - missed} of {len(faults)} faults found, in {minutes:.0f} minutes")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
