"""The checks of a call of each op. Output and gradients must agree with stock's in float64; those of a fused op must
equal those of the single ops, bit by bit."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import emulated
import oracle
import torch
from tensors import place

import pyops
from fuzzing.call import Call, seed_values

F, S = pyops.functional, torch.nn.functional


def check(call: Call) -> None:
    """Raises an AssertionError if pyops is wrong."""
    if call.threads != torch.get_num_threads():
        torch.set_num_threads(call.threads)
    CHECKS[call.op](call)
    if call.threads > 1 and call.derivative == "gradients" and call.op != "linear_batched":
        check_threads(call)
    if call.seed % 8 == 0 and call.derivative == "gradients" and call.op in BATCHED and not emulated.installed():
        check_batch(call)


def check_batch(call: Call) -> None:
    """The first images of a batch have the same results alone as with the others. Only the CPU's kernels promise it."""
    images, *others = call.tensors()
    if len(images) < 2:
        return
    if images.dim() < 4 or images[:1].is_contiguous() == images[:1].is_contiguous(memory_format=torch.channels_last):
        return  # images that have both memory formats may be summed in either order
    function = partial(getattr(F, call.op), **call.options, **call.pool)
    count = call.seed // 8 % (len(images) - 1) + 1
    grad = call.gradient(function(images, *others))
    of_all, of_some = (
        oracle.output_and_gradients(function, [images[:n], *others], lambda _, n=n: grad[:n], call.wanted)
        for n in (len(images), count)
    )
    assert_same_numbers(f"output of {count} images", of_some[0], of_all[0][:count])
    if call.operands[0].wanted:
        assert_same_numbers(f"gradient of {count} images", of_some[1][0], of_all[1][0][:count])


def check_threads(call: Call) -> None:
    """The results have the same bits for any number of threads."""
    window = call.options | call.pool
    results = []
    for threads in (call.threads, 1):
        torch.set_num_threads(threads)
        function = partial(getattr(F, call.op), **window)
        output, grads = oracle.output_and_gradients(function, call.tensors(), call.gradient, call.wanted)
        results.append([output, *(grad for grad in grads if grad is not None)])
    for i, (several, one) in enumerate(zip(*results, strict=True)):
        assert_same_numbers(f"result {i} of {call.threads} threads instead of one", several, one)


def check_product(call: Call) -> None:
    """Checks linear and conv2d."""
    tensors = call.tensors()
    if call.derivative != "gradients":
        return check_derivative(call, getattr(F, call.op), getattr(S, call.op))
    reference = oracle.linear_in_chunks if call.op == "linear" else None
    if call.op == "conv2d" and call.values == "special":  # stock multiplies the padding by infinities
        reference = partial(oracle.conv2d_unfolded, inside=True)
    elif call.options.get("groups", 1) > 4:  # stock computes one group after the other
        reference = oracle.conv2d_unfolded
    sizes = [math.prod(operand.shape) for operand in call.operands if operand is not None]
    oracle.check(
        call.op,
        tensors,
        call.options,
        call.gradient,
        wanted=call.wanted,
        reference=reference,
        roundings=max(sizes) if call.values == "tiny" else 1,
    )


def check_relu(call: Call) -> None:
    """Output and gradient must have the bits of stock's."""
    (input,) = call.tensors()
    if call.derivative != "gradients":
        return check_derivative(call, F.relu, S.relu)
    oracle.assert_identical("output", F.relu(input), S.relu(input))
    if torch._debug_has_internal_overlap(input) == 0:
        changed = [place(input, call.operands[0].layout) for _ in range(2)]
        F.relu(changed[0], inplace=True), S.relu(changed[1], inplace=True)
        oracle.assert_identical("output in place", *changed)
    if call.operands[0].wanted:
        ours, stock = (oracle.output_and_gradients(f, [input], call.gradient) for f in (F.relu, S.relu))
        oracle.assert_identical("output", ours[0], stock[0])
        oracle.assert_identical("gradient", ours[1][0], stock[1][0])
    return None


def check_max_pool2d(call: Call) -> None:
    """Compares values and indices bit for bit, and gradients as sums over the windows that an element won."""
    (input,) = call.tensors()
    options = call.options
    if call.derivative != "gradients":
        return check_derivative(call, *(lambda x, f=f: f(x, **options) for f in (F.max_pool2d, S.max_pool2d)))
    output, indices = F.max_pool2d(input, return_indices=True, **options)
    reference = input
    if input.dtype.itemsize == 1:  # stock has no channels-last int8 of many channels
        reference = place(input.short(), call.operands[0].layout)
    expected, expected_indices = S.max_pool2d(reference, return_indices=True, **options)
    oracle.assert_identical("output", output, expected.to(input.dtype))
    oracle.assert_identical("indices", indices, expected_indices)
    if not call.operands[0].wanted or not input.is_floating_point():
        return None
    grad = call.gradient(output)
    (actual,) = oracle.gradients(lambda x: F.max_pool2d(x, **options), [input], grad)
    flat = torch.zeros((*input.shape[:-2], input.shape[-2] * input.shape[-1]), dtype=torch.float64)
    exact, magnitude = (
        flat.scatter_add(-1, expected_indices.flatten(-2), g.flatten(-2)).view(input.shape)
        for g in (grad.double(), grad.double().abs())
    )
    oracle.assert_close("gradient", actual, exact, magnitude)
    assert not (actual.signbit() & (actual == 0)).any(), "gradient: sums that begin with zero are never -0.0"
    return None


