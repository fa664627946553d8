"""The result of a sample does not depend on its batch: it has the same bits alone and among any other samples."""

from functools import partial

import pytest
import torch
from benched import SHAPES
from tensors import FLOATING, random

import pyops
from pyops import functional

SIZES = (1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 47, 64, 65, 70)
AFFORDABLE = 1e8  # the work of the largest batch
both_formats = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])


def assert_independent(function, samples: torch.Tensor, layout: torch.memory_format) -> None:
    """Asserts that the first or the last n samples alone give the results that they have among all samples."""

    def run(part: torch.Tensor) -> torch.Tensor:
        part = part.contiguous(memory_format=layout) if part.dim() == 4 else part.contiguous()
        return function(part).clone(memory_format=torch.contiguous_format).view(torch.uint8)

    everything = run(samples)
    for i, n in enumerate(n for n in SIZES if n <= len(samples)):
        which = slice(n) if i % 2 else slice(len(samples) - n, None)
        assert torch.equal(run(samples[which]), everything[which]), f"{n} samples of {len(samples)}"


def input_gradient(function, others, images: torch.Tensor) -> torch.Tensor:
    """The gradient of the images, for the output as its own gradient, computed together with that of the others."""
    images = images.detach().requires_grad_()
    output = function(images)
    return torch.autograd.grad(output, [images, *others], output.detach())[0]


def _layers():
    """The benchmark's shapes without their batches, each once."""
    shapes = (parameter.values[0] for parameter in SHAPES)
    layers = dict.fromkeys(shape._replace(input=(1, *shape.input[1:])) for shape in shapes)
    return [pytest.param(layer, id=str(layer)) for layer in layers if len(layer.input) > 1]


@pytest.mark.parametrize("layer", _layers())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_benched(dtype, layer):
    affordable = int(AFFORDABLE / layer.work())
    layer = layer._replace(input=(max(3, min(affordable, SIZES[-1])), *layer.input[1:]))
    samples, *parameters = layer.operands(dtype)
    assert_independent(lambda part: layer.output(functional, [part, *parameters]), samples, layer.layout)


CONVS = [  # a sample, the weight, options
    ((5, 9, 10), (7, 5, 5, 5), {"padding": 3}),
    ((16, 10, 10), (6, 16, 5, 5), {"padding": 4}),
    ((16, 6, 6), (20, 16, 3, 3), {"stride": 2, "padding": 1}),
    ((3, 17, 19), (33, 3, 3, 2), {"stride": (2, 1), "dilation": (1, 3)}),
    ((12, 9, 8), (24, 1, 3, 3), {"groups": 12, "padding": 1}),
    ((12, 9, 8), (24, 3, 3, 3), {"groups": 4, "dilation": 2, "padding": 2}),
    ((20, 9, 8), (20, 4, 3, 3), {"groups": 5, "padding": 1}),
    ((70, 4, 5), (67, 70, 3, 3), {"padding": 1}),
    ((130, 3, 3), (40, 130, 1, 1), {}),
    ((40, 23, 37), (13, 40, 3, 3), {"padding": 1}),  # direct 3-wide
    ((1, 40, 41), (1, 1, 3, 3), {}),
    ((2, 1, 1), (3, 2, 1, 1), {}),
    ((3, 14, 13), (3, 1, 13, 13), {"groups": 3}),  # more taps than a chunk of K
    ((12, 4, 4), (12, 1, 3, 3), {"groups": 12}),
    ((4, 6, 6), (4, 2, 3, 3), {"groups": 2}),
    ((8, 15, 14), (8, 4, 13, 13), {"groups": 2}),
    ((6, 8, 9), (16, 6, 3, 3), {}),
]


@both_formats
@pytest.mark.parametrize("weight_where", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("sample", "weight", "options"), CONVS)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_conv2d(dtype, sample, weight, options, weight_where, layout):
    parameters = {"weight": random(weight, dtype, weight_where), "bias": random(weight[:1], dtype)}
    function = partial(functional.conv2d, **parameters, **options)
    samples = random((SIZES[-1], *sample), dtype)
    assert_independent(function, samples, layout)
    for others in ([], [parameters["weight"].requires_grad_()]):
        assert_independent(partial(input_gradient, function, others), samples, layout)


@both_formats
@pytest.mark.parametrize(
    ("sample", "weight", "options"),
    [
        *CONVS[:5],
        ((3, 15, 14), (3, 1, 13, 13), {"groups": 3}),
        ((3, 32, 32), (16, 3, 3, 3), {}),  # direct 3-wide
        ((2, 16, 16), (16, 2, 3, 3), {"padding": 1}),
        ((16, 10, 10), (16, 4, 3, 3), {"groups": 4}),  # several groups share a vector
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_conv2d_relu_max_pool2d(dtype, sample, weight, options, layout):
    function = partial(
        functional.conv2d_relu_max_pool2d, weight=random(weight, dtype), bias=random(weight[:1], dtype), **options,
        pool_kernel_size=2,
    )  # fmt: skip
    samples = random((SIZES[-1], *sample), dtype)
    assert_independent(function, samples, layout)
    assert_independent(partial(input_gradient, function, []), samples, layout)


@pytest.mark.parametrize("sizes", [(1, 1), (10, 84), (37, 53), (300, 17), (17, 1030), (130, 260), (64, 4096)], ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_linear(dtype, sizes):
    function = partial(functional.linear, weight=random(sizes, dtype), bias=random(sizes[:1], dtype))
    assert_independent(function, random((SIZES[-1], sizes[1]), dtype), torch.contiguous_format)


@pytest.mark.parametrize("sizes", [(16, 2), (37, 53)], ids=str)
@pytest.mark.parametrize("special", [1e-39, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_to_special_values(dtype, special, sizes):
    function = partial(functional.linear, weight=random(sizes, dtype), bias=torch.full(sizes[:1], special).to(dtype))
    assert_independent(function, torch.zeros(SIZES[-1], sizes[1], dtype=dtype), torch.contiguous_format)


@both_formats
@pytest.mark.parametrize("window", [(2,), (3, 2, 1), (3, 1, 1), (5, 2, 2), (2, 3, 1, 1, True)], ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_max_pool2d(dtype, window, layout):
    function = partial(lambda input: functional.max_pool2d(input, *window))
    assert_independent(function, random((SIZES[-1], 3, 11, 13), dtype), layout)


@pytest.mark.parametrize("fused", [False, True], ids=["layers", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lenet(dtype, fused):
    with torch.no_grad():
        assert_independent(
            pyops.LeNet(fused=fused).to(dtype), random((SIZES[-1], 1, 32, 32), dtype), torch.contiguous_format
        )
