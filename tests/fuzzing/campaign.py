"""Runs problems in worker processes, so that a crash or a hang costs one problem and is reported like a wrong result.

A worker takes every n-th seed. It writes its current seed to a file, which tells the parent what a worker that died or
hangs was doing, and it reports its results as lines of JSON. A worker that dies is replaced by one that continues with
the next seed.
"""

import importlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HANG = 60.0  # seconds for one problem
START = 600.0  # seconds for a worker's imports, on a busy machine
TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Settings:
    """The problems that a campaign draws, and where they run."""

    kind: str  # a module of this package
    first: int  # seed
    seconds: float
    op: str | None = None
    algorithm: str | None = None
    capability: str | None = None  # None means the kernels that torch would choose
    device: str = "cpu"

    def name(self) -> str:
        where = self.capability if self.device == "cpu" else self.device
        return " ".join(filter(None, (self.kind, self.op, self.algorithm, where)))

    def replay(self, seed: int) -> str:
        """The command that reruns one problem of this campaign."""
        options = ["" if self.kind == "ops" else f"--{self.kind}", f"--op {self.op}" if self.op else ""]
        options += [f"--algorithm {self.algorithm}" if self.algorithm else ""]
        options += [f"--device {self.device}" if self.device != "cpu" else ""]
        options += [f"--capability {self.capability}" if self.capability else "", f"--one {seed}"]
        return " ".join(["python tests/fuzz.py", *filter(None, options)])

    def environment(self) -> dict[str, str]:
        chosen = {"ATEN_CPU_CAPABILITY": self.capability} if self.capability else {}
        return os.environ | {"OMP_WAIT_POLICY": "passive"} | chosen  # several workers share the cores


@dataclass
class Result:
    """The results of a campaign."""

    problems: int = 0
    failures: dict[int, str] = field(default_factory=dict)  # by seed: what is wrong, and a test that shows it
    algorithms: Counter[str] = field(default_factory=Counter)


# ---- in the worker ----


def draw(settings: Settings, seed: int) -> Any:
    """The problem of a seed."""
    module = importlib.import_module(f"fuzzing.{settings.kind}")
    if settings.kind == "ops":
        return module.draw(seed, settings.op, settings.algorithm, small=settings.device == "emulated")
    return module.draw(seed)


def on_device(settings: Settings, stack: ExitStack, seed: int) -> None:
    """Installs the kernels of the settings' device until `stack` is closed."""
    if settings.device == "emulated":
        import emulated

        limit = (20_000, 2_000, 1 << 31)[seed % 3]  # above it, offsets have 64 bits
        stack.enter_context(emulated.kernels(seed % 4, limit))


def run_one(settings: Settings, seed: int) -> tuple[str, str] | None:
    """Checks one problem. Returns what is wrong and a test that shows it, or None."""
    problem = None
    try:
        with ExitStack() as stack:
            on_device(settings, stack, seed)
            problem = draw(settings, seed)
            problem.check()
    except Exception as error:
        return f"{type(error).__name__}: {error}", "" if problem is None else problem.as_test()
    return None


def algorithm_counts(settings: Settings) -> dict[str, int]:
    """How often each algorithm of the settings' device has run in this process."""
    from pyops import _load

    if settings.device == "emulated":
        import emulated

        return emulated.load().algorithm_counts()
    return _load.cpu_module.algorithm_counts()


def work(settings: Settings, first: int, step: int, seconds: float, place: Path) -> None:
    """The work of a worker: it checks the problems first, first + step, ... until the time is over."""
    import faulthandler
    import warnings

    import torch

    from pyops import _load

    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if settings.capability and settings.capability.upper() != _load.cpu_capability:
        raise SystemExit(f"this machine does not run the kernels of {settings.capability}")
    print(json.dumps({"started": True}), flush=True)
    end, done = time.monotonic() + seconds, 0
    with place.open("w+b", buffering=0) as note:
        seed = first
        while time.monotonic() < end:
            os.pwrite(note.fileno(), seed.to_bytes(16, "little"), 0)
            wrong = run_one(settings, seed)
            done += 1
            if wrong is not None:
                print(json.dumps({"seed": seed, "wrong": "\n".join(wrong)}), flush=True)
            if done % 500 == 0:
                print(json.dumps({"done": 500, "algorithms": algorithm_counts(settings)}), flush=True)
            seed += step
    print(json.dumps({"done": done % 500, "algorithms": algorithm_counts(settings), "finished": True}), flush=True)