def check_fused(call: Call) -> None:
    """The result must have the bits of the single ops in turn. Calls of their own compare the single ops with stock."""
    fused = getattr(F, call.op)
    single = {"linear_relu": F.linear}.get(call.op, F.conv2d)
    options, pool = call.options, call.pool

    def composed(*tensors: torch.Tensor) -> torch.Tensor:
        output = F.relu(single(*tensors, **options))
        return F.max_pool2d(output, **{name.removeprefix("pool_"): v for name, v in pool.items()}) if pool else output

    def ours(*tensors: torch.Tensor) -> torch.Tensor:
        return fused(*tensors, **options, **pool)

    if call.derivative != "gradients":
        return check_derivative(call, ours, composed)
    tensors = call.tensors()
    expected, expected_grads = oracle.output_and_gradients(composed, tensors, call.gradient, call.wanted)
    actual, grads = oracle.output_and_gradients(ours, tensors, call.gradient, call.wanted)
    # If the input is not saved, the pooled output determines the layout of the images. A single value has both layouts,
    # and then the order of the sums may differ.
    ambiguous = bool(pool) and not call.wanted[1] and actual.shape[-3:].numel() == 1
    names = ("output", "gradient of input", "gradient of weight", "gradient of bias")
    for name, a, e in zip(names, (actual, *grads), (expected, *expected_grads), strict=False):
        if e is not None:
            atol = 100 * torch.finfo(e.dtype).eps * float(e.abs().nan_to_num(0, 0, 0).max()) if ambiguous else 0.0
            assert_same_numbers(name, a, e, atol)
    oracle.assert_same_strides("output", actual, expected)
    with torch.no_grad():  # so that no argmax is written
        assert_same_numbers("output without argmax", ours(*tensors), actual)
    return None


def assert_same_numbers(what: str, actual: torch.Tensor, expected: torch.Tensor, atol: float = 0.0) -> None:
    """Asserts equal dtype, shape and values, except for the sign of a zero."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    right = oracle.same(actual, expected)
    right |= (actual - expected).abs() <= atol
    wrong = int((~right).sum())
    assert wrong == 0, f"{what}: {wrong} of {right.numel()} elements differ"


def check_linear_batched(call: Call) -> None:
    """Every sample must have the bits of linear."""
    input, weight, bias = call.tensors()
    ops = torch.ops.pyops
    biases = [None] * len(input) if bias is None else bias
    output = ops.linear_batched(input, weight, bias)
    expected = [ops.linear(*sample) for sample in zip(input, weight, biases, strict=True)]
    assert_same_numbers("output", output, torch.stack(expected))
    grad = call.gradient(output)
    mask = call.wanted
    actual = ops.linear_batched_backward(grad, input, weight, mask)
    rows = [ops.linear_backward(*sample, mask) for sample in zip(grad, input, weight, strict=True)]
    for want, result, column in zip(mask, actual, zip(*rows, strict=True), strict=True):
        if want:
            assert_same_numbers("gradient", result, torch.stack(column))
        else:
            assert result is None, "linear_batched_backward: a gradient that was not asked for"


def check_derivative(call: Call, ours: Callable[..., Any], stock: Callable[..., Any]) -> None:
    """Compares second derivatives, or a tangent, in float64."""
    tensors = [t.contiguous() if torch._debug_has_internal_overlap(t) else t for t in call.tensors() if t is not None]
    options = call.options if call.op in ("linear", "conv2d") else {}
    results = []
    for function in (ours, stock):
        seed_values(call.seed)
        if call.derivative == "forward":
            tangents = tuple(torch.randn(t.shape, dtype=t.dtype) for t in tensors)
            results.append(torch.func.jvp(lambda *t, f=function: f(*t, **options), tuple(tensors), tangents))
            continue
        # Stock errs in second derivatives with channels-last weights in groups.
        leaves = [(t if function is ours else t.contiguous()).detach().requires_grad_() for t in tensors]
        output = function(*leaves, **options)
        grad = torch.randn(output.shape, dtype=output.dtype, requires_grad=True)
        first = torch.autograd.grad(output, leaves, grad, create_graph=True)
        scalar = sum((g * torch.randn(g.shape, dtype=g.dtype)).sum() for g in first)
        second = torch.autograd.grad(scalar, [*leaves, grad], allow_unused=True)
        results.append([*first, *(torch.zeros((), dtype=torch.float64) if g is None else g for g in second)])
    for i, (actual, expected) in enumerate(zip(*results, strict=True)):
        scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
        same = torch.allclose(actual.detach(), expected.detach(), rtol=0, atol=1e-11 * scale, equal_nan=True)
        assert same, f"{call.derivative} derivative, result {i} of {len(results[0])}"


BATCHED = ("conv2d", "conv2d_relu", "conv2d_relu_max_pool2d", "max_pool2d")
CHECKS: dict[str, Callable[[Call], None]] = {
    "conv2d": check_product,
    "linear": check_product,
    "relu": check_relu,
    "max_pool2d": check_max_pool2d,
    "linear_relu": check_fused,
    "conv2d_relu": check_fused,
    "conv2d_relu_max_pool2d": check_fused,
    "linear_batched": check_linear_batched,
}
