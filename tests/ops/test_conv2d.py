"""conv2d's output and gradients are compared with float64, for every geometry, layout and dtype."""

import math

import pytest
import torch
from geometries import GEOMETRIES, operands
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_close, assert_same_strides, check, conv2d_unfolded, gradients
from tensors import FLOATING, LAYOUTS, layouts, place, random

from pyops.functional import conv2d

pytestmark = pytest.mark.every_device

every_dtype = pytest.mark.parametrize("dtype", FLOATING, ids=str)
both_formats = pytest.mark.parametrize("where", ["contiguous", "channels_last"])


@every_dtype
@both_formats
@pytest.mark.parametrize(("input_shape", "weight_shape", "options"), GEOMETRIES)
def test_geometries(input_shape, weight_shape, options, where, dtype):
    check("conv2d", operands(input_shape, weight_shape, dtype, where), options, grad=where)


@both_formats
@pytest.mark.parametrize("dilation", [1, 2, (2, 3)])
@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 3), (4, 3), (2, 5)])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # stock warns of the copy that it makes
def test_named_padding(padding, kernel, dilation, where):
    """Even kernels need one more row or column at the bottom or right for "same"."""
    options = {"padding": padding, "dilation": dilation}
    check("conv2d", operands((2, 2, 13, 14), (3, 2, *kernel), where=where), options)
    check("conv2d", operands((2, 13, 14), (3, 2, *kernel)), options)


@every_dtype
@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_unbatched(bias, where, dtype):
    weight = random((6, 2, 3, 3), dtype)
    tensors = [random((4, 8, 9), dtype, where), weight, random((6,), dtype) if bias else None]
    check("conv2d", tensors, {"groups": 2, "padding": 1}, grad=where)


@pytest.mark.parametrize("grad_where", LAYOUTS)
@pytest.mark.parametrize("weight_where", LAYOUTS)
@pytest.mark.parametrize("where", LAYOUTS)
def test_layouts(where, weight_where, grad_where):
    tensors = [random((2, 4, 7, 6), where=where), random((6, 2, 3, 3), where=weight_where), random((6,))]
    check("conv2d", tensors, {"groups": 2, "padding": 1}, grad=grad_where)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("weight_where", ["contiguous", "channels_last"])
