"""Random shapes, windows and memory layouts, which favour the sizes where the kernels change their algorithm."""

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from tensors import LAYOUTS, Layout, layout

# Sizes around the lengths of vectors (2 to 16 lanes), with and without tails.
BATCHES = (1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 17, 31, 32, 33, 40, 64, 65)
CHANNELS = (1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 20, 24, 31, 32, 33, 40, 48, 64, 70, 130, 260, 300)
GROUPS = (2, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17)
SIZES = (1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 15, 16, 17, 19, 20, 24, 28, 31, 33, 40)
KERNELS = (1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 4, 5, 5, 7, 9, 11, 13)  # a sum over 13 x 13 taps takes several chunks
STRIDES = (1, 1, 1, 1, 1, 2, 2, 3, 4, 5)
DILATIONS = (1, 1, 1, 1, 1, 2, 2, 3, 5)
LAYERS = ((1, 2, 5, 8, 9, 17, 24), (1, 3, 6, 8, 16), (1, 3, 6, 8, 16))  # batch, input and output channels
FEATURES = (0, 1, 1, 2, 3, 5, 8, 15, 16, 17, 20, 31, 32, 33, 63, 64, 65, 84, 100, 127, 130, 256, 257, 300, 520, 600)


@dataclass(frozen=True)
class Axis:
    """One dimension of a sliding window over an image."""

    size: int
    kernel: int
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    dilation: int = 1

    @property
    def room(self) -> int:
        return self.size + sum(self.padding) - self.dilation * (self.kernel - 1) - 1

    def outputs(self, ceil_mode: bool = False) -> int:
        """The number of windows, which is 0 if the kernel is larger than the padded image."""
        if self.room < 0:
            return 0
        count = -(-self.room // self.stride) + 1 if ceil_mode else self.room // self.stride + 1
        if ceil_mode and (count - 1) * self.stride >= self.size + self.padding[0]:
            count -= 1
        return count

    def every_window_has_a_tap(self, outputs: int) -> bool:
        return all(
            any(0 <= y * self.stride - self.padding[0] + k * self.dilation < self.size for k in range(self.kernel))
            for y in range(outputs)
        )


def draw_axis(rng: random.Random, pooling: bool = False) -> Axis:
    """An axis with at least one window; the padding of a pooling is at most half of its kernel."""
    while True:
        kernel, dilation = rng.choice(KERNELS), rng.choice(DILATIONS)
        reach = dilation * (kernel - 1)
        paddings = [0, 0, 0, 1, 1, 2, 3, reach // 2, reach, reach + 1, kernel // 2, kernel]
        padding = rng.randint(0, kernel // 2) if pooling else rng.choice(paddings)
        axis = Axis(rng.choice(SIZES), kernel, rng.choice(STRIDES), (padding, padding), dilation)
        if axis.outputs() > 0:
            return axis


def draw_same_axis(rng: random.Random) -> Axis:
    """An axis with padding "same"."""
    kernel, dilation = rng.choice(KERNELS), rng.choice(DILATIONS)
    total = dilation * (kernel - 1)
    return Axis(rng.choice(SIZES), kernel, 1, (total // 2, total - total // 2), dilation)


@dataclass(frozen=True)
class Convolution:
    """The shapes of a convolution's input and weight, and its options."""

    input: tuple[int, ...]
    weight: tuple[int, ...]
    options: dict[str, Any]
    output: tuple[int, int]

    def products(self) -> int:
        return math.prod(self.input[:-3]) * self.weight[0] * math.prod(self.output) * math.prod(self.weight[1:])


def _pair(rng: random.Random, h: int, w: int) -> int | tuple[int, int]:
    return h if h == w and rng.random() < 0.5 else (h, w)


def draw_convolution(rng: random.Random, most_products: int) -> Convolution:
    """A convolution of at most `most_products` multiplications."""
    while True:
        same = rng.random() < 0.08
        h, w = (draw_same_axis(rng) if same else draw_axis(rng) for _ in range(2))
        if rng.random() < 0.35:  # a square image and window, like most in practice
            w = h
        if rng.random() < 0.1:  # the most common kernel, which has code of its own
            same, padding = False, rng.choice((0, 1, 1, 2))
            h, w = (Axis(axis.size, 3, 1, (padding, padding)) for axis in (h, w))
        groups = rng.choice(GROUPS) if rng.random() < 0.35 else 1
        kind = rng.random()
        in_channels, out_channels = rng.choice(CHANNELS), rng.choice(CHANNELS)
        if groups > 1 and kind < 0.4:  # depthwise, sometimes with a multiplier
            groups, in_channels, out_channels = rng.choice(CHANNELS[3:]), 1, rng.choice((1, 1, 1, 2, 3))
        elif groups > 1 and kind < 0.7:
            in_channels = out_channels = rng.choice((1, 2, 3, 4, 8, 16))
        batch = () if rng.random() < 0.06 else (rng.choice(BATCHES),)
        options: dict[str, Any] = {
            "stride": _pair(rng, h.stride, w.stride),
            "padding": "same" if same else _pair(rng, h.padding[0], w.padding[0]),
            "dilation": _pair(rng, h.dilation, w.dilation),
            "groups": groups,
        }
        defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        options = {name: value for name, value in options.items() if value != defaults[name]}
        convolution = Convolution(
            (*batch, groups * in_channels, h.size, w.size),
            (groups * out_channels, in_channels, h.kernel, w.kernel),
            options,
            (h.outputs(), w.outputs()),
        )
        if 0 < convolution.products() <= most_products:
            return convolution


def draw_layer(rng: random.Random) -> Convolution:
    """A layer of a small network on a small batch, with enough work for several threads, or for splitting the batch."""
    while True:
        kernel = rng.choice((3, 3, 5, 7))
        padding = rng.choice((0, 0, kernel // 2))
        h, w = (Axis(rng.randint(10, 28), kernel, 1, (padding, padding)) for _ in range(2))
        batch, channels, out_channels = (rng.choice(sizes) for sizes in LAYERS)
        options = {"padding": padding} if padding else {}
        convolution = Convolution(
            (batch, channels, h.size, w.size),
            (out_channels, channels, kernel, kernel),
            options,
            (h.outputs(), w.outputs()),
        )
        if 500_000 <= convolution.products() <= 3_000_000:
            return convolution


@dataclass(frozen=True)
class Pooling:
    """The options of a pooling and the size of its output."""

    options: dict[str, Any]
    output: tuple[int, int]


def _draw_pooling_axes(rng: random.Random) -> list[Axis]:
    kind = rng.random()
    if kind < 0.02:  # more taps than a byte can number
        return [Axis(rng.randint(16, 24), 16, rng.choice((1, 2, 16)), (rng.choice((0, 8)),) * 2) for _ in range(2)]
    if kind < 0.4:
        kernel = rng.choice(((2, 2), (2, 2), (2, 2), (3, 3), (3, 2), (1, 1), (4, 4)))
        return [Axis(rng.choice(SIZES), k, k) for k in kernel]
    axes = [draw_axis(rng, pooling=True) for _ in range(2)]
    if kind < 0.6:  # a square window
        axes[1] = replace(axes[0], size=rng.choice(SIZES))
    return axes


def draw_pooling(rng: random.Random, size: tuple[int, int] | None = None) -> tuple[Pooling, tuple[int, int]]:
    """A pooling and the size of its input, which may be given. Every window has a tap inside of the image, because
    stock writes out of bounds if a window has none."""
    ceil_mode = rng.random() < 0.3
    while True:
        h, w = _draw_pooling_axes(rng)
        if size is not None:
            h, w = replace(h, size=size[0]), replace(w, size=size[1])
        output = h.outputs(ceil_mode), w.outputs(ceil_mode)
        if min(output) > 0 and h.every_window_has_a_tap(output[0]) and w.every_window_has_a_tap(output[1]):
            break
    options: dict[str, Any] = {
        "kernel_size": _pair(rng, h.kernel, w.kernel),
        "stride": _pair(rng, h.stride, w.stride),
        "padding": _pair(rng, h.padding[0], w.padding[0]),
        "dilation": _pair(rng, h.dilation, w.dilation),
        "ceil_mode": ceil_mode,
    }
    if (h.stride, w.stride) == (h.kernel, w.kernel) and rng.random() < 0.5:
        del options["stride"]
    return Pooling(options, output), (h.size, w.size)


def draw_layout(rng: random.Random, rank: int) -> Layout:
    """A layout that is mostly contiguous or channels-last, otherwise any named layout or one with arbitrary strides."""
    kind = rng.random()
    if kind < 0.4:
        return layout("contiguous", rank)
    if kind < 0.75:
        return layout("channels_last", rank)
    if kind < 0.82:
        return Layout(tuple(range(rank)), (1,) * rank, offset=1)
    if kind < 0.92:
        return layout(rng.choice(LAYOUTS), rank)
    order = list(range(rank))
    rng.shuffle(order)
    expanded = (rng.randrange(rank),) if rank and rng.random() < 0.4 else ()
    return Layout(tuple(order), tuple(rng.choice((1, 1, 2, 3)) for _ in range(rank)), rng.randint(0, 3), expanded)


def draw_values(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> torch.Tensor:
    """Values of a kind: "normal"; "integers", whose sums are exact; "special", a few of which are NaN, infinite or
    zeros of either sign; or "tiny", whose products are denormal."""
    if kind == "integers":
        return torch.randint(-2, 3, shape).to(dtype)
    values = torch.randn(shape, dtype=torch.float64)
    if kind == "tiny":
        values *= math.sqrt(torch.finfo(dtype).tiny)
    if kind == "special" and values.numel():
        specials = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0], dtype=torch.float64)
        chosen = torch.rand(shape) < min(0.3, 2.0 / values.numel())
        values = torch.where(chosen, specials[torch.randint(len(specials), shape)], values)
    return values.to(dtype)
