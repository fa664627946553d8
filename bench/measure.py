"""Times a computation on stock torch and on pyops, and measures the machine's own limits, all in one process.

Other programs, the clock frequency and the memory all change while a benchmark runs. So the two sides take turns, in
short blocks of calls: what disturbs one side disturbs the other too. `timeit.Timer` times the blocks.
torch.utils.benchmark.Timer uses it too, but makes at least two untimed calls before every block; if a single call fills
a block, this would make the run three times as long.
"""

import concurrent.futures
import ctypes
import functools
import os
import statistics
import subprocess
import tempfile
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

BLOCK_SECONDS = 20e-3  # long enough to outweigh the other side's effects on the caches and on freed memory
CASE_SECONDS = 0.4  # what one comparison may take ...
MIN_ROUNDS, MAX_ROUNDS = 5, 20  # ... within this many turns
FMA_REPETITIONS = 1_000_000  # they take some 10 ms


@dataclass(frozen=True)
class Timing:
    """The seconds per call of both sides, one number for each block."""

    stock: list[float]
    ours: list[float]

    @property
    def ratio(self) -> float:
        """Stock's median time divided by ours, which is above 1 if pyops is faster."""
        return statistics.median(self.stock) / statistics.median(self.ours)


def compare(
    stock: Callable[[], object],
    ours: Callable[[], object],
    threads: int,
    block_seconds: float = BLOCK_SECONDS,
    case_seconds: float = CASE_SECONDS,
) -> Timing:
    """Times the two calls in turns with `threads` threads of torch. Both must have been called before."""
    torch.set_num_threads(threads)
    timers = [timeit.Timer(call) for call in (stock, ours)]
    numbers = [calls_per_block(timer, block_seconds) for timer in timers]
    timing = Timing([], [])
    started = timeit.default_timer()
    while len(timing.ours) < MIN_ROUNDS or (
        len(timing.ours) < MAX_ROUNDS and timeit.default_timer() - started < case_seconds
    ):
        for timer, number, seconds in zip(timers, numbers, (timing.stock, timing.ours), strict=True):
            seconds.append(timer.timeit(number) / number)
    return timing


def calls_per_block(timer: timeit.Timer, block_seconds: float = BLOCK_SECONDS) -> int:
    number = 1
    # The best of three counts: the first call may take much longer, because it maps memory that the other side freed.
    while (seconds := min(timer.repeat(3, number))) < block_seconds / 2:
        number *= 2
    return max(1, round(number * block_seconds / seconds))


@functools.cache
def peak_flops(dtype: torch.dtype, threads: int) -> float:
    """The floating point operations per second that the machine reaches, where a fused multiply-add counts as two.

    For float32 and float64 this is measured with a loop of nothing else (fma_peak.cpp), on every thread at once. For
    the 16-bit types it is the best rate of stock's matrix product on matrices that fit into a core's cache; that uses
    matrix units if there are any.
    """
    if dtype in (torch.float32, torch.float64):
        count = getattr(_fma_library(), f"fma_peak_{dtype}".replace("torch.", ""))
        count.restype, count.argtypes = ctypes.c_double, [ctypes.c_long]
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:  # ctypes releases the GIL
            return max(sum(pool.map(count, [FMA_REPETITIONS] * threads)) for _ in range(MAX_ROUNDS))
    return max(2 * n**3 / _best_seconds(torch.mm, torch.ones(n, n, dtype=dtype), threads) for n in (256, 512, 1024))


@functools.cache
def _fma_library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "fma_peak.so")
        compiler = os.environ.get("CXX", "c++")
        options = ("-O3", "-march=native", "-shared", "-fPIC")
        subprocess.run([compiler, *options, Path(__file__).with_name("fma_peak.cpp"), "-o", library], check=True)
        return ctypes.CDLL(str(library))


@functools.cache
def copy_bandwidth(threads: int) -> float:
    """The bytes read and written per second while copying 256 MB that are in no cache."""
    source = torch.ones(64 * 1024**2)
    return 2 * source.nbytes / _best_seconds(torch.Tensor.copy_, source, threads)


def _best_seconds(function: Callable[[torch.Tensor, torch.Tensor], object], operand: torch.Tensor, threads: int):
    torch.set_num_threads(threads)
    timer = timeit.Timer(functools.partial(function, operand.clone(), operand))
    number = calls_per_block(timer)
    return min(timer.repeat(MAX_ROUNDS, number)) / number
