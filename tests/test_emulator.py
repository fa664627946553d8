"""The emulator that the CUDA kernels run on in these tests: what it computes, and which mistakes it finds."""

import re
import subprocess

import emulated
import pytest

pytestmark = emulated.needed

# The checks are listed in the program; which there are is read from its source, as it is built only if a test runs.
CASES = re.findall(r'^    \{"(\w+)"', (emulated.FOLDER / "check_emulator.cpp").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def program():
    return emulated.build_program("check_emulator")


def test_every_check_is_run(program):
    listed = subprocess.check_output([program], text=True).splitlines()
    assert [line.split(";")[0] for line in listed] == CASES


@pytest.mark.parametrize("case", CASES)
def test_emulator(program, case):
    expected = dict(line.split(";") for line in subprocess.check_output([program], text=True).splitlines())
    result = subprocess.run([program, case], capture_output=True, text=True)
    if message := expected[case]:
        assert result.returncode < 0, "this misuse must abort"
        assert message in result.stderr and "(block " in result.stderr
    else:
        assert result.returncode == 0, result.stdout + result.stderr
