"""Random calls of the ops, compared with stock in float64; fused ops are compared with the single ops, bit by bit."""

import math
import random
from dataclasses import replace
from typing import Any

import torch
from tensors import FLOATING, INTEGER

import pyops
from fuzzing import geometry, op_checks
from fuzzing.call import Call, Operand

# The weights with which the ops are drawn.
WEIGHTS = {
    "conv2d": 44,
    "max_pool2d": 16,
    "conv2d_relu_max_pool2d": 12,
    "linear": 10,
    "relu": 6,
    "conv2d_relu": 5,
    "linear_relu": 4,
    "linear_batched": 3,
}
# The choices between algorithms that an op makes.
LINEAR = ("gemm", "linear.weight_gradient")
CONV2D = ("conv2d.forward", "conv2d.backward", "conv2d.input_gradient", "conv2d.weight_gradient")
MAX_POOL2D = ("max_pool2d.forward", "max_pool2d.backward")
CHOICES = {
    "conv2d": CONV2D,
    "max_pool2d": MAX_POOL2D,
    "conv2d_relu_max_pool2d": (
        *CONV2D,
        *MAX_POOL2D,
        "conv2d_relu_max_pool2d.forward",
        "conv2d_relu_max_pool2d.backward",
    ),
    "linear": LINEAR,
    "conv2d_relu": CONV2D,
    "linear_relu": LINEAR,
    "linear_batched": LINEAR,
}
VALUES = ("normal",) * 11 + ("integers",) * 4 + ("special",) * 3 + ("tiny",) * 1
DERIVATIVES = ("gradients",) * 18 + ("second", "forward")
THREADS = (1,) * 17 + (2, 2, 3)
LARGE = 200_000  # products; the kernels use several threads for more


class Problem(Call):
    """A call, with the check that it has to pass."""

    def check(self) -> None:
        """Checks the call, by the forced algorithm if that supports it."""
        threads = torch.get_num_threads()
        try:
            if self.algorithm is None or not self._check_by(*self.algorithm.split(":")):
                op_checks.check(self)
        finally:
            if threads != torch.get_num_threads():
                torch.set_num_threads(threads)

    def _check_by(self, op: str, algorithm: str) -> bool:
        """Checks the call by an algorithm; returns whether that supports it."""
        try:
            with pyops.testing.force_algorithm(op, algorithm):
                op_checks.check(self)
        except RuntimeError as error:
            if "is forced, but it does not support this problem" not in str(error):
                raise
            return False
        return True

    def as_test(self) -> str:
        source = self.source().replace("\n", "\n    ")
        imports = "from fuzzing.call import Operand\nfrom fuzzing.ops import Problem\nfrom tensors import Layout"
        return f"import torch\n{imports}\n\n\ndef test_{self.op}_{self.seed}():\n    {source}.check()"


def draw(seed: int, op: str | None = None, algorithm: str | None = None, small: bool = False) -> Problem:
    """The problem of a seed, which is `small` for the emulator: that is far slower than the CPU kernels. `algorithm` is
    forced if it supports the problem; by default one is drawn for some of the problems."""
    rng = random.Random(seed)
    op = op or rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    most_products = 10_000 if small else rng.choices((20_000, 200_000, 1_000_000, 15_000_000), (60, 34, 5.7, 0.3))[0]
    draw_geometry = {"linear": _draw_linear, "conv2d": _draw_conv2d}.get(op.split("_")[0], _draw_images)
    problem = _draw_call(rng, seed, op, draw_geometry(rng, op, most_products), most_products)
    return replace(problem, algorithm=algorithm) if algorithm else problem


Drawn = tuple[list[tuple[int, ...] | None], dict[str, Any], dict[str, Any], int]


def _draw_linear(rng: random.Random, op: str, most_products: int) -> Drawn:
    while True:
        leading = [rng.choice(geometry.FEATURES)] if rng.random() < 0.7 else [rng.randint(0, 5) for _ in range(3)]
        leading = [] if rng.random() < 0.05 else leading
        inputs, outputs = rng.choice(geometry.FEATURES), rng.choice(geometry.FEATURES)
        if op == "linear" and rng.random() < 0.02:  # a weight too large to be read in place, which is packed
            leading, inputs, outputs, most_products = [rng.choice((1, 5, 5, 17, 70, 200, 450))], 600, 700, 200_000_000
        samples = rng.choice((1, 2, 3, 5, 16)) if op == "linear_batched" else 1
        if samples * math.prod(leading) * inputs * outputs <= most_products:
            break
    first = [samples] if op == "linear_batched" else []
    if op == "linear_batched" and not leading:
        leading = [1]
    shapes = [(*first, *leading, inputs), (*first, outputs, inputs), (*first, outputs) if rng.random() < 0.7 else None]
    return shapes, {}, {}, len(first) + len(leading) + 1


