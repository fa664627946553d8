"""Tensors for tests, in every dtype and every memory layout."""

import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGER = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Layout(NamedTuple):
    """Describes how `place` stores a tensor in memory."""

    order: tuple[int, ...]  # the dimensions, outermost in memory first
    steps: tuple[int, ...]  # one for each dimension, 1 for dense
    offset: int = 0  # elements in front of the tensor
    expanded: tuple[int, ...] = ()  # dimensions of stride 0: every index shows the values of index 0


def layout(name: str, rank: int) -> Layout:
    """The layout with that name for `rank` dimensions."""
    dense, straight = (1,) * rank, tuple(range(rank))
    match name:
        case "contiguous":
            return Layout(straight, dense)
        case "channels_last":  # applies to [.., C, H, W]; fewer dimensions are contiguous
            return Layout((*straight[:-3], *straight[-2:], *straight[-3:-2]) if rank >= 3 else straight, dense)
        case "transposed":
            return Layout(straight[::-1], dense)
        case "sliced":
            return Layout(straight, (2,) * rank, offset=1)
        case "expanded":
            return Layout(straight, dense, expanded=straight[:1])
    raise ValueError(name)


LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "expanded")


@st.composite
def layouts(draw, rank: int) -> Layout:
    """Layouts with arbitrary strides."""
    return Layout(
        order=tuple(draw(st.permutations(range(rank)))),
        steps=tuple(draw(st.lists(st.sampled_from((1, 1, 2, 3)), min_size=rank, max_size=rank))),
        offset=draw(st.integers(0, 3)),
        expanded=tuple(draw(st.sets(st.integers(0, rank - 1), max_size=1))) if rank else (),
    )


def place(values: torch.Tensor, where: Layout | str) -> torch.Tensor:
    """`values` in that layout. The memory between and around them is NaN (or the largest integer), so that a result
    that uses it is wrong."""
    if isinstance(where, str):
        where = layout(where, values.dim())
    shape = tuple(values.shape)
    strides, stride = [0] * values.dim(), 1
    for d in reversed(where.order):
        if d not in where.expanded:
            strides[d] = stride * where.steps[d]
            stride *= max(shape[d], 1) * where.steps[d]
    poison = math.nan if values.is_floating_point() else torch.iinfo(values.dtype).max
    memory = torch.full((where.offset + stride + 1,), poison, dtype=values.dtype)
    placed = memory.as_strided(shape, strides, where.offset)
    if placed.numel():
        for d in where.expanded:
            values = values.narrow(d, 0, 1)
        source_shape = tuple(values.shape)
        memory.as_strided(source_shape, strides, where.offset).copy_(values)
    return placed


def random(shape, dtype: torch.dtype = torch.float32, where: Layout | str = "contiguous") -> torch.Tensor:
    """Values from the normal distribution, or integers from the whole range."""
    if dtype.is_floating_point:
        values = torch.randn(tuple(shape), dtype=torch.float64).to(dtype)
    else:
        limits = torch.iinfo(dtype)
        values = torch.randint(limits.min, limits.max, tuple(shape), dtype=dtype)
    return place(values, where)


def with_ties(shape, dtype: torch.dtype, where: Layout | str = "contiguous") -> torch.Tensor:
    """Few different values, so that many of them are equal; some of the floats are NaN, infinite or -0.0."""
    values = torch.randint(0 if dtype == torch.uint8 else -2, 3, tuple(shape)).to(dtype)
    if dtype.is_floating_point:
        special = torch.tensor([math.nan, math.inf, -math.inf, -math.inf, -0.0], dtype=dtype)
        values = torch.where(torch.rand(values.shape) < 0.2, special[torch.randint(5, values.shape)], values)
    return place(values, where)
