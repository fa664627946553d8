"""The reference that results are compared with: stock torch on the same values in float64."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from tensors import Layout, random
from torch._prims_common import suggest_memory_format

import pyops


class Tolerance(NamedTuple):
    """A result is right if |result - exact| <= rounding * |exact| + summation * (the sum of absolute values)."""

    rounding: float  # for rounding the result once
    summation: float


# Results in 16-bit floats must be as good as a float32 sum that is rounded once. A float32 sum may be off by 16 ulps of
# the sum of absolute values, whatever cancels out in it; the sums in these tests have up to a few thousand terms.
TOLERANCES = {
    torch.float64: Tolerance(0.0, 16 * torch.finfo(torch.float64).eps),
    torch.float32: Tolerance(0.0, 16 * torch.finfo(torch.float32).eps),
    torch.bfloat16: Tolerance(torch.finfo(torch.bfloat16).eps / 2, 16 * torch.finfo(torch.float32).eps),
    torch.float16: Tolerance(torch.finfo(torch.float16).eps / 2, 16 * torch.finfo(torch.float32).eps),
}


def assert_close(
    what: str, actual: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, roundings: int = 1
) -> None:
    """Asserts that a result is within the tolerance of its dtype. `exact` is a sum of terms and `magnitude` the sum of
    their absolute values, both in float64. If the terms may be denormal, `roundings` is their number, because each has
    an absolute error of its own."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    tolerance = TOLERANCES[actual.dtype]
    smallest = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    allowed = tolerance.rounding * exact.abs() + tolerance.summation * magnitude + roundings * smallest
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
    """Whether elements are equal or both NaN, element by element."""
    return (a == b) | (a.isnan() & b.isnan())


