"""Random layers as source text, with the shapes of their results. network_source.py builds networks from them.

A shape is that of one sample: (channels, height, width) for an image, (features,) for a vector.
"""

import random
from typing import Any, NamedTuple

Shape = tuple[int, ...]

BATCHES = (1, 1, 2, 2, 3, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64)
CHANNELS = (1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8, 8, 9, 12, 15, 16, 16, 17, 24, 31, 32, 33, 64)
MOST_ELEMENTS = 6_000  # in a batch of images
MOST_PRODUCTS = 400_000  # in a convolution


class Layer(NamedTuple):
    """A module as an expression, and the shape of its output."""

    constructor: str
    shape: Shape


def arguments(*positional: Any, **named: tuple[Any, Any]) -> str:
    """The arguments of a call. Named arguments are pairs of a value and the default, which is left out."""
    given = [f"{name}={value!r}" for name, (value, default) in named.items() if value != default]
    return ", ".join([*map(repr, positional), *given])


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def some(rng: random.Random, values: tuple[int, ...], uneven: float = 0.15) -> int | tuple[int, int]:
    """One of the values for both dimensions, or one for each."""
    first = rng.choice(values)
    second = rng.choice(values) if rng.random() < uneven else first
    return first if first == second else (first, second)


# ---- convolutions and pooling ----


class Convolution(NamedTuple):
    """The options of a convolution of a drawn shape, valid for its input."""

    channels: int
    outputs: int
    kernel: int | tuple[int, int]
    options: dict[str, tuple[Any, Any]]  # those of torch.nn.Conv2d, with the defaults
    shape: Shape


def convolution(rng: random.Random, shape: Shape, batch: int, outputs: int | None = None) -> Convolution | None:
    """A convolution. If `outputs` is given, its output has that many channels and the size of the input."""
    channels, *image = shape
    kernel = some(rng, (1, 1, 2, 3, 3, 3, 3, 4, 5, 5, 7))
    dilation = some(rng, (1, 1, 1, 1, 1, 2, 3))
    stride = 1 if outputs else some(rng, (1, 1, 1, 1, 2, 2, 3))
    groups = rng.choice((1, 1, 1, 1, channels, rng.choice([g for g in range(1, channels + 1) if channels % g == 0])))
    kernels, strides, dilations = pair(kernel), pair(stride), pair(dilation)
    if outputs:
        padding: Any = "same"
        groups = groups if outputs % groups == 0 else 1
        if all(k % 2 for k in kernels) and rng.random() < 0.7:
            padding = tuple(d * (k - 1) // 2 for k, d in zip(kernels, dilations, strict=True))
            padding = padding[0] if padding[0] == padding[1] else padding
    else:
        half = max(kernels) // 2
        names = ("same", "valid") if strides == (1, 1) else ("valid",)
        padding = rng.choice((0, 0, half, half, half, some(rng, tuple(range(max(kernels) + 1))), rng.choice(names)))
        outputs = groups * rng.choice((1, 1, 2, 3)) if groups > 1 else rng.choice(CHANNELS)
    if padding == "same":
        size = tuple(image)
    else:
        paddings = pair(0 if padding == "valid" else padding)
        steps = zip(image, kernels, strides, paddings, dilations, strict=True)
        size = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in steps)
    taps = kernels[0] * kernels[1]
    elements = batch * outputs * size[0] * size[1]
    if min(size) < 1 or elements > MOST_ELEMENTS or elements * channels // groups * taps > MOST_PRODUCTS:
        return None
    options = {"stride": (stride, 1), "padding": (padding, 0), "dilation": (dilation, 1), "groups": (groups, 1)}
    return Convolution(channels, outputs, kernel, options, (outputs, *size))


def convolution_layer(rng: random.Random, shape: Shape, batch: int, outputs: int | None = None) -> Layer | None:
    drawn = convolution(rng, shape, batch, outputs)
    if drawn is None:
        return None
    mode = rng.choice(("circular", "reflect", "replicate")) if rng.random() < 0.1 else "zeros"
    padding, kernels, dilations = drawn.options["padding"][0], pair(drawn.kernel), pair(drawn.options["dilation"][0])
    if padding == "same":
        paddings = [d * (k - 1) for k, d in zip(kernels, dilations, strict=True)]
    else:
        paddings = [0, 0] if padding == "valid" else list(pair(padding))
    if any(p >= n for p, n in zip(paddings, shape[1:], strict=True)):  # too few pixels to reflect
        mode = "zeros"
    options = drawn.options | {"bias": (rng.random() < 0.7, True), "padding_mode": (mode, "zeros")}
    return Layer(f"nn.Conv2d({arguments(drawn.channels, drawn.outputs, drawn.kernel, **options)})", drawn.shape)


