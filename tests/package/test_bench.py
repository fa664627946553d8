"""The benchmark scripts run, distinguish stock from pyops, and write their measurements. No times are asserted."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_log import KernelLog

BENCH = Path(__file__).parents[2] / "bench"

import algorithms  # noqa: E402
import compile as compiled  # noqa: E402
import harness  # noqa: E402
import lenet  # noqa: E402
import measure  # noqa: E402
import ops  # noqa: E402
import scaling  # noqa: E402
import survey  # noqa: E402


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("ops.py", "relu 8 forward"),
        ("lenet.py", "LeNet inference, batch 1"),
        ("lenet.py", "8 of LeNet inference, batch 64, by 2 of Python"),
        ("compile.py", "LeNet inference, against eager"),
    ],
)
def test_script(script, name, tmp_path):
    files = ["--json", tmp_path / "results.json", "--plot", tmp_path / "ratios.png"]
    command = [sys.executable, BENCH / script, "--filter", f"{name}$", "--threads", "1", *files]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert name in printed
    assert "stock/ours" in printed

    report = json.loads((tmp_path / "results.json").read_text())
    assert report["versions"]["torch"] == torch.__version__
    assert {"cpu", "cores", "capability", "load"} == set(report["machine"])
    assert {"commit", "date", "means"} < set(report)
    assert report["limits"]["1"]["torch.float32 GFLOP/s"] > 0
    [result] = report["results"]
    assert result["name"] == name
    assert result["ratio"] == pytest.approx(result["stock_median"] / result["ours_median"])
    assert result["passed"] == (result["ratio"] >= result["gate"])
    assert 0 < result["ours_min"] <= result["ours_median"]
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")


def test_algorithms():
    command = [sys.executable, BENCH / "algorithms.py", "--filter", "conv2d 1x6x14x14 16x6x5x5 forward$"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    [line] = [line for line in printed.splitlines() if ", conv2d.forward: " in line]
    assert re.search(r"implicit_gemm_width [\d.,]+ us", line)
    assert re.search(r"implicit_gemm_channels [\d.,]+ us", line)


def test_the_document_on_algorithms():
    result = {"case": "linear", "op": "gemm", "chosen": "one_row", "seconds": {"one_row": 3e-6, "tiles": 2e-6}}
    report = harness.environment() | {"results": [result, result | {"case": "other", "chosen": "tiles"}]}
    text = "\n".join(algorithms.document({"machine": report}))
    assert "| gemm | one_row | 1 | 0 | linear | 3 | tiles 2 |" in text
    assert "| gemm | tiles | 1 | 1 | other | 2 | one_row 3 |" in text
    assert "as for 1 of 2 cases" in text
    assert text.endswith("| linear | gemm | one_row | 1.50 | tiles |")


def test_survey(tmp_path):
    files = ["--json", tmp_path / "results.json", "--plot", tmp_path / "ratios.png"]
    command = [sys.executable, BENCH / "survey.py", "--sample", "2", "--op", "relu", "max_pool2d", "--threads", "1"]
    printed = subprocess.run([*command, *files], check=True, capture_output=True, text=True).stdout
    assert re.search(r"max_pool2d grad_input float32 │ +1 │ +2 │", printed)
    report = json.loads((tmp_path / "results.json").read_text())
    assert {"machine", "versions", "commit", "date", "seed"} < set(report)
    assert len(report["results"]) == 8
    for _, name, threads, stock, ours in report["results"]:
        assert re.match(r"(relu|max_pool2d) [\dx]+ .*(forward|grad_input)$", name)
        assert threads == 1
        assert min(stock, ours) > 0
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")


def test_survey_ends_when_the_time_is_over():
    command = [sys.executable, BENCH / "survey.py", "--sample", "5", "--seconds", "0", "--op", "relu"]
    assert "The time is over" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_scaling(tmp_path):
    command = [sys.executable, BENCH / "scaling.py", "--sample", "2", "--op", "relu", "linear", "--batch", "8"]
    command += ["--pass", "forward", "--fork", "3.5", "--json", tmp_path / "results.json"]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert "A fork and a barrier are taken to last 3.5 us." in printed
    assert re.search(r"relu forward float32 +│ +2 │", printed)
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["fork, us"] == 3.5
    assert len(report["results"]) == 4
    for _, name, flops, algorithm, regions, tasks, efficiencies in report["results"]:
        assert re.match(r"(relu|linear) 8x[\dx ]+ forward$", name)
        assert (flops > 0) == name.startswith("linear")
        assert algorithm
        assert 0 <= regions <= tasks
        assert list(efficiencies) == ["4", "8", "16", "64"]
        assert min(efficiencies.values()) > 0


def test_the_simulated_time_is_that_of_the_longest_parts():
    first = scaling.Recording(serial=3, tasks=(9, 2), parts=((4, 1), (5, 5)))
    recording = first.merged(scaling.Recording(serial=2, tasks=(9, 2), parts=((2, 3), (6, 4))))
    assert recording == scaling.Recording(serial=2, tasks=(9, 2), parts=((2, 1), (5, 4)))
    assert recording.seconds(fork=0.5) == 2 + (2 + 0.5) + (5 + 0.5)
    result = scaling.Result("", ops.Case("relu", (8,)), 0, "relu", 2, 9, {1: 16, 4: 8})
    assert result.efficiency(4) == 0.5


def test_every_layer_of_the_survey_has_the_output_of_stock():
    layers = survey.layers()
    assert len({layer.network for layer in layers}) > 80
    assert len({(layer.op, layer.input, layer.weight, layer.options) for layer in layers}) == len(layers)
    for layer in layers:
        case = ops.Case(layer.op, (2, *layer.input), layer.weight, layer.options)
        with torch.device("meta"):
            assert case.prepare().stock().numel() > 0, case.name


def test_a_sample_of_the_survey_depends_on_its_seed_alone():
    def sample(seed):
        return survey.draw(6, seed, survey.OPS, ops.PASSES, ["float32", "bfloat16"])

    cases = sample(1)
    assert cases == sample(1)
    assert cases != sample(2)
    assert len(set(cases)) == 2 * 6 * (3 + 3 + 2 + 2)
    assert {case.layout for _, case in cases} == {ops.NCHW, ops.NHWC}
    assert any(network == "random" for network, _ in cases)


def test_ratio_is_above_one_where_pyops_is_faster():
    assert measure.Timing(stock=[3.0, 4.0, 9.0], ours=[2.0, 1.0, 5.0]).ratio == 2


def test_geometric_mean_per_number_of_threads():
    def result(threads, ratio):
        times = dict.fromkeys(("stock_min", "stock_median", "ours_min", "ours_median", "of_limit"), 1.0)
        return harness.Result(
            "group", "case", "torch.float32", threads, ratio=ratio, gate=1, flops=1, bytes=1, limit="FMA", limit_gate=0,
            passed=True, **times,
        )  # fmt: skip

    group = harness.Group("group", [], mean_gate=3)
    means = harness.geometric_means(group, [result(1, 1.0), result(1, 4.0), result(2, 8.0), result(2, 2.0)])
    assert [(mean.threads, mean.ratio, mean.passed) for mean in means] == [
        (1, pytest.approx(2), False),
        (2, pytest.approx(4), True),
    ]


OP_CASES = [
    *[ops.Case("relu", (8,), timed=timed) for timed in ("forward", "forward with grad", "grad_input")],
    *[ops.Case("max_pool2d", (1, 1, 4, 4), None, (2,), timed) for timed in ("forward", "grad_input")],
    *[ops.Case("linear", (2, 8), (3, 8), timed=timed) for timed in ops.PASSES],
    *[ops.Case("conv2d", (2, 3, 4, 4), (3, 3, 3, 3), (2, 1), timed, layout=ops.NHWC) for timed in ops.PASSES],
]


PROGRAMS = [  # calls that other threads of Python make would not be seen
    program
    for group in lenet.GROUPS
    for program in group.cases
    if not any(part in program.name for part in ("1024", "256", "of Python"))
]


COMPILED = [case for group in compiled.GROUPS for case in group.cases if case.network == "LeNet" and not case.rival]


def test_compiled_programs_compute_the_same():
    for case in COMPILED:
        work = case.prepare()
        torch.testing.assert_close(work.ours(), work.stock(), rtol=1e-4, atol=1e-4)
        assert work.flops > 0


@pytest.mark.parametrize("case", OP_CASES + PROGRAMS, ids=lambda case: case.name)
def test_each_side_runs_its_own_kernels(case):
    work = case.prepare()
    with KernelLog() as log:
        work.stock()
    assert log.stock
    assert not log.ours
    with KernelLog() as log:
        work.ours()
    assert log.ours
    assert not log.stock


def test_amount_of_work():
    work = ops.Case("conv2d", (8, 128, 28, 28), (64, 4, 3, 3), (2, 1, 1, 32), "grad_weight", bias=False).prepare()
    output = 8 * 64 * 14 * 14
    assert work.flops == 2 * output * 4 * 3 * 3
    assert work.bytes == 4 * (8 * 128 * 28 * 28 + 64 * 4 * 3 * 3 + output)


def test_every_case_has_a_name_of_its_own():
    for groups in (ops.GROUPS, lenet.GROUPS, compiled.GROUPS):
        names = [case.name for group in groups for case in group.cases]
        assert len(names) == len(set(names))
