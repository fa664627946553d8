"""What a result is held against: stock torch on the same values in float64."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from tensors import Layout, random

import pyops


class Tolerance(NamedTuple):
    """|result - exact| <= rounding * |exact| + summation * (the same sum, taken over absolute values)."""

    rounding: float  # of the result, once
    summation: float


# 16-bit floats must be as good as a float32 sum that is rounded once. A float32 sum is allowed 16 of its ulps, whatever
# cancels out in it; the sums in these tests have up to a few thousand terms.
TOLERANCES = {
    torch.float64: Tolerance(0.0, 16 * torch.finfo(torch.float64).eps),
    torch.float32: Tolerance(0.0, 16 * torch.finfo(torch.float32).eps),
    torch.bfloat16: Tolerance(torch.finfo(torch.bfloat16).eps / 2, 16 * torch.finfo(torch.float32).eps),
    torch.float16: Tolerance(torch.finfo(torch.float16).eps / 2, 16 * torch.finfo(torch.float32).eps),
}


def assert_close(what: str, actual: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor) -> None:
    """`magnitude` is the sum of the absolute values of the terms that `exact` is the sum of, both in float64."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    tolerance = TOLERANCES[actual.dtype]
    smallest = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    allowed = tolerance.rounding * exact.abs() + tolerance.summation * magnitude + smallest
    error = (actual.double() - exact).abs()
    finite = exact.isfinite()
    wrong = torch.where(finite, ~(error <= allowed), ~same(actual.double(), exact))
    if wrong.any():
        worst = torch.where(finite, error / allowed, torch.inf).where(wrong, 0).argmax()
        at = tuple(int(i) for i in torch.unravel_index(worst, exact.shape))
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {exact.numel()} elements wrong, the worst at {at}: "
            f"{actual[at].item()!r} instead of {exact[at].item()!r}, allowed +-{allowed[at].item():.3g}"
        )


def same(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Elementwise: equal, or both NaN."""
    return (a == b) | (a.isnan() & b.isnan())


def assert_identical(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The same dtype, shape and strides, and the same values down to the sign of zero; a NaN is any NaN."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert_same_strides(what, actual, expected)
    if actual.is_floating_point():
        zeros = expected == 0
        assert (actual.signbit() == expected.signbit())[zeros].all(), f"{what}: a zero has the wrong sign"


def assert_same_strides(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Strides that address nothing, those of an empty tensor and of dimensions of one element, don't matter."""
    if expected.numel():
        ours, stocks = ([s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (actual, expected))
        assert ours == stocks, f"{what}: strides {actual.stride()} instead of {expected.stride()}"


def gradients(
    function: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor | None], grad_output: torch.Tensor
) -> list[torch.Tensor | None]:
    """The gradients of all the tensors."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    present = [leaf for leaf in leaves if leaf is not None]
    grads = iter(torch.autograd.grad(function(*leaves), present, grad_output))
    return [None if leaf is None else next(grads) for leaf in leaves]


def check(
    op: str,
    tensors: Sequence[torch.Tensor | None],
    options: dict | None = None,
    grad_layout: Layout | str = "contiguous",
) -> None:
    """pyops.functional.<op> and the gradients of all its tensors, against stock's of the same name.

    The operation must be linear in each tensor, so that stock's result for absolute values bounds the rounding errors.
    """
    options = options or {}
    names = ("input", "weight", "bias")

    def ours(*args):
        return getattr(pyops.functional, op)(*args, **options)

    def stock(*args):
        return getattr(torch.nn.functional, op)(*args, **options)

    def exact(t):
        return None if t is None else t.double()

    def absolute(t):
        return None if t is None else t.double().abs()

    output = ours(*tensors)
    expected = stock(*tensors)
    assert output.dtype == expected.dtype
    assert_same_strides("output", output, expected)
    assert_close("output", output, stock(*map(exact, tensors)), stock(*map(absolute, tensors)))

    grad = random(output.shape, output.dtype, grad_layout)
    triples = zip(
        names,
        gradients(ours, tensors, grad),
        gradients(stock, [*map(exact, tensors)], exact(grad)),
        gradients(stock, [*map(absolute, tensors)], absolute(grad)),
        strict=False,
    )
    for name, actual, expected, magnitude in triples:
        if actual is not None:
            assert_close(f"gradient of {name}", actual, expected, magnitude)
