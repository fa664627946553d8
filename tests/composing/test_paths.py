"""A derivative has paths in the graph to the operands that stock's has, including zeros, in every order.

``torch.autograd.grad`` distinguishes gradients that are zeros, gradients that are None and gradients that torch refuses
to compute, and so do gradient penalties and ``torch.autograd.functional`` with ``strict=True``.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch.autograd import forward_ad
from twins import TWINS, S

import pyops

A = pyops.autograd


class Case(NamedTuple):
    ours: Callable[..., torch.Tensor]
    stock: Callable[..., torch.Tensor]
    shapes: tuple[tuple[int, ...], ...]


def stock_pooled(*tensors):
    return S.max_pool2d(S.relu(S.conv2d(*tensors, padding=1)), 2)


MATRICES, IMAGES = TWINS["linear"].shapes, TWINS["conv2d"].shapes
CASES = {name: Case(*twin) for name, twin in TWINS.items()} | {
    "linear_3d": Case(pyops.functional.linear, S.linear, ((2, 3, 4), (5, 4), (5,))),
    "linear_1d": Case(pyops.functional.linear, S.linear, ((4,), (5, 4), (5,))),
    "linear_one_bias": Case(pyops.functional.linear, S.linear, ((3, 4), (5, 4), (1,))),
    "linear_weight_vector": Case(pyops.functional.linear, S.linear, ((3, 4), (4,))),
    "conv2d_unbatched": Case(pyops.functional.conv2d, S.conv2d, (IMAGES[0][1:], *IMAGES[1:])),
    "conv2d_same": Case(
        partial(pyops.functional.conv2d, padding="same"),
        partial(S.conv2d, padding="same"),
        ((1, 2, 4, 3), (3, 2, 1, 3), (3,)),
    ),
    "relu_with_mask": Case(lambda x: torch.ops.pyops.relu_with_mask(x)[0], S.relu, ((3, 4),)),
    "relu_apply": Case(A.ReLU.apply, S.relu, ((3, 4),)),
    "linear_apply": Case(A.Linear.apply, S.linear, MATRICES),
    "conv2d_apply": Case(lambda *t: A.Conv2d.apply(*t, 1, 1), partial(S.conv2d, padding=1), IMAGES),
    "max_pool2d_apply": Case(lambda x: A.MaxPool2d.apply(x, 2)[0], lambda x: S.max_pool2d(x, 2), IMAGES[:1]),
    "linear_relu_apply": Case(A.LinearReLU.apply, lambda *t: S.relu(S.linear(*t)), MATRICES),
    "conv2d_relu_apply": Case(
        lambda *t: A.Conv2dReLU.apply(*t, 1, 1), lambda *t: S.relu(S.conv2d(*t, padding=1)), IMAGES
    ),
    "conv2d_relu_max_pool2d_apply": Case(
        lambda *t: A.Conv2dReLUMaxPool2d.apply(*t, 1, 1, 1, 1, 2, 2, 0, 1, False)[0], stock_pooled, IMAGES
    ),
}


def random(shape, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


Outcome = torch.Tensor | str
UNUSED, INDEPENDENT = "error: not used in the graph", "error: does not require grad"


def derivative(output: torch.Tensor, operand: torch.Tensor, grad_output: torch.Tensor) -> Outcome:
    """The gradient, or the reason why there is none."""
    try:
        return torch.autograd.grad(output, operand, grad_output, create_graph=True)[0]
    except RuntimeError as error:
        if "does not require grad" in str(error):
            return INDEPENDENT
        assert "appears to not have been used in the graph" in str(error)
    unused = torch.autograd.grad(output, operand, grad_output, create_graph=True, allow_unused=True)
    assert unused == (None,)
    return UNUSED


def derivatives(function, operands: dict[str, torch.Tensor], given: tuple[bool, bool]) -> Iterator[tuple[str, Outcome]]:
    """The derivatives of the first three orders, by every sequence of operands. `given` says whether the grad_output of
    the first and of the second order requires grad, and so is an operand too."""
    output = function(*operands.values())
    wanted = {name: operand for name, operand in operands.items() if operand.requires_grad}
    grad = random(output.shape, 1).requires_grad_(given[0])
    wanted_second = wanted | ({"grad_output": grad} if given[0] else {})
    for i, first in wanted.items():
        yield i, (gradient := derivative(output, first, grad))
        if isinstance(gradient, str):
            continue
        direction = random(gradient.shape, 2).requires_grad_(given[1])
        wanted_third = wanted_second | ({"direction": direction} if given[1] else {})
        for j, second in wanted_second.items():
            yield f"{i}, {j}", (gradient_2 := derivative(gradient, second, direction))
            if not isinstance(gradient_2, str):
                for k, third in wanted_third.items():
                    yield f"{i}, {j}, {k}", derivative(gradient_2, third, random(gradient_2.shape, 3))


def shown(outcome: Outcome) -> str:
    if isinstance(outcome, str):
        return outcome
    return "values" if outcome.any() else "zeros"


Flags = tuple[bool, bool]
NEITHER_OR_BOTH: list[Flags] = [(False, False), (True, True)]


def check(case: Case, ways: Callable[[Callable], Callable], leading: tuple[int, ...] = (), givens=NEITHER_OR_BOTH):
    """Compares both for every choice of operands that require grad; `ways` wraps the functions to compare."""
    for needs, given in itertools.product(itertools.product((False, True), repeat=len(case.shapes)), givens):
        ours, stock = (
            derivatives(ways(function), operands(case, needs, leading), given) for function in (case.ours, case.stock)
        )
        for (what, actual), (same, expected) in zip(ours, stock, strict=True):
            where = f"{what}, where {needs} require grad, and {given} of what is given"
            assert what == same
            yield where, shown(actual), shown(expected)
            if isinstance(expected, torch.Tensor):
                torch.testing.assert_close(actual, expected, msg=lambda text, where=where: f"{where}: {text}")


def operands(case: Case, needs: tuple[bool, ...], leading: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random operands by name, with the dimensions `leading` in front of each."""
    names = ("input", "weight", "bias")
    return {
        name: random((*leading, *shape), 4 + i).requires_grad_(wanted)
        for i, (name, shape, wanted) in enumerate(zip(names, case.shapes, needs, strict=False))
    }


every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_case
def test_derivatives_have_the_paths_of_stock(case):
    for where, actual, expected in check(case, lambda f: f, givens=[*itertools.product((False, True), repeat=2)]):
        assert actual == expected, where


@every_case
def test_derivatives_have_the_paths_of_stock_below_vmap(case):
    """The reason for a missing derivative may differ, because stock's vmap rules add the bias in a step of its own."""
    for where, actual, expected in check(case, torch.func.vmap, leading=(3,)):
        assert actual == expected or {actual, expected} == {UNUSED, INDEPENDENT}, where


@every_case
def test_derivatives_have_the_paths_of_stock_with_tangents(case):
    """If there are tangents too, the Functions in Python replace the nodes in C++."""

    def with_tangents(function):
        def of_duals(*tensors):
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(t, t.detach().cos()) for t in tensors]
                return forward_ad.unpack_dual(function(*duals)).primal

        return of_duals

    for where, actual, expected in check(case, with_tangents):
        assert actual == expected, where
