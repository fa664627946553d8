"""Tests the emulator that the CUDA kernels run on: what it computes, and which mistakes it finds."""

import re
import subprocess

import emulated
import pytest

pytestmark = emulated.needed

# The programs list their checks. The lists are read from the sources, because a program is built only if a test runs.
PROGRAMS = ["check_emulator", "check_ptx"]
CASES = [
    (name, case)
    for name in PROGRAMS
    for case in re.findall(r'^    \{"(\w+)"', (emulated.FOLDER / f"{name}.cpp").read_text(), re.MULTILINE)
]


def listed(program):
    return dict(line.split(";") for line in subprocess.check_output([program], text=True).splitlines())


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_check_is_run(name):
    assert list(listed(emulated.build_program(name))) == [case for program, case in CASES if program == name]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_emulator(name, case):
    program = emulated.build_program(name)
    result = subprocess.run([program, case], capture_output=True, text=True)
    if message := listed(program)[case]:
        assert result.returncode < 0, "this misuse must abort"
        assert message in result.stderr and "(block " in result.stderr
    else:
        assert result.returncode == 0, result.stdout + result.stderr