class Pooling(NamedTuple):
    """The arguments of a max-pooling, valid for its input."""

    arguments: str
    shape: Shape


def pooled_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """The number of windows, or 0 if one has no tap inside the image, because stock then writes out of bounds."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    taps = [[i * stride - padding + k * dilation for k in range(kernel)] for i in range(count)]
    return count if count > 0 and all(any(0 <= tap < size for tap in window) for window in taps) else 0


def pooling(rng: random.Random, shape: Shape) -> Pooling | None:
    channels, *image = shape
    kernel = some(rng, (1, 2, 2, 2, 2, 3, 3, 4))
    stride = rng.choice((None, None, None, some(rng, (1, 2, 2, 3))))
    padding = some(rng, (0, 0, 0, *range(min(pair(kernel)) // 2 + 1)))
    dilation = some(rng, (1, 1, 1, 1, 1, 2))
    ceil_mode = rng.random() < 0.3
    windows = zip(image, pair(kernel), pair(stride or kernel), pair(padding), pair(dilation), strict=True)
    size = [pooled_size(*window, ceil_mode) for window in windows]
    if 0 in size:
        return None
    options = {"stride": (stride, None), "padding": (padding, 0), "dilation": (dilation, 1)}
    return Pooling(arguments(kernel, **options, ceil_mode=(ceil_mode, False)), (channels, *size))


# ---- other layers ----

# Each activation comes with whether its output may be overwritten although it is differentiated. It may if neither the
# output nor a tensor that it is a view of is saved for the backward.
RELU_LAYERS = ("nn.ReLU()", "nn.ReLU()", "nn.ReLU(inplace=True)")
RELU_CALLS = ("F.relu({})", "torch.relu({})", "{}.relu()")
RELU_CALLS_IN_PLACE = ("F.relu({}, inplace=True)", "F.relu_({})", "torch.relu_({})", "{}.relu_()")
ACTIVATION_LAYERS = (("nn.Tanh()", False), ("nn.GELU()", True), ("nn.LeakyReLU(0.1)", True), ("nn.Sigmoid()", False))


def norm_layer(rng: random.Random, shape: Shape) -> str:
    options = {
        "eps": (rng.choice((1e-5, 1e-5, 1e-2)), 1e-5),
        "momentum": (rng.choice((0.1, 0.1, 0.3, None)), 0.1),
        "affine": (rng.random() < 0.85, True),
        "track_running_stats": (rng.random() < 0.9, True),
    }
    return f"nn.BatchNorm{'2d' if len(shape) == 3 else '1d'}({arguments(shape[0], **options)})"


def average_layer(rng: random.Random, shape: Shape) -> Layer:
    channels, *image = shape
    if min(image) >= 2 and rng.random() < 0.5:
        return Layer("nn.AvgPool2d(2)", (channels, image[0] // 2, image[1] // 2))
    size = tuple(rng.randint(1, min(n, 3)) for n in image)
    return Layer(f"nn.AdaptiveAvgPool2d({size})", (channels, *size))


def view(rng: random.Random, shape: Shape, batched: bool) -> tuple[str, Shape, bool]:
    """An expression for a value's elements in another order, for some of them, or for repeated ones; its shape; and
    whether it may be overwritten if the value may be."""
    channels, height, width = shape
    ways = [
        ("{}.transpose(-1, -2)", (channels, width, height), True),
        ("{}.flip(-1)", shape, True),
        ("{}.roll(1, -2)", shape, True),
        ("{}.clone()", shape, True),
        ("{}.contiguous()", shape, True),
        ("{}[..., ::2]", (channels, height, (width + 1) // 2), True),
    ]
    if height > 1:
        ways.append(("{}[..., 1:, :]", (channels, height - 1, width), True))
    if channels > 1:
        ways.append(("{}.narrow(-3, 1, %d)" % (channels - 1), (channels - 1, height, width), True))  # noqa: UP031
    if channels % 2 == 0:
        ways.append(("torch.chunk({}, 2, -3)[1]", (channels // 2, height, width), False))
    if channels == 1:
        ways.append((f"{{}}.expand({'-1, ' if batched else ''}3, -1, -1)", (3, height, width), False))
    if batched:
        ways.append(("{}.contiguous(memory_format=torch.channels_last)", shape, True))
    return rng.choice(ways)
