"""The table of faults of mutate.py matches the code of the kernels."""

import mutate
from fuzzing.faults import FAULTS

from pyops import _load


def test_every_fault_can_be_planted():
    assert mutate.stale(FAULTS) == []


def test_a_fault_is_planted_in_every_algorithm():
    assert mutate.without_fault(_load.cpu_module, FAULTS) == []


def test_what_a_header_affects():
    kernels = mutate.SOURCES / "cpu"
    affected = mutate.affected(kernels / "simd" / "mask_bits.h")
    assert affected == {kernels / "simd" / "mask_bits.h", kernels / "relu.cpp"}
    assert kernels / "conv2d" / "implicit_gemm.cpp" in mutate.affected(mutate.SOURCES / "kernels.h")