@both_formats
def test_strides(where, weight_where, groups):
    input, weight = random((2, 4, 7, 6), where=where), random((8, 4 // groups, 3, 3), where=weight_where)
    for x in (input, input[0]):
        expected = torch.nn.functional.conv2d(x, weight, groups=groups)
        assert_same_strides("output", conv2d(x, weight, groups=groups), expected)


EMPTY = [
    ((0, 3, 6, 6), (4, 3, 3, 3), 1),
    ((0, 4, 6, 6), (4, 2, 3, 3), 2),
    ((2, 0, 6, 6), (4, 0, 3, 3), 1),
    ((0, 6, 6), (4, 0, 3, 3), 1),
    ((0, 0, 6, 6), (4, 0, 3, 3), 1),
]


@both_formats
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("input_shape", "weight_shape", "groups"), EMPTY)
def test_empty(input_shape, weight_shape, groups, bias, where):
    tensors = operands(input_shape, weight_shape, where=where, bias=bias)
    output = conv2d(*tensors, groups=groups)
    assert output.shape == torch.nn.functional.conv2d(*tensors, groups=groups).shape
    for tensor, grad in zip(
        tensors, gradients(lambda *t: conv2d(*t, groups=groups), tensors, torch.ones_like(output)), strict=True
    ):
        assert tensor is None or (grad.shape == tensor.shape and not grad.any())


@st.composite
def geometries(draw):
    """The shapes of input and weight, and the options, of a convolution with at least one output pixel."""
    groups = draw(st.integers(1, 3))
    in_channels, out_channels = (groups * draw(st.integers(1, 5)) for _ in range(2))
    size, kernels, options = [], [], {"stride": [], "padding": [], "dilation": []}
    for _ in range(2):
        kernel, stride, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
        padding = draw(st.integers(0, 4))
        covered = (draw(st.integers(1, 7)) - 1) * stride + (kernel - 1) * dilation + 1  # size covered by the windows
        size.append(max(1, covered + draw(st.integers(0, stride - 1)) - 2 * padding))
        kernels.append(kernel)
        for values, value in zip(options.values(), (stride, padding, dilation), strict=True):
            values.append(value)
    batch = draw(st.sampled_from([(), (1,), (2,), (3,), (16,), (21,)]))
    return (*batch, in_channels, *size), (out_channels, in_channels // groups, *kernels), options | {"groups": groups}


@given(st.data())
def test_any_geometry_and_layout(data):
    input_shape, weight_shape, options = data.draw(geometries())
    dtype = data.draw(st.sampled_from(FLOATING))
    rank = len(input_shape)
    some_layout = st.one_of(layouts(rank), st.just("channels_last"))
    tensors = [
        random(input_shape, dtype, data.draw(some_layout)),
        random(weight_shape, dtype, data.draw(layouts(4))),
        random(weight_shape[:1], dtype, data.draw(layouts(1))) if data.draw(st.booleans()) else None,
    ]
    check("conv2d", tensors, options, grad=data.draw(some_layout))


BORDERS = [
    {"padding": 1},
    {"padding": 2},
    {"padding": 1, "stride": 2},
    {"padding": 2, "dilation": 2},
    {"padding": 3, "stride": 3, "dilation": 2},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@both_formats
@pytest.mark.parametrize("options", BORDERS, ids=str)
@pytest.mark.parametrize("infinite", ["weight", "input", "grad_output", "weight_nan", "all"])
@pytest.mark.parametrize(
    ("channels", "groups"),
    [
        pytest.param((4, 3), 1, id="few"),
        pytest.param((32, 24), 8, id="groups", marks=pytest.mark.not_emulated),
        pytest.param((40, 34), 1, id="pairs", marks=pytest.mark.not_emulated),
        pytest.param((8, 470), 1, id="direct_3wide", marks=pytest.mark.not_emulated),
    ],
)
def test_the_border_is_not_multiplied(channels, groups, infinite, options, where, dtype):
    """An infinite value times the padding would be NaN, but the sum runs over the taps inside the image only."""
    out_channels, in_channels = channels
    input = random((2, in_channels, 8, 9), dtype, where)
    weight = random((out_channels, in_channels // groups, 3, 3), dtype, where)
    shape = conv2d(input, weight, **options, groups=groups).shape
    grad = random(shape, dtype, where)
    if infinite in ("weight", "all"):
        weight[0, 0, 0, 0], weight[1, 2, 2, 1], weight[3, :, 1, 2] = math.inf, -math.inf, math.inf
    if infinite == "weight_nan":
        weight[0, 0, 0, 0], weight[3, 1, 2, 2] = math.nan, math.nan
    if infinite in ("input", "all"):
        input[0, 0, 0, 0], input[1, 2, -1, 3], input[1, 1, 4, -1] = math.inf, -math.inf, math.inf
    if infinite in ("grad_output", "all"):
        grad[0, 0, 0, 0], grad[1, 3, -1, -1], grad[1, 1, 0, 2] = math.inf, -math.inf, math.inf

    def ours(*tensors):
        return conv2d(*tensors, **options, groups=groups)

    def reference(*tensors):
        return conv2d_unfolded(*tensors, **options, groups=groups, inside=True)

    tensors = [input, weight]
    doubles, magnitudes = [t.double() for t in tensors], [t.double().abs() for t in tensors]
    assert_close("output", ours(*tensors), reference(*doubles), reference(*magnitudes))
    compared = zip(
        ("input", "weight"),
        gradients(ours, tensors, grad),
        gradients(reference, doubles, grad.double()),
        gradients(reference, magnitudes, grad.double().abs()),
        strict=True,
    )
    for name, actual, expected, magnitude in compared:
        assert_close(f"gradient of {name}", actual, expected, magnitude)


def test_sums_stay_accurate():
    """Weight and bias gradients of a large batch are long sums of terms of one sign."""
    input, grad = torch.rand(64, 1, 40, 40) + 0.5, torch.rand(64, 2, 38, 38) + 0.5
    tensors = [input, torch.ones(2, 1, 3, 3), torch.zeros(2)]
    _, weight_grad, bias_grad = gradients(conv2d, tensors, grad)
    doubles = [t.double() for t in tensors]
    _, exact_weight_grad, exact_bias_grad = gradients(torch.nn.functional.conv2d, doubles, grad.double())
    torch.testing.assert_close(weight_grad.double(), exact_weight_grad, rtol=1e-6, atol=0)
    torch.testing.assert_close(bias_grad.double(), exact_bias_grad, rtol=1e-6, atol=0)


@pytest.mark.slow
@both_formats
@pytest.mark.not_emulated
def test_more_than_2_to_the_31_elements(where):
    """The output has that many elements; input and weight are small."""
    channels, side = 2**15 + 1, 2**8
    input, weight = torch.zeros(1, 1, side, side), torch.zeros(channels, 1, 1, 1)
    input[0, 0, 0, 0], input[0, 0, -1, -1], weight[0], weight[-1] = 3, 5, 7, 2
    if where == "channels_last":  # with one channel the input has both formats
        input, weight = input.expand(1, 2, side, side) * 1, weight.expand(channels, 2, 1, 1) / 2
    output = conv2d(place(input.bfloat16(), where), weight.bfloat16())
    assert output[0, 0, 0, 0] == 21 and output[0, -1, 0, 0] == 6
    assert output[0, 0, -1, -1] == 35 and output[0, -1, -1, -1] == 10
    assert output.count_nonzero() == 4


@pytest.mark.parametrize(
    ("input_size", "weight_size", "options"),
    [
        ((2, 70, 7, 6), (70, 1, 3, 3), (None, 1, 1, 1, 70)),  # depthwise, with full and partial vectors of channels
        ((1, 8, 4, 4), (8, 1, 3, 3), (None, 5, 3, 1, 8)),  # depthwise, with pixels that meet no column of the image
        ((2, 3, 5, 40), (2, 3, 3, 3), (None, 1, 6, 6, 1)),  # only the middle row of taps ever meets the image
        ((3, 2, 9, 33), (4, 1, 3, 5), (None, (2, 3), 1, 1, 2)),  # few output channels: weight gradient along the width
        ((2, 20, 9, 10), (24, 20, 5, 5), (None, 1, 2)),  # 25 classes of pixels by the taps inside
        ((2, 20, 9, 10), (24, 20, 7, 7), (None, 2, 3)),  # too many taps for classes in either direction
        ((1, 5, 14, 15), (20, 5, 9, 9), (None, 1, 4)),  # more than 64 taps are too many, too
        ((1, 40, 24, 25), (144, 40, 1, 1), ()),  # many pixels: prefetched; 9 vectors of channels: panels of 3
        ((1, 24, 21, 22), (80, 24, 3, 3), (None, 2, 1)),  # prefetched along a tap's channels; panels of 3 and 2
        ((3, 20, 17, 19), (33, 20, 1, 1), (None, 2)),  # rows are adjacent after an input tile is copied
        ((2, 16, 13, 14), (3, 16, 1, 1), ()),  # rows are adjacent in the image
        ((1, 6, 40, 41), (70, 6, 3, 3), (None, 3, 1)),  # an input gradient that no tap falls on in most places
        ((2, 36, 9, 7), (70, 18, 3, 3), (None, 2, 2, 2, 2)),  # bfloat16: pairs of channels in groups
        ((4, 34, 8, 7), (40, 34, 3, 2), (None, (1, 3), 0)),  # columns sorted by remainder; pairs of images
        # Weight gradients along the input channels: taps share vectors or not; a single tap is in place or has gaps.
        ((2, 24, 9, 10), (10, 24, 3, 3), (None, 1, 1)),
        ((3, 18, 8, 9), (4, 18, 3, 3), (None, 1, 2, 2)),
        ((2, 64, 6, 7), (12, 64, 1, 1), ()),
        ((2, 64, 9, 8), (8, 64, 1, 1), (None, 2)),
        # Direct 3-wide: for a vector of 16 and of 8 channels, in groups, and for gradients of the input.
        ((2, 40, 25, 37), (13, 40, 3, 3), (None, 1, 1)),
        ((1, 70, 26, 19), (7, 70, 3, 3), (None, (2, 1), (3, 1))),
        ((2, 48, 28, 30), (24, 24, 2, 3), (None, 1, (1, 0), 1, 2)),
        ((1, 96, 20, 20), (16, 48, 3, 3), (None, 1, 1, 1, 2)),
        ((2, 12, 30, 29), (40, 12, 3, 3), (None, 1, 1)),
        ((1, 8, 31, 40), (40, 8, 3, 3), (None, 1, 1)),
    ],
)
@pytest.mark.parametrize("weight_layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 2**-8)]
)
def test_paths_chosen_by_shape(input_size, weight_size, options, layout, weight_layout, dtype, tolerance):
    def output_and_gradients(function, dtype):
        torch.manual_seed(0)

        def numbers(size, memory_format):  # that every dtype can represent
            return torch.randn(size, dtype=torch.bfloat16).to(dtype, memory_format=memory_format)

        images, weight = (
            numbers(input_size, layout).requires_grad_(),
            numbers(weight_size, weight_layout).requires_grad_(),
        )
        output = function(images, weight, *options)
        return output, *torch.autograd.grad(output, (images, weight), numbers(output.shape, layout))

    ours = output_and_gradients(conv2d, dtype)
    exact = output_and_gradients(torch.nn.functional.conv2d, torch.float64)
    for actual, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=min(tolerance, 1e-4))
