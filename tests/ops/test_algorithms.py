"""Every algorithm, forced, on every geometry that it supports; which one is chosen for a shape of each kind."""

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial

import oracle
import pytest
import torch
from geometries import GEOMETRIES, WINDOWS, operands
from oracle import check_max_pool2d
from tensors import FLOATING, random, with_ties

import pyops
from pyops import _algorithms, functional

ALGORITHMS = pyops.testing.algorithms()
FORMATS = ("contiguous", "channels_last")


def rows(*ops: str):
    """A parameter for each algorithm of these ops."""
    return pytest.mark.parametrize(
        ("op", "name"), [pytest.param(op, name, id=f"{op}:{name}") for op in ops for name in ALGORITHMS[op]]
    )


def count_supported(op: str, name: str, checks: list[Callable[[], None]]) -> int:
    """Runs the checks with a forced algorithm and returns how many of them it supports."""
    supported = 0
    with pyops.testing.force_algorithm(op, name):
        for check in checks:
            try:
                check()
            except RuntimeError as error:
                assert "is forced, but it does not support this problem" in str(error)
            else:
                supported += 1
    return supported


@rows("conv2d.forward", "conv2d.backward", "conv2d.input_gradient", "conv2d.weight_gradient")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_conv2d(dtype, op, name):
    def check(geometry, where):
        input_shape, weight_shape, options = geometry
        oracle.check("conv2d", operands(input_shape, weight_shape, dtype, where), options, grad=where)

    cases = itertools.product(GEOMETRIES, FORMATS)
    supported = count_supported(op, name, [lambda case=case: check(*case) for case in cases])
    only_float = {"direct_3wide", "kn2row"}
    assert (supported > 0) == (dtype == torch.float32 or name not in only_float)


