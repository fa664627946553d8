"""Times the same work on stock torch and on pyops, and the machine's own limits, all in one process.

Other programs, the clock frequency and the memory all change while a benchmark runs. So the two sides take turns, in
short blocks of calls: what disturbs the one disturbs the other too. The blocks are `timeit.Timer`'s, which is also
what torch.utils.benchmark.Timer times with; the latter repeats at least two untimed calls in front of every block,
though, and where one call is a block that would make the run three times as long.
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

BLOCK_SECONDS = 20e-3  # long against what the other side left behind: in the caches, and freed memory to be faulted in
CASE_SECONDS = 0.4  # what one comparison may take ...
MIN_ROUNDS, MAX_ROUNDS = 5, 20  # ... within this many turns
FMA_REPETITIONS = 1_000_000  # some 10 ms


@dataclass(frozen=True)
class Timing:
    """Seconds per call of both sides, one number for each block."""

    stock: list[float]
    ours: list[float]

    @property
    def ratio(self) -> float:
        """Stock's median time divided by ours: above 1 where pyops is the faster."""
        return statistics.median(self.stock) / statistics.median(self.ours)


def compare(stock: Callable[[], object], ours: Callable[[], object], threads: int) -> Timing:
    """Time the two calls in turns, on `threads` threads of torch. Both have been called before."""
    torch.set_num_threads(threads)
    timers = [timeit.Timer(call) for call in (stock, ours)]
    numbers = [_calls_per_block(timer) for timer in timers]
    timing = Timing([], [])
    started = timeit.default_timer()
    while len(timing.ours) < MIN_ROUNDS or (
        len(timing.ours) < MAX_ROUNDS and timeit.default_timer() - started < CASE_SECONDS
    ):
        for timer, number, seconds in zip(timers, numbers, (timing.stock, timing.ours), strict=True):
            seconds.append(timer.timeit(number) / number)
    return timing


def _calls_per_block(timer: timeit.Timer) -> int:
    number = 1
    # The best of three: the first call may pay ten times its own time for memory that the other side gave back.
    while (seconds := min(timer.repeat(3, number))) < BLOCK_SECONDS / 2:
        number *= 2
    return max(1, round(number * BLOCK_SECONDS / seconds))


@functools.cache
def peak_flops(dtype: torch.dtype, threads: int) -> float:
    """Floating point operations per second that the machine is seen to reach, a fused multiply-add counting as two.

    For float32 and float64 those of a loop of nothing else (fma_peak.cpp), on every thread at once; for the 16-bit
    types the best of stock's matrix product on matrices that fit into a core's cache, on matrix units if there are any.
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
    """Bytes read and written per second in copying 256 MB that are in no cache."""
    source = torch.ones(64 * 1024**2)
    return 2 * source.nbytes / _best_seconds(torch.Tensor.copy_, source, threads)


def _best_seconds(function: Callable[[torch.Tensor, torch.Tensor], object], operand: torch.Tensor, threads: int):
    torch.set_num_threads(threads)
    timer = timeit.Timer(functools.partial(function, operand.clone(), operand))
    number = _calls_per_block(timer)
    return min(timer.repeat(MAX_ROUNDS, number)) / number
