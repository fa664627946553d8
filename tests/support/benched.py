"""The shapes that bench/ops.py times, for tests of the results on them."""

import math
from types import ModuleType
from typing import NamedTuple

import ops
import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16)
QUICK = 5e7  # multiplications; a test with more is marked slow


class Shape(NamedTuple):
    """The shapes and options of one call of a function of `functional`."""

    op: str
    input: tuple[int, ...]
    weight: tuple[int, ...] | None
    options: tuple[int, ...]
    bias: bool
    layout: torch.memory_format

    def __str__(self) -> str:
        sizes = ["x".join(map(str, size)) for size in (self.input, self.weight) if size]
        return "-".join([self.op, *sizes, *map(str, self.options), *["channels_last"] * (self.layout == ops.NHWC)])

    def operands(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        """Input, weight and bias, as far as the op has them. The weight is scaled so that outputs are about 1."""
        input = torch.randn(self.input)
        if len(self.input) == 4:
            input = input.contiguous(memory_format=self.layout)
        if self.weight is None:
            return [input.to(dtype)]
        weight = torch.randn(self.weight) * math.prod(self.weight[1:]) ** -0.5
        return [input.to(dtype), weight.to(dtype), torch.randn(self.weight[0]).to(dtype) if self.bias else None]

    def output(self, functional: ModuleType, operands: list[torch.Tensor | None]) -> torch.Tensor:
        return ops.function(functional, self.op)(*operands, *self.options)

    def grad_output(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(self._output_size()).to(dtype)

    def results(
        self, functional: ModuleType, operands: list[torch.Tensor | None], grad_output: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The output and the gradient of each operand."""
        leaves = [operand if operand is None else operand.detach().requires_grad_() for operand in operands]
        output = self.output(functional, leaves)
        present = [leaf for leaf in leaves if leaf is not None]
        names = ["output", "grad_input", "grad_weight", "grad_bias"]
        return dict(zip(names, [output.detach(), *torch.autograd.grad(output, present, grad_output)], strict=False))

    def work(self) -> float:
        """The number of the forward's multiplications; reading and writing count as multiplications too."""
        if self.weight is None:
            return 20 * math.prod(self.input)
        return math.prod(self._output_size()) * math.prod(self.weight[1:]) + 20 * math.prod(self.weight)

    def _output_size(self) -> torch.Size:
        with torch.device("meta"):
            return self.output(torch.nn.functional, self.operands(torch.float32)).shape


def _parameters():
    """Each shape once. A shape that takes long is also given with a smaller batch, which is tested without --slow."""
    shapes = {}
    for case in (case for group in ops.GROUPS for case in group.cases):
        shape = Shape(case.op, case.input, case.weight, case.options, case.bias, case.layout)
        shapes[shape] = [pytest.mark.slow] if shape.work() > QUICK else []
        batch = int(shape.input[0] * QUICK / shape.work())
        if 0 < batch < shape.input[0]:
            shapes.setdefault(shape._replace(input=(batch, *shape.input[1:])), [])
    return [pytest.param(shape, marks=marks, id=str(shape)) for shape, marks in shapes.items()]


SHAPES = _parameters()
every_shape = pytest.mark.parametrize("shape", SHAPES)