@rows("conv2d.forward", "conv2d.backward", "conv2d.input_gradient", "conv2d.weight_gradient")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_special_values(dtype, op, name):
    """Taps outside of the image add nothing, even where a value is infinite or NaN."""

    def check(where, groups, padding):
        input = random((3, 4, 6, 7), dtype, where)
        weight = random((4, 4 // groups, 3, 3), dtype, where)
        weight[1, 0, 0, 2], weight[3, 0, 2, 0] = float("inf"), float("nan")
        options = {"groups": groups, "padding": padding}

        def grad(output):
            values = random(output.shape, dtype, where)
            values[0, 1, 0, 0], values[2, 3, -1, -1] = float("-inf"), float("nan")
            return values

        reference = partial(oracle.conv2d_unfolded, inside=True)
        oracle.check("conv2d", [input, weight, None], options, grad, reference=reference)

    cases = itertools.product(FORMATS, (1, 2, 4), (0, 1, 2))
    count_supported(op, name, [lambda case=case: check(*case) for case in cases])


@rows("gemm", "linear.weight_gradient")
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_linear(dtype, op, name):
    sizes = [(1, 5, 3), (1, 40, 33), (1, 300, 17), (2, 65, 7), (33, 17, 40), (70, 300, 37), (300, 20, 30), (6, 1, 1)]
    layouts = ((0, 1), (1, 0))

    def check(shape, layout):
        M, K, N = shape
        tensors = [random((M, K), dtype), random((N, K), dtype), random((N,), dtype)]
        tensors[0] = tensors[0].permute(layout).contiguous().permute(layout)
        oracle.check("linear", tensors)

    cases = itertools.product(sizes, layouts)
    supported = count_supported(op, name, [lambda case=case: check(*case) for case in cases])
    assert supported > 0 or name.startswith("one_row")  # a product of one row, in each direction that is not


@rows("max_pool2d.forward", "max_pool2d.backward")
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_max_pool2d(dtype, op, name):
    shapes = [(2, 3, 13, 37), (2, 3, 8, 6), (3, 64, 7, 6), (2, 40, 14, 18), (1, 5, 7, 7)]

    def check(shape, window, where):
        check_max_pool2d(with_ties(shape, dtype, where), where, **window)

    windows = [*WINDOWS, {"kernel_size": 17, "padding": 8, "stride": 5}]
    cases = [case for case in itertools.product(shapes, windows, FORMATS) if fits(*case[:2])]
    supported = count_supported(op, name, [lambda case=case: check(*case) for case in cases])
    avx512 = {"2x2", "patterns", "row_pairs_2x2", "row_pairs_3x3"}
    only_float = name in avx512 or (name == "gathered_windows" and dtype.itemsize == 2)
    assert supported > 0 or (only_float and dtype != torch.float32)


def fits(shape, window) -> bool:
    sizes, padding = window["kernel_size"], window.get("padding", 0)
    sizes = sizes if isinstance(sizes, tuple) else (sizes, sizes)
    padding = padding if isinstance(padding, tuple) else (padding, padding)
    dilation = window.get("dilation", 1)
    dilation = dilation if isinstance(dilation, tuple) else (dilation, dilation)
    return all(n + 2 * p > (k - 1) * d for n, p, k, d in zip(shape[2:], padding, sizes, dilation, strict=True))


@rows("conv2d_relu_max_pool2d.forward", "conv2d_relu_max_pool2d.backward")
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_conv2d_relu_max_pool2d(dtype, op, name):
    """The results are those of the single ops, bit by bit."""
    shapes = [
        ((3, 2, 12, 12), (5, 2, 3, 3)),
        ((33, 1, 12, 14), (6, 1, 5, 5)),
        ((17, 6, 9, 8), (16, 6, 3, 3)),
        ((5, 40, 7, 6), (20, 40, 3, 3)),
        ((9, 2, 10, 8), (3, 2, 3, 3)),
    ]

    def check(shapes, options, where):
        tensors = operands(*shapes, dtype, where)

        def composed(*tensors):
            return functional.max_pool2d(functional.relu(functional.conv2d(*tensors, **options)), 2)

        def fused(*tensors):
            return functional.conv2d_relu_max_pool2d(*tensors, **options, pool_kernel_size=2)

        grad = random(composed(*tensors).shape, dtype)
        expected, expected_grads = oracle.output_and_gradients(composed, tensors, lambda _: grad)
        output, grads = oracle.output_and_gradients(fused, tensors, lambda _: grad)
        for a, b in zip([output, *grads], [expected, *expected_grads], strict=True):
            assert torch.equal(a, b)

    cases = itertools.product(shapes, ({}, {"padding": 1}, {"padding": 1, "stride": 2}), FORMATS)
    assert count_supported(op, name, [lambda case=case: check(*case) for case in cases]) > 0


@pytest.mark.parametrize("where", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_algorithms_that_sum_in_order_agree_in_every_bit(dtype, where):
    """So that the size of a batch may choose between them."""
    in_order = {"batch_lanes", "depthwise", "depthwise_3x3", "implicit_gemm_channels", "implicit_gemm_width"}
    for input_shape, weight_shape, options in GEOMETRIES:
        input, weight, bias = operands(input_shape, weight_shape, dtype, where)
        outputs = {}
        for name in in_order:
            with pyops.testing.force_algorithm("conv2d.forward", name):
                try:
                    outputs[name] = functional.conv2d(input, weight, bias, **options)
                except RuntimeError:
                    continue
        assert {"implicit_gemm_channels", "implicit_gemm_width", "batch_lanes"} <= outputs.keys()
        for name, output in outputs.items():
            assert torch.equal(output, outputs["implicit_gemm_width"]), (name, input_shape, weight_shape, options)


def test_forcing_is_undone_and_nests():
    input, weight = random((20, 1, 9, 9), torch.float32), random((3, 1, 3, 3), torch.float32)

    def used() -> list[str]:
        return [row.name for row in _algorithms.run_by(lambda: functional.conv2d(input, weight))["conv2d.forward"]]

    chosen = used()
    with pyops.testing.force_algorithm("conv2d.forward", "implicit_gemm_channels"):
        assert used() == ["implicit_gemm_channels"]
        with pyops.testing.force_algorithm("conv2d.forward", "batch_lanes"):
            assert used() == ["batch_lanes"]
            results = []
            thread = threading.Thread(target=lambda: results.append(used()))
            thread.start(), thread.join()
            assert results == [["batch_lanes"]]
        assert used() == ["implicit_gemm_channels"]
    assert used() == chosen
    with pytest.raises(ZeroDivisionError), pyops.testing.force_algorithm("conv2d.forward", "implicit_gemm_channels"):
        raise ZeroDivisionError
    assert used() == chosen


def test_unsupported_problems_are_refused():
    input, weight = random((2, 3, 9, 9), torch.float32), random((4, 3, 3, 3), torch.float32)
    with (
        pyops.testing.force_algorithm("conv2d.forward", "depthwise"),
        pytest.raises(RuntimeError, match=r"conv2d.forward: the algorithm depthwise is forced.*implicit_gemm_width"),
    ):
        functional.conv2d(input, weight)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"there is no op 'conv3d.forward'.*conv2d.forward"):
        pyops.testing.force_algorithm("conv3d.forward", "depthwise").__enter__()
    with pytest.raises(ValueError, match=r"conv2d.forward has no algorithm 'fft', but .*implicit_gemm_width"):
        pyops.testing.force_algorithm("conv2d.forward", "fft").__enter__()


def run_python(code: str, algorithm: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYOPS_ALGORITHM": algorithm}
    return subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)


def test_the_environment_forces_an_algorithm():
    code = """if True:
        import torch, pyops
        from pyops import _algorithms
        F, input, weight = pyops.functional, torch.rand(1, 3, 9, 9), torch.rand(4, 3, 3, 3)
        call = lambda: F.max_pool2d(F.conv2d(input, weight), 2)
        used = _algorithms.run_by(call)
        print(*(row.name for op in ("conv2d.forward", "max_pool2d.forward") for row in used[op]))
    """
    result = run_python(code, "conv2d.forward:batch_lanes,max_pool2d.forward:windows")
    assert result.stdout == "batch_lanes windows\n", result.stderr


def test_an_unknown_name_in_the_environment():
    result = run_python("import pyops", "conv2d.forward:fft")
    assert "ValueError: PYOPS_ALGORITHM=conv2d.forward:fft: conv2d.forward has no algorithm 'fft'" in result.stderr
