"""The results of a network, its state after training, and the comparison of two networks."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from oracle import assert_same_strides
from torch import Tensor, nn

Results = dict[str, Tensor]


# Tests that are printed for problems contain these two functions, so they use nothing else of this module.


def fill(net: nn.Module) -> None:
    """Fills parameters and buffers with random values."""
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            drawn = torch.randn(value.shape, dtype=torch.float64) / max(value[0].numel(), 4) ** 0.5
            value.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else drawn)


def results(
    net: nn.Module,
    x: Tensor,
    needs_grad: bool,
    training: bool,
    run: Callable[..., Any] | None = None,
) -> dict[str, Tensor]:
    """The results of two steps of SGD and a pass in evaluation mode, and the final state. `run` replaces `net`."""
    found = {}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    for step in range(3):
        net.train(training and step < 2)
        torch.default_generator.manual_seed(step)  # determines dropout
        leaf = x.detach().clone().requires_grad_(needs_grad)
        outputs = (net if run is None else run)(leaf)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [torch.cos(torch.arange(o.numel(), dtype=o.dtype)).view(o.shape) / o.numel() ** 0.5 for o in outputs]
        pairs = [(o, grad) for o, grad in zip(outputs, grads, strict=True) if o.requires_grad]
        optimizer.zero_grad()
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))
        found |= {f"step {step}: output {i}": output.detach() for i, output in enumerate(outputs)}
        found[f"step {step}: input afterwards"] = leaf.detach()
        named = {"input": leaf} | dict(net.named_parameters())
        found |= {f"step {step}: gradient of {name}": t.grad for name, t in named.items() if t.grad is not None}
        found |= {f"step {step}: buffer {name}": t.clone() for name, t in net.named_buffers()}
        optimizer.step()
    return found | {f"parameter {name} after training": t.detach() for name, t in net.named_parameters()}


class Tolerance(NamedTuple):
    """The error of a result that needs no explanation, relative to the magnitude of its tensor and of the largest
    tensor, and a level of noise that is no smaller than the rounding errors of each op."""

    of_tensor: float
    of_largest: float
    noise: float


# A tensor in float64 is compared with the reference element by element, relative to its largest element. In other
# dtypes it is compared as a whole, by its norm, because a value near a kink changes some elements completely.
TOLERANCES = {
    torch.float64: Tolerance(1e-9, 1e-14, 1e-11),
    torch.float32: Tolerance(1e-4, 1e-6, 1e-6),
    torch.bfloat16: Tolerance(0.05, 0.002, 0.004),
}


def magnitude(values: Tensor, dtype: torch.dtype) -> float:
    """The magnitude of a result or an error of a network in that dtype."""
    if values.numel() == 0:
        return 0.0
    values = values.double()
    return (values.abs().max() if dtype == torch.float64 else values.norm()).item()


def assert_same(
    actual: Results,
    expected: Results,
    dtype: torch.dtype,
    noisy: Callable[[float], Iterable[Results]],
    strides: bool = True,
) -> None:
    """Compares the results of a network in that dtype with those of stock in float64. If they differ by more than the
    usual rounding, `noisy` gives results of stock in that dtype under noise of some level, and only differences more
    than three times as large as theirs are errors.
    """
    one_sided = actual.keys() ^ expected.keys()
    assert not one_sided, f"there is {sorted(one_sided)} in only one of them"
    tolerance = TOLERANCES[dtype]
    floor = tolerance.of_largest * max(magnitude(exact, dtype) for exact in expected.values())
    suspects = {}
    for name, exact in expected.items():
        result = actual[name]
        assert result.shape == exact.shape, f"{name}: shape {tuple(result.shape)} instead of {tuple(exact.shape)}"
        right_dtype = dtype if exact.is_floating_point() else exact.dtype
        assert result.dtype == right_dtype, f"{name}: {result.dtype} instead of {right_dtype}"
        if strides:
            assert_same_strides(name, result, exact)
        error = magnitude(result.double() - exact, dtype)
        if not error <= tolerance.of_tensor * magnitude(exact, dtype) + floor:
            suspects[name] = error
    runs = [*noisy(tolerance.noise)] if suspects else []
    for name, error in suspects.items():
        allowed = 3 * max(magnitude(run[name].double() - expected[name], dtype) for run in runs)
        if not error <= allowed:
            raise AssertionError(
                f"{name}: {worst(actual[name], expected[name])}; {error:.3g} off, {allowed:.3g} allowed"
            )


def worst(actual: Tensor, expected: Tensor) -> str:
    """A description of the element that differs most."""
    errors = (actual.double() - expected).abs().nan_to_num(nan=torch.inf)
    at = tuple(int(i) for i in torch.unravel_index(errors.argmax(), errors.shape))
    return f"{actual[at].item()!r} instead of {expected[at].item()!r} at {at}"
