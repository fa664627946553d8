"""The macrokernel over tiles on TileModel, compiled for this machine, and an independent reference of its sums.

Both take a `Product` and return the memory of C after it.
"""

import ctypes
import os
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT / "tests" / "programs" / "tile_products.cpp", ROOT / "csrc" / "cpu" / "gemm" / "tile_kernel.cpp"]
COMPILER = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++20", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra"]
COMPILER += ["-Werror", "-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]
PIECE = 16  # steps
SMALLEST_NORMAL = np.finfo(np.float32).tiny


class Run(NamedTuple):
    """Rows that follow one another and share their steps, which are in pairs."""

    rows: int
    a_steps: np.ndarray
    b_steps: np.ndarray


class Product(NamedTuple):
    """The arguments of the macrokernel. Pairs are rows of two numbers of bfloat16, as bits in uint16."""

    runs: list[Run]
    a: np.ndarray
    a_offsets: np.ndarray
    b: np.ndarray
    b_offsets: np.ndarray
    c: np.ndarray  # float32
    rows: np.ndarray
    vectors: np.ndarray
    lanes: np.ndarray | None = None
    row_bias: np.ndarray | None = None
    column_bias: np.ndarray | None = None
    relu: bool = False
    rounded: np.ndarray | None = None  # bits of bfloat16 in uint16
    rounded_rows: np.ndarray | None = None
    rounded_vectors: np.ndarray | None = None
    accumulate: bool = False
    last: bool = False


class _Call(ctypes.Structure):
    _fields_ = [
        ("run_count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("run_rows", "run_steps", "a_steps", "b_steps")),
        ("vectors", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("a", "a_offsets", "b", "b_offsets")),
        *((name, ctypes.c_void_p) for name in ("c", "rows", "columns", "lanes", "row_bias", "column_bias")),
        ("relu", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("rounded", "rounded_rows", "rounded_vectors")),
        ("accumulate", ctypes.c_bool),
        ("last", ctypes.c_bool),
    ]


class Library:
    """The compiled kernel."""

    def __init__(self, folder: Path) -> None:
        target = folder / "tile_products.so"
        includes = [flag for path in include_paths() for flag in ("-isystem", path)]
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        subprocess.run([*COMPILER, *includes, *SOURCES, "-o", target], env=environment, check=True)
        self._library = ctypes.CDLL(str(target))
        self._library.rounded.argtypes = [ctypes.c_float]
        self._library.rounded.restype = ctypes.c_uint16
        self._library.multiply.restype = ctypes.c_bool
        self.lanes = self._library.lanes()

    def rounded(self, value: float) -> int:
        """The bits of the value in bfloat16."""
        return self._library.rounded(value)

    def multiply(self, x: Product) -> tuple[np.ndarray, np.ndarray | None]:
        """C and the rounded C after a call of the macrokernel."""
        c, rounded = x.c.copy(), None if x.rounded is None else x.rounded.copy()
        kept = []  # alive until the call returns

        def pointer(values, dtype):
            if values is None:
                return None
            kept.append(np.ascontiguousarray(values, dtype))
            return kept[-1].ctypes.data

        call = _Call(
            len(x.runs),
            pointer([run.rows for run in x.runs], np.int64),
            pointer([len(run.a_steps) for run in x.runs], np.int64),
            pointer(np.concatenate([run.a_steps for run in x.runs]), np.int64),
            pointer(np.concatenate([run.b_steps for run in x.runs]), np.int64),
            len(x.b_offsets),
            pointer(x.a, np.uint16),
            pointer(x.a_offsets, np.int64),
            pointer(x.b, np.uint16),
            pointer(x.b_offsets, np.int64),
            c.ctypes.data,
            pointer(x.rows, np.int64),
            pointer(x.vectors, np.int64),
            pointer(x.lanes, np.int32),
            pointer(x.row_bias, np.float32),
            pointer(x.column_bias, np.float32),
            x.relu,
            None if rounded is None else rounded.ctypes.data,
            pointer(x.rounded_rows, np.int64),
            pointer(x.rounded_vectors, np.int64),
            x.accumulate,
            x.last,
        )
        assert self._library.multiply(ctypes.byref(call)), "an instruction had wrong operands"
        return c, rounded


def flushed(x: np.ndarray) -> np.ndarray:
    """Denormal numbers become zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def widened(bits: np.ndarray) -> np.ndarray:
    """The values of bits of bfloat16, without denormal numbers."""
    return flushed((bits.astype(np.uint32) << 16).view(np.float32))


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c with one rounding, where the significands of a and b have 8 bits. The product is exact in float64. The
    sum is rounded there to odd, after which the rounding to float32 is that of the exact sum."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    even = (total.view(np.int64) & 1) == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    inexact = np.isfinite(total) & np.isfinite(error) & (error != 0)
    return flushed(np.where(inexact & even, odd, total).astype(np.float32))


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to nearest, ties to even; denormal numbers become zeros."""
    bits = flushed(x).view(np.uint32)
    up = bits + np.uint32(0x7FFF) + (bits >> 16 & 1)
    return np.where(np.isnan(x), bits | 0x400000, up).__rshift__(16).astype(np.uint16)


def sums_of(x: Product, lanes: int) -> np.ndarray:
    """The sums of a call [rows, vectors, lanes], before they are added to C."""
    columns = x.b_offsets[:, None] + np.arange(lanes)
    first_row, parts = 0, []
    for run in x.runs:
        offsets = x.a_offsets[first_row : first_row + run.rows]
        total = np.zeros((run.rows, *columns.shape), np.float32)
        kc = len(run.a_steps)
        for begin in range(0, kc, PIECE):
            sums = [np.zeros_like(total), np.zeros_like(total)]
            for k in range(begin, begin + PIECE):
                for number in (0, 1):
                    if k < kc:
                        a = widened(x.a[offsets + run.a_steps[k], number])[:, None, None]
                        b = widened(x.b[columns + run.b_steps[k], number])[None]
                        sums[number] = multiply_add(a, b, sums[number])
                    else:
                        sums[number] = sums[number] + np.float32(0)
            total = flushed(total + flushed(sums[0] + sums[1]))
        parts.append(total)
        first_row += run.rows
    return np.concatenate(parts)


def multiply(x: Product, lanes: int) -> tuple[np.ndarray, np.ndarray | None]:
    """C and the rounded C after a call, in the order of sums that csrc/cpu/gemm/tile_kernel.h states."""
    with np.errstate(all="ignore"):
        sums = sums_of(x, lanes)
        c, rounded = x.c.copy(), None if x.rounded is None else x.rounded.copy()
        waits = rounded is not None and not x.last
        for i in range(len(x.rows)):
            for j in range(len(x.vectors)):
                count = lanes if x.lanes is None or waits else x.lanes[j]
                here = slice(x.rows[i] + x.vectors[j], x.rows[i] + x.vectors[j] + count)
                value = sums[i, j, :count]
                if x.accumulate:
                    value = c[here] + value
                if x.last:
                    if x.row_bias is not None:
                        value = value + x.row_bias[i]
                    if x.column_bias is not None:
                        value = value + x.column_bias[j * lanes : j * lanes + count]
                    if x.relu:
                        value = np.where(value < 0, np.float32(0), value)
                if x.last and rounded is not None:
                    begin = x.rounded_rows[i] + x.rounded_vectors[j]
                    rounded[begin : begin + count] = bfloat16_bits(value)
                else:
                    c[here] = value
        return c, rounded
