"""Tests bench/gpu_check.py and its scripts as far as this is possible without a GPU."""

import json
import re
import subprocess
import sys
import weakref
from contextlib import contextmanager, nullcontext

import emulated
import gpu_aims
import gpu_check
import gpu_programs
import gpu_times
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


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
    assert gpu_check.run(steps, minutes=5) == {"bad": False, "missing": False, "good": True}
    assert "there is no no-such-program" in capfd.readouterr().out
    assert gpu_check.run([gpu_check.Step("hangs", ["sleep", "99"], {})], minutes=0.001) == {"hangs": False}
    assert "stopped after 0.001 minutes" in capfd.readouterr().out


@emulated.needed
@pytest.mark.parametrize("name", ["every_op", "same_bits"])
def test_programs_pass_on_emulated_kernels(name):
    with emulated.kernels():
        gpu_programs.PROGRAMS[name]("cpu")


@pytest.mark.parametrize("name", ["threads", "batches"])
def test_programs_pass_on_the_cpu(name, monkeypatch):
    monkeypatch.setattr(gpu_programs, "BATCHES", (7001,))
    gpu_programs.PROGRAMS[name]("cpu")


def test_programs_find_a_wrong_result():
    with pytest.raises(AssertionError, match="off by"):
        gpu_programs.assert_close("x", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]))


def test_a_call_is_prepared_run_and_captured_on_one_stream(monkeypatch):
    """A model of torch.cuda logs which stream is current and what is captured."""
    log, current = [], ["default"]

    class Stream:
        def wait_stream(self, other):
            log.append(f"{current[0]}: wait")

    @contextmanager
    def on_stream(stream, during="side"):
        before, current[0] = current[0], during
        yield
        current[0] = before

    def graph(graph, stream):
        assert isinstance(stream, Stream)
        return on_stream(stream, "captured side")

    class Graph:
        def replay(self):
            log.append("replay")

    fakes = {"Stream": Stream, "stream": on_stream, "graph": graph, "CUDAGraph": Graph, "current_stream": Stream}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def prepare():
        log.append(f"{current[0]}: prepare")
        operand = Stream()
        operands.append(weakref.ref(operand))
        return lambda: (log.append(f"{current[0]}: call"), operand) and "result"

    operands = []
    replay = gpu_programs.captured(prepare)
    on_side = ["side: prepare", *["side: call"] * 3, "captured side: call"]
    assert log == ["default: wait", *on_side, "default: wait"]
    assert operands[0]() is not None, "what the graph reads lives as long as it does"
    assert replay() == "result" and log[-1] == "replay"


# ---- times ----


def result(name="a", dtype="float32", times=(8e-6, 4e-6, 2e-6, 4e-6, 1e-6), errors=None, failed=None):
    seconds = dict(zip(gpu_times.WAYS, times, strict=False))
    return gpu_times.Result(name, dtype, seconds, errors or {}, failed or {})


def test_table():
    exact = {"stock": (2e-7, 1e-7), "pyops": (3e-7, 1.2e-7)}
    results = [result(errors=exact), result("b", "bfloat16", (3e-6,), failed={"pyops": "out of memory"})]
    lines = gpu_times.table(results).splitlines()
    assert lines[2] == "| a | float32 | 8.0 | 4.0 | 2.0 | 4.0 | 1.0 | 2.00 | 2.00 | 1.0e-07 | 1.2e-07 |"
    assert lines[3] == "| b | bfloat16 | 3.0 | failed | failed | failed | failed | - | - | - | - |"
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_aims_are_met_or_missed():
    step, pool = "LeNet training step, batch {}", "max_pool2d 64x64x112x112, kernel_size 2, backward"
    linear = "linear 4096x4096 by 4096x4096, forward"
    results = [
        result(step.format(1), times=(3.1, 1, 1, 1)),
        result(step.format(1024), times=(2.9, 1, 1, 1)),
        result(step.format(65536), times=(2.9, 1, 1, 1)),
        result(pool, "bfloat16", times=(1.0,)),  # ours failed
        result(linear, times=(1.2, 1, 1, 1)),
        result(linear, "bfloat16", times=(1.2, 1, 1, 1)),
        result("conv2d 64x64x56x56 by 64x64x3x3, padding 1, forward", "bfloat16", times=(9, 0.4, 1, 1)),
        result("relu", errors={"stock": (1e-3, 1e-4), "pyops": (1.6e-3, 1e-4)}),
        result("linear", errors={"stock": (0, 0), "pyops": (4e-7, 1e-7)}),
        result("conv2d", failed={"error": "RuntimeError: no"}),
    ]
    judged = gpu_aims.judge(results)
    assert [(v.case, v.passed) for v in judged] == [
        (step.format(1), True),
        (step.format(1024), False),
        (step.format(65536), True),
        (pool, False),
        (linear, False),
        (linear, True),
        ("conv2d 64x64x56x56 by 64x64x3x3, padding 1, forward", False),
        ("relu", False),
        ("linear", True),
        ("conv2d", False),
    ]
    text = gpu_aims.verdicts(judged)
    assert text.count("| PASS |") == 3 and text.count("| FAIL |") == 6 and "1 of 3 cases" in text


