"""No op reads or writes memory that is not its operands' or results'."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKING_ALLOCATOR = "libc_malloc_debug.so.0"  # of glibc


def run(program: list[str]) -> subprocess.CompletedProcess:
    checking = {"LD_PRELOAD": CHECKING_ALLOCATOR, "GLIBC_TUNABLES": "glibc.malloc.check=3"}
    return subprocess.run([sys.executable, *program], env=os.environ | checking, capture_output=True, text=True)


def test_nothing_around_the_tensors_is_touched():
    result = run([str(Path(__file__).with_name("memory_program.py"))])
    assert result.stdout.strip() == "unharmed", f"exit status {result.returncode}\n{result.stderr}"


def test_the_checking_allocator_notices():
    """One byte too many is noticed when the memory is freed; else the test above would prove little."""
    program = "import ctypes, torch; t = torch.empty(9); ctypes.memset(t.data_ptr(), 1, 37); del t; print('unnoticed')"
    result = run(["-c", program])
    if "cannot be preloaded" in result.stderr:
        pytest.skip(f"no {CHECKING_ALLOCATOR} here")
    assert result.returncode != 0 and "unnoticed" not in result.stdout