def _draw_conv2d(rng: random.Random, op: str, most_products: int) -> Drawn:
    large = most_products > LARGE and rng.random() < 0.3
    convolution = geometry.draw_layer(rng) if large else geometry.draw_convolution(rng, most_products)
    pool: dict[str, Any] = {}
    if op == "conv2d_relu_max_pool2d":
        pooling, _ = geometry.draw_pooling(rng, convolution.output)
        pool = {name if name == "ceil_mode" else f"pool_{name}": value for name, value in pooling.options.items()}
    bias = convolution.weight[:1] if rng.random() < 0.6 else None
    return [convolution.input, convolution.weight, bias], convolution.options, pool, len(convolution.input)


def _draw_images(rng: random.Random, op: str, most_products: int) -> Drawn:
    most_elements = most_products // 20
    while True:
        batch = () if rng.random() < 0.06 else (rng.choice(geometry.BATCHES) if rng.random() < 0.97 else 0,)
        channels = rng.choice(geometry.CHANNELS)
        if op == "relu":
            shape = (*batch, channels, rng.choice(geometry.SIZES), rng.choice(geometry.SIZES))[: rng.randint(0, 4)]
            if math.prod(shape) <= most_elements:
                return [shape], {}, {}, len(shape)
            continue
        pooling, size = geometry.draw_pooling(rng)
        if math.prod((*batch, channels, *size)) <= most_elements:
            return [(*batch, channels, *size)], pooling.options, {}, len(batch) + 3


def _draw_call(
    rng: random.Random,
    seed: int,
    op: str,
    drawn: Drawn,
    most_products: int,
) -> Problem:
    """Draws what does not depend on the geometry: dtype, values, layouts, and the gradients that are wanted."""
    shapes, options, pool, rank = drawn
    elementwise = op in ("relu", "max_pool2d")
    derivative = rng.choice(DERIVATIVES) if op != "linear_batched" else "gradients"
    if derivative != "gradients":
        dtype, values = torch.float64, "normal"
    else:
        dtype = rng.choice((torch.float32, torch.float32, *FLOATING))
        if elementwise and rng.random() < 0.2:
            dtype = rng.choice(INTEGER)
        values = rng.choice(VALUES)
        if elementwise and rng.random() < 0.5:
            values = "ties"
        if values == "special" and most_products > 200_000:
            values = "normal"  # because the reference for special values keeps every term
        if values == "tiny" and dtype in (torch.bfloat16, torch.float16):
            values = "normal"  # products of bfloat16 pairs treat denormal numbers as zeros, as the CPU does
    present = [shape is not None for shape in shapes]
    all_wanted = rng.random() < 0.6 or derivative != "gradients"
    wanted = [p and dtype.is_floating_point and (all_wanted or rng.random() < 0.5) for p in present]
    operands = tuple(
        None if shape is None else Operand(shape, geometry.draw_layout(rng, len(shape)), want)
        for shape, want in zip(shapes, wanted, strict=True)
    )
    grad_layout = geometry.draw_layout(rng, rank)
    if any(operand is not None and operand.layout.expanded for operand in operands):
        # The partial sums of equal products would all be rounded in one direction.
        grad_layout = grad_layout._replace(expanded=())
    return Problem(
        seed,
        op,
        operands,
        options,
        dtype,
        values,
        grad_layout,
        derivative,
        rng.choice(THREADS if most_products <= LARGE else (1, 2, 3)),
        pool,
        _draw_algorithm(rng, op),
    )


def _draw_algorithm(rng: random.Random, op: str) -> str | None:
    """For a quarter of the problems, an algorithm of the kernels that compute them."""
    if rng.random() < 0.75:
        return None
    known = pyops.testing.algorithms()
    choices = [choice for choice in CHOICES.get(op, ()) if choice in known]
    if not choices:
        return None
    choice = rng.choice(choices)
    return f"{choice}:{rng.choice(known[choice])}"