# ---- in the parent ----


class Worker:
    """A worker process, which is restarted after a problem that killed it."""

    def __init__(self, settings: Settings, index: int, count: int, folder: Path, result: Result):
        self.settings, self.count, self.result = settings, count, result
        self.place = folder / f"worker{index}"
        self.end = time.monotonic() + settings.seconds
        self.algorithms: Counter[str] = Counter()  # counts of the current process
        self.finished = False
        self.start(settings.first + index)

    def start(self, seed: int) -> None:
        seconds = max(self.end - time.monotonic(), 0.0)
        self.place.write_bytes(seed.to_bytes(16, "little"))
        self.seed, self.since, self.limit = seed, time.monotonic(), START
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by read_log)
        arguments = json.dumps([asdict(self.settings), seed, self.count, seconds, str(self.place)])
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "fuzz.py"), "--worker", arguments],
            env=self.settings.environment(),
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def read(self, line: str) -> None:
        report = json.loads(line)
        if "started" in report:
            self.since, self.limit = time.monotonic(), HANG
        self.result.problems += report.get("done", 0)
        if "wrong" in report:
            self.result.failures[report["seed"]] = report["wrong"]
        if "algorithms" in report:
            self.algorithms = Counter(report["algorithms"])
        self.finished = self.finished or report.get("finished", False)

    def read_log(self) -> str:
        with self.log as log:
            log.seek(0)
            return log.read()[-2000:]

    def watch(self) -> None:
        """Kills a process that hangs."""
        seed = int.from_bytes(self.place.read_bytes(), "little")
        if seed != self.seed:
            self.seed, self.since = seed, time.monotonic()
        elif time.monotonic() - self.since > self.limit:
            self.process.kill()

    def ended(self) -> bool:
        """Records the end of a process; returns False if another one has replaced it."""
        status = self.process.wait()
        log = self.read_log()
        self.result.algorithms.update(self.algorithms)
        self.algorithms = Counter()
        if self.finished:
            return True
        seed = int.from_bytes(self.place.read_bytes(), "little")
        hang = status == -9 and time.monotonic() - self.since > self.limit
        what = f"no end after {self.limit:.0f} s" if hang else f"the process died with status {status}"
        self.result.failures[seed] = f"{what}\n{log}"
        if status > 0 or time.monotonic() >= self.end:  # an exception outside of a problem would recur
            return True
        self.start(seed + self.count)
        return False

    def stop(self) -> None:
        """Ends the process before its time."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


def run(settings: Settings, jobs: int, until_failure: bool = False) -> Result:
    """Runs a campaign in `jobs` processes, until its end or the first failure."""
    if settings.device == "emulated":
        import emulated

        emulated.build_module()  # otherwise the first problem of a worker would take minutes
    result = Result()
    with tempfile.TemporaryDirectory() as folder, selectors.DefaultSelector() as selector:
        for i in range(jobs):
            worker = Worker(settings, i, jobs, Path(folder), result)
            selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        while selector.get_map() and not (until_failure and result.failures):
            for key, _ in selector.select(timeout=1.0):
                worker = key.data
                line = worker.process.stdout.readline()
                if line:
                    worker.read(line)
                    continue
                selector.unregister(key.fileobj)
                key.fileobj.close()
                if not worker.ended():
                    selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            for key in selector.get_map().values():
                key.data.watch()
        for key in selector.get_map().values():
            key.data.stop()
    return result


def capabilities() -> Iterator[str]:
    """The instruction sets that were built and that this machine supports, the lowest first."""
    import torch

    from pyops import _load

    for capability in _load.build_info.cpu_capabilities:
        yield capability.lower()
        if capability == torch.backends.cpu.get_cpu_capability():
            return
