"""bench/gpu_check.py as far as it can be tried without a GPU."""

import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))  # as `python bench/gpu_check.py` does

import gpu_check
import gpu_programs
import gpu_times


def run(*arguments):
    command = [sys.executable, gpu_check.__file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_help_names_the_steps():
    said = run("--help")
    assert all(step.name in said for step in gpu_check.steps())


def test_list_shows_the_commands_in_order():
    lines = run("--list").splitlines()
    assert [line.split(":")[0] for line in lines] == [step.name for step in gpu_check.steps()]
    assert "PYOPS_CUDA=1" in lines[0] and "--device=cuda" in lines[1]
    assert run("--list", "--only", "racecheck").count("\n") == 1


def test_a_failed_step_does_not_keep_others_from_running(capfd):
    exit_with = [sys.executable, "-c"]
    steps = [
        gpu_check.Step("bad", [*exit_with, "raise SystemExit(3)"], {}),
        gpu_check.Step("missing", ["no-such-program"], {}),
        gpu_check.Step("good", [*exit_with, "import os; assert os.environ['PYOPS_X'] == '7'"], {"PYOPS_X": "7"}),
    ]
    assert gpu_check.run(steps) == {"bad": False, "missing": False, "good": True}
    assert "there is no no-such-program" in capfd.readouterr().out


@emulated.needed
@pytest.mark.parametrize("name", ["every_op", "same_bits"])
def test_programs_pass_on_emulated_kernels(name):
    with emulated.kernels():
        gpu_programs.PROGRAMS[name]("cpu")


def test_programs_find_a_wrong_result():
    with pytest.raises(AssertionError, match="off by"):
        gpu_programs.assert_close("x", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]))


def test_table():
    first = gpu_times.Result("a", "float32", dict(zip(gpu_times.WAYS, (8e-6, 4e-6, 2e-6, 4e-6, 1e-6), strict=True)), {})
    second = gpu_times.Result("b", "bfloat16", {"stock": 3e-6}, {"pyops": "out of memory"})
    lines = gpu_times.table([first, second]).splitlines()
    assert lines[2] == "| a | float32 | 8.0 | 4.0 | 2.0 | 4.0 | 1.0 | 2.00 | 2.00 |"
    assert lines[3] == "| b | bfloat16 | 3.0 | failed | failed | failed | failed | - | - |"


def test_cases_are_named_apart():
    names = [(case.name, case.dtype) for case in gpu_times.cases()]
    assert len(set(names)) == len(names) > 50
