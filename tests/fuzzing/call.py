"""A call of an op: its tensors, their memory layouts, and the derivatives that are compared."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from tensors import Layout, place, with_ties
from tensors import random as random_tensor

from fuzzing import geometry


@dataclass(frozen=True)
class Operand:
    """A tensor of a call: its shape, its memory layout, and whether its gradient is wanted."""

    shape: tuple[int, ...]
    layout: Layout
    wanted: bool


@dataclass(frozen=True)
class Call:
    """A call of an op. `values` is a kind of geometry.draw_values or "ties". `derivative` says what is compared besides
    the output: gradients, second derivatives, or a tangent in forward mode. `algorithm`, such as
    "conv2d.forward:batch_lanes", is forced if there is one and it supports the call."""

    seed: int
    op: str
    operands: tuple[Operand | None, ...]
    options: dict[str, Any]
    dtype: torch.dtype
    values: str
    grad_layout: Layout
    derivative: str = "gradients"
    threads: int = 1
    pool: dict[str, Any] = field(default_factory=dict)
    algorithm: str | None = None

    def tensors(self) -> list[torch.Tensor | None]:
        """The operands, with equal values each time."""
        seed_values(self.seed)
        return [None if operand is None else self._tensor(operand) for operand in self.operands]

    def _tensor(self, operand: Operand) -> torch.Tensor:
        if self.values == "ties":
            return with_ties(operand.shape, self.dtype, operand.layout)
        if not self.dtype.is_floating_point:
            return random_tensor(operand.shape, self.dtype, operand.layout)
        return place(geometry.draw_values(operand.shape, self.dtype, self.values), operand.layout)

    def gradient(self, output: torch.Tensor) -> torch.Tensor:
        """A gradient of the output, equal for all outputs of one shape and dtype."""
        seed_values(self.seed + 1)
        kind = self.values if self.values in ("special", "integers") else "normal"
        values = geometry.draw_values(output.shape, output.dtype, kind)
        return place(values, self.grad_layout if output.dim() == len(self.grad_layout.order) else "contiguous")

    @property
    def wanted(self) -> list[bool]:
        """Whether the gradient of each operand is wanted."""
        return [operand is not None and operand.wanted for operand in self.operands]

    def source(self) -> str:
        """The call as a Python expression."""
        lines = []
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == "operands":
                lines += ["    operands=(", *(f"        {operand}," for operand in value), "    ),"]
            else:
                lines.append(f"    {each.name}={value!r},")
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])


def seed_values(seed: int) -> None:
    """Does what torch.manual_seed does for the CPU, without its work for devices that are not there."""
    torch.default_generator.manual_seed(seed)