def test_every_aim_is_about_a_case():
    names = [(case.name, str(case.dtype)) for case in gpu_times.cases()]
    for aim in gpu_aims.AIMS:
        assert any(re.search(aim.cases, name) and aim.dtype in dtype for name, dtype in names), aim


CASES = list(gpu_times.cases())


def test_cases_are_named_apart():
    assert len({(case.name, case.dtype) for case in CASES}) == len(CASES) > 50


@pytest.mark.parametrize(
    "case", [case for case in CASES if "65536" not in case.name], ids=lambda case: f"{case.name}, {case.dtype}"
)
def test_case(case):
    """Ours and stock give tensors of equal shapes and dtypes; most cases run on fake tensors."""
    with nullcontext() if "LeNet" in case.name else FakeTensorMode():  # a network of fakes cannot change its dtype
        results = []
        for ours in (True, False):
            call = case.prepare(gpu_times.Setting(ours, "cpu", case.dtype))
            results.append([(t.shape, t.dtype) for t in gpu_times.tensors_of(call)])
    assert results[0] == results[1] and all(dtype == case.dtype for _, dtype in results[0])


def test_a_way_that_fails_is_named_and_the_others_are_measured():
    def prepare(setting):
        if setting.ours:
            raise ValueError("not\nyet")
        return lambda: torch.ones(3, dtype=setting.dtype)

    measured = gpu_times.measure(gpu_times.Case("a", torch.float32, prepare, 10**9), "cpu", 1e-4)
    assert set(measured.seconds) == {"stock", "stock, tuned"}
    assert measured.failed["pyops"] == measured.failed["error"] == "ValueError: not"
    assert measured.failed["stock, graph"] == "RuntimeError: there are no graphs on cpu"
    assert measured.errors == {"stock": (0, 0)} and not torch.backends.cudnn.benchmark


def test_script(tmp_path):
    """The command runs on the CPU and writes both files."""
    names = r"linear 1x400|LeNet .*batch 1$"
    arguments = ["--device", "cpu", "--filter", names, "--seconds", "1e-4", "--output", tmp_path / "new"]
    command = [sys.executable, gpu_times.__file__, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0 or "FAIL" in ran.stdout, ran.stderr  # the status also reports a missed aim
    json_file, markdown = sorted((tmp_path / "new").iterdir())
    report = json.loads(json_file.read_text())
    assert {"machine", "versions", "commit", "date", "aims", "results"} == set(report)
    assert [r["name"] for r in report["results"]] == [c.name for c in CASES if re.search(names, c.name)]
    for r in report["results"]:
        assert set(r["seconds"]) == {"stock", "stock, tuned", "pyops"} and min(r["seconds"].values()) > 0
        assert set(r["errors"]) == (set() if "training" in r["name"] else {"stock", "pyops"})
    text = markdown.read_text()
    assert text in ran.stdout and "| training step of LeNet, batch 1 to 1024 |" in text and "linear 1x400" in text
