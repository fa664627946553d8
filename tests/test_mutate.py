"""The table of faults of mutate.py matches the code of the kernels."""

import importlib

import mutate
from fuzzing.faults import FAULTS

from pyops import _load


def test_every_fault_can_be_planted():
    assert mutate.stale(FAULTS) == []


def test_a_fault_is_planted_in_every_algorithm():
    kernels = importlib.import_module(f"pyops._cpu_{_load.cpu_capability.lower()}")
    assert mutate.without_fault(kernels.algorithm_counts(), FAULTS) == []


def test_what_a_header_affects():
    kernels = mutate.SOURCES / "cpu"
    affected = mutate.affected(kernels / "simd" / "mask_bits.h")
    assert affected == {kernels / "simd" / "mask_bits.h", kernels / "relu.cpp"}
    assert kernels / "conv2d" / "convolve.cpp" in mutate.affected(mutate.SOURCES / "kernels.h")