def assert_identical(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Asserts equal dtype, shape, strides and values, including the sign of zeros; any NaN equals any other NaN."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    if actual.shape != expected.shape or not same(actual, expected).all():
        # This says where they differ.
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")
    assert_same_strides(what, actual, expected)
    if actual.is_floating_point():
        zeros = expected == 0
        assert (actual.signbit() == expected.signbit())[zeros].all(), f"{what}: a zero has the wrong sign"


def assert_same_strides(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Asserts equal strides, except for those that do not matter: in empty tensors and in dimensions of one element."""
    if expected.numel():
        ours, stocks = ([s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (actual, expected))
        assert ours == stocks, f"{what}: strides {actual.stride()} instead of {expected.stride()}"


def gradients(
    function: Callable[..., torch.Tensor],
    tensors: Sequence[torch.Tensor | None],
    grad_output: torch.Tensor,
    wanted: Sequence[bool] | None = None,
) -> list[torch.Tensor | None]:
    """The gradients of the `wanted` tensors, by default of all of them, and None for the others."""
    return output_and_gradients(function, tensors, lambda _: grad_output, wanted)[1]


def output_and_gradients(
    function: Callable[..., torch.Tensor],
    tensors: Sequence[torch.Tensor | None],
    grad_output: Callable[[torch.Tensor], torch.Tensor],
    wanted: Sequence[bool] | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The output, and the gradients of the tensors if the gradient of the output is `grad_output(output)`."""
    wanted = [t is not None for t in tensors] if wanted is None else wanted
    leaves = [t.detach().requires_grad_() if want else t for t, want in zip(tensors, wanted, strict=True)]
    output = function(*leaves)
    required = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
    grads = iter(torch.autograd.grad(output, required, grad_output(output)) if required else ())
    return output.detach(), [next(grads) if want else None for want in wanted]


def linear_in_chunks(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """linear with sums of at most 64 terms at a time. In stock's longer chains, all roundings may go in one direction
    if the products are about equal, as they are for an expanded operand."""
    parts = [torch.nn.functional.linear(*pair) for pair in zip(input.split(64, -1), weight.split(64, -1), strict=True)]
    output = torch.stack(parts).sum(0)
    return output if bias is None else output + bias


def conv2d_unfolded(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    inside: bool = False,
) -> torch.Tensor:
    """conv2d as a product of the weight with the unfolded images (im2col). With `inside`, the sum runs over the taps
    inside of the image only; stock also multiplies the weights by the padding, which gives NaN if a weight is
    infinite."""

    def pair(value):
        return (value, value) if isinstance(value, int) else tuple(value)

    images = input if input.dim() == 4 else input[None]
    strides, dilations, kernel = pair(stride), pair(dilation), weight.shape[2:]
    totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    before = [total // 2 for total in totals] if padding == "same" else pair(0 if padding == "valid" else padding)
    both = totals if padding == "same" else [2 * p for p in before]
    top, left = before
    bottom, right = (total - p for total, p in zip(both, before, strict=True))
    size = [
        (n + p - total - 1) // s + 1 for n, p, total, s in zip(images.shape[2:], both, totals, strides, strict=True)
    ]

    def unfold(planes):
        padded = torch.nn.functional.pad(planes, (left, right, top, bottom))
        return torch.nn.functional.unfold(padded, kernel, dilation=dilations, stride=strides)

    columns = unfold(images).unflatten(1, (groups, 1, -1))  # [N, groups, 1, C / groups * taps, pixels]
    filters = weight.flatten(1).unflatten(0, (groups, -1))  # [groups, O / groups, C / groups * taps]
    if inside:
        is_inside = unfold(torch.ones_like(images[:1, :1])).repeat(1, weight.shape[1], 1).bool()
        columns = columns[:, :, 0].where(is_inside, 0)
        rows = [(columns * row[..., None].where(is_inside, 0)).sum(2) for row in filters.unbind(1)]
        output = torch.stack(rows, 2)
    else:
        output = filters @ columns[:, :, 0]
    output = output.flatten(1, 2).unflatten(2, size)
    output = output if bias is None else output + bias[:, None, None]
    return output if input.dim() == 4 else output[0]


def conv2d_like(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    """A tensor with the memory format that conv2d's output has by stock's rule: channels-last if input or weight is.
    Stock's conv2d is not called for this, because oneDNN crashes on some grouped convolutions of images of one row or
    column (seen in torch 2.13 with AVX2), and other backends decide differently for images of one pixel, which have
    both formats."""
    batch = input if input.dim() == 4 else input[None]
    meta = (t.to("meta", memory_format=torch.contiguous_format) for t in (batch, weight))
    last = torch.channels_last in (suggest_memory_format(batch), suggest_memory_format(weight))
    output = torch.nn.functional.conv2d(*meta, **options)
    output = output.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return output if input.dim() == 4 else output[0]


def check(
    op: str,
    tensors: Sequence[torch.Tensor | None],
    options: dict | None = None,
    grad: Layout | str | Callable[[torch.Tensor], torch.Tensor] = "contiguous",
    *,
    wanted: Sequence[bool] | None = None,
    reference: Callable[..., torch.Tensor] | None = None,
    roundings: int = 1,
) -> None:
    """Compares pyops.functional.<op> and the gradients of the `wanted` tensors (by default of all) with `reference` (by
    default stock's function of that name) in float64. The output must have the dtype and the strides of stock's.
    `grad` is the layout of a random gradient of the output, or a function that gives the gradient.

    The operation must be linear in each tensor, so that the reference's result for absolute values bounds the rounding
    errors.
    """
    options = options or {}
    stock = getattr(torch.nn.functional, op)
    wanted = [t is not None for t in tensors] if wanted is None else wanted
    grad_output = None

    def ours(*args):
        return getattr(pyops.functional, op)(*args, **options)

    def exact(*args):
        return (reference or stock)(*args, **options)

    def gradient(output):
        nonlocal grad_output
        grad_output = grad(output) if callable(grad) else random(output.shape, output.dtype, grad)
        return grad_output

    like = conv2d_like(*tensors, **options) if op == "conv2d" else stock(*tensors, **options)
    output, actual = output_and_gradients(ours, tensors, gradient, wanted)
    assert output.dtype == like.dtype
    assert_same_strides("output", output, like)
    double = [None if t is None else t.double().contiguous() for t in tensors]  # because stock refuses some strides
    absolute = [None if t is None else t.abs() for t in double]
    exact_output, exact_gradients = output_and_gradients(exact, double, lambda _: grad_output.double(), wanted)
    magnitude, magnitudes = output_and_gradients(exact, absolute, lambda _: grad_output.double().abs(), wanted)
    assert_close("output", output, exact_output, magnitude, roundings)
    for name, *results in zip(("input", "weight", "bias"), actual, exact_gradients, magnitudes, strict=False):
        if results[0] is not None:
            assert_close(f"gradient of {name}", *results, roundings)


def check_max_pool2d(input, grad_layout="contiguous", **options):
    """Checks values, indices, strides and gradient."""
    output, indices = (result.cpu() for result in pyops.functional.max_pool2d(input, return_indices=True, **options))
    reference = input.cpu()  # on other devices stock takes no integers
    reference = reference.short() if input.dtype.itemsize == 1 else reference  # on the CPU, no large channels-last int8
    expected_output, expected_indices = torch.nn.functional.max_pool2d(reference, return_indices=True, **options)
    expected_output = expected_output.to(input.dtype)
    assert_identical("output", output, expected_output)
    assert_identical("indices", indices, expected_indices)
    assert_identical("output without indices", pyops.functional.max_pool2d(input, **options).cpu(), expected_output)
    if not input.is_floating_point():
        return

    # In float64, stock's own indices give the gradient: a sum over the windows that an element won.
    grad = random(output.shape, output.dtype, grad_layout)
    (actual,) = gradients(lambda t: pyops.functional.max_pool2d(t, **options), [input], grad)
    flat = torch.zeros((*input.shape[:-2], input.shape[-2] * input.shape[-1]), dtype=torch.float64, device="cpu")
    exact, magnitude = (
        flat.scatter_add(-1, expected_indices.flatten(-2), g.flatten(-2)).view(input.shape)
        for g in (grad.cpu().double(), grad.cpu().double().abs())
    )
    assert_close("gradient", actual.cpu(), exact, magnitude)
