"""max_pool2d's values and indices are stock's bit for bit; its gradients are compared with float64."""

import math

import pytest
import torch
from geometries import WINDOWS
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import assert_identical, check_max_pool2d, gradients
from tensors import FLOATING, INTEGER, LAYOUTS, layouts, place, random, with_ties

from pyops.functional import max_pool2d

pytestmark = pytest.mark.every_device

every_dtype = pytest.mark.parametrize("dtype", FLOATING + INTEGER, ids=str)
every_floating_dtype = pytest.mark.parametrize("dtype", FLOATING, ids=str)
both_formats = pytest.mark.parametrize("where", ["contiguous", "channels_last"])


@every_dtype
@both_formats
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows(window, where, dtype):
    check_max_pool2d(with_ties((2, 3, 13, 37), dtype, where), where, **window)
    check_max_pool2d(random((1, 19, 9, 11), dtype, where), where, **window)


@every_dtype
@pytest.mark.parametrize("where", LAYOUTS)
def test_layouts(where, dtype):
    for grad_where in LAYOUTS:
        check_max_pool2d(with_ties((2, 5, 9, 8), dtype, where), grad_where, kernel_size=3, stride=2, padding=1)
        check_max_pool2d(with_ties((5, 9, 8), dtype, where), grad_where, kernel_size=2)


@st.composite
def window_and_size(draw):
    """A window, and an image for which it gives at least one output pixel."""
    options = {"kernel_size": [], "stride": [], "padding": [], "dilation": []}
    size = []
    for _ in range(2):
        kernel, stride, dilation = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
        padding = draw(st.integers(0, kernel // 2))
        covered = (draw(st.integers(1, 24)) - 1) * stride + (kernel - 1) * dilation + 1
        size.append(max(1, covered + draw(st.integers(0, stride - 1)) - 2 * padding))
        for values, value in zip(options.values(), (kernel, stride, padding, dilation), strict=True):
            values.append(value)
    return options | {"ceil_mode": draw(st.booleans())}, size


@given(st.data())
def test_any_window_and_layout(data):
    options, size = data.draw(window_and_size())
    batch = data.draw(st.sampled_from([(), (0,), (1,), (2,)]))
    channels = data.draw(st.one_of(st.integers(1, 5), st.integers(1, 70)))
    assume(math.prod(size) * channels < 40_000)
    shape = (*batch, channels, *size)
    some_layout = st.one_of(layouts(len(shape)), st.just("channels_last"))
    dtype = data.draw(st.sampled_from(FLOATING + INTEGER))
    values = data.draw(st.sampled_from([random, with_ties]))
    check_max_pool2d(values(shape, dtype, data.draw(some_layout)), data.draw(some_layout), **options)


@every_floating_dtype
@both_formats
@pytest.mark.parametrize(
    ("taps", "winner"),
    [
        ([1, 3, 3, 2], 1),  # the first of equal values wins
        ([-0.0, 0.0, 0.0, -0.0], 0),  # zeros of either sign are equal
        ([0.0, -0.0, -0.0, 0.0], 0),
        ([math.nan, 5, 1, 2], 0),
        ([5, math.nan, math.inf, 2], 1),
        ([math.nan, 1, math.nan, 2], 2),  # the last of several NaNs wins
        ([-math.inf] * 4, 0),
        ([-math.inf, -math.inf, -math.inf, -1], 3),
        ([-math.inf, math.nan, -math.inf, -math.inf], 1),
        ([math.inf, 1, math.inf, 2], 0),
    ],
    ids=str,
)
def test_who_wins(taps, winner, where, dtype):
    image = torch.tensor(taps, dtype=dtype).view(1, 1, 2, 2)
    input = place(image.tile(1, 18, 5, 19), where)
    output, indices = max_pool2d(input, 2, return_indices=True)
    rows, columns = torch.meshgrid(torch.arange(0, 10, 2), torch.arange(0, 38, 2), indexing="ij")
    assert torch.equal(indices, ((rows + winner // 2) * 38 + columns + winner % 2).expand(1, 18, 5, 19))
    best = torch.tensor(taps[winner], dtype=dtype)
    assert_identical("output", output, place(best.expand(output.shape), where))
    (grad,) = gradients(lambda t: max_pool2d(t, 2), [input], torch.ones_like(output))
    assert torch.equal(grad, torch.eye(4, dtype=dtype)[winner].view(1, 1, 2, 2).tile(1, 18, 5, 19))
    check_max_pool2d(input, where, kernel_size=2)


@every_dtype
@both_formats
def test_padding_never_wins(where, dtype):
    lowest = -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min
    input = place(torch.full((2, 17, 5, 20), lowest, dtype=dtype), where)
    for options in ({"kernel_size": 3, "stride": 1, "padding": 1}, {"kernel_size": 5, "stride": 2, "padding": 2}):
        check_max_pool2d(input, where, **options)
        _, indices = max_pool2d(input, return_indices=True, **options)
        assert indices[0, 0, 0, 0] == 0, "the first tap inside the image"


@every_dtype
@both_formats
@pytest.mark.parametrize("kernel", [(15, 17), (16, 16), (1, 256), (300, 1), (40, 41)], ids=str)
def test_windows_above_255_taps(kernel, where, dtype):
    """The argmax fits a byte for up to 255 taps (15 x 17), but not for more."""
    shape = (2, 3, kernel[0] + 7, kernel[1] + 9)
    argmax = torch.ops.pyops.max_pool2d(random(shape), kernel)[1]
    assert argmax.dtype == (torch.uint8 if kernel == (15, 17) else torch.int64)
    padding = [k // 2 for k in kernel]
    check_max_pool2d(random(shape, dtype, where), where, kernel_size=kernel, stride=(4, 5))
    check_max_pool2d(with_ties(shape, dtype, where), where, kernel_size=kernel, stride=(2, 1), padding=padding)


@both_formats
def test_the_last_of_255_taps(where):
    """Tap number 254 is the largest that a byte holds, for int8 values too, whose argmax uses vectors of equal size."""
    for dtype in (torch.float32, torch.int8, torch.uint8):
        input = torch.zeros(1, 33, 15, 17, dtype=dtype)
        input[..., -1, -1] = 1
        output, argmax = torch.ops.pyops.max_pool2d(place(input, where), (15, 17))
        assert (output == 1).all() and (argmax == 254).all()


@both_formats
@pytest.mark.parametrize("images", [41, 1751], ids=["several blocks", "more than caches hold"])
def test_many_small_images(images, where):
    check_max_pool2d(random((images, 6, 10, 10), torch.float32, where), where, kernel_size=2)


@pytest.mark.parametrize("window", [{"kernel_size": 3, "stride": 2}, {"kernel_size": (2, 7)}], ids=str)
def test_few_columns(window):
    """The images have many planes, some of which are left over after the last full vector."""
    for dtype in (torch.float32, torch.float64):
        check_max_pool2d(with_ties((3, 35, 7, 7), dtype, "contiguous"), "contiguous", **window)


@both_formats
@pytest.mark.parametrize("window", [*WINDOWS, {"kernel_size": (2, 3)}], ids=str)
@pytest.mark.parametrize("columns", [6, 32, 37])
def test_gradients_of_minus_zero(columns, window, where):
    """The sums begin with zero, as stock's do, even those of a single gradient."""
    input = random((3, 5, 12, columns), torch.float32, where)
    minus_zero = torch.full_like(max_pool2d(input, **window), -0.0)
    (grad,) = gradients(lambda t: max_pool2d(t, **window), [input], minus_zero)
    assert (grad == 0).all() and not grad.signbit().any()


@pytest.mark.parametrize("shape", [(0, 3, 6, 6), (0, 1, 5, 5)], ids=str)
def test_empty_batch(shape):
    check_max_pool2d(random(shape), kernel_size=2)
    check_max_pool2d(random(shape, torch.int32), kernel_size=2)


def test_argmax_is_the_tap():
    input = torch.tensor([[[1.0, 9, 2, 3], [4, 5, 8, 7]]])
    output, argmax = torch.ops.pyops.max_pool2d(input, 2)
    assert output.tolist() == [[[9, 8]]] and argmax.tolist() == [[[1, 2]]] and argmax.dtype == torch.uint8


@every_floating_dtype
@both_formats
@pytest.mark.parametrize("kernel", [2, 3, 16])
def test_gather_is_the_transpose_of_backward(kernel, where, dtype):
    """<gather(x), g> = <x, backward(g)>, element by element: gather reads what backward writes to."""
    input = random((2, 3, 20, 21), dtype, where)
    window = (kernel, 2, 1, 1, True)
    _, argmax = torch.ops.pyops.max_pool2d(input, *window)
    other = random(input.shape, dtype, where)
    gathered = torch.ops.pyops.max_pool2d_gather(other, argmax, *window)
    indices = torch.ops.pyops.max_pool2d_indices(argmax, input.shape[-2:], *window)
    expected = other.flatten(-2).gather(-1, indices.flatten(-2)).view(indices.shape)
    assert torch.equal(gathered, expected)
    assert gathered.stride() == argmax.stride() == indices.stride()


@pytest.mark.not_emulated
def test_more_than_2_to_the_31_elements():
    side = 2**10
    input = torch.zeros(1, 2**11 + 1, side, side, dtype=torch.uint8)
    input[0, -1, -1, -3], input[0, 2**11 - 1, 0, 1] = 7, 3
    output, argmax = torch.ops.pyops.max_pool2d(input, 4)
    assert output[0, -1, -1, -1] == 7 and argmax[0, -1, -1, -1] == 13
    assert output[0, 2**11 - 1, 0, 0] == 3 and argmax[0, 2**11 - 1, 0, 0] == 1
    assert output.count_nonzero() == argmax.count_nonzero() == 2


@pytest.mark.slow
@both_formats
@pytest.mark.not_emulated
def test_gradient_of_more_than_2_to_the_31_elements(where):
    channels, side = 2**11 + 1, 2**10
    format = torch.channels_last if where == "channels_last" else torch.contiguous_format
    argmax = torch.zeros(1, channels, side // 4, side // 4, dtype=torch.uint8).to(memory_format=format)
    grad = torch.zeros(argmax.shape, dtype=torch.bfloat16).to(memory_format=format)
    argmax[0, -1, -1, -1], grad[0, -1, -1, -1], grad[0, 2, 3, 0] = 13, 7, 5
    grad_input = torch.ops.pyops.max_pool2d_backward(grad, argmax, (side, side), 4)
    assert grad_input[0, -1, -1, -3] == 7 and grad_input[0, 2, 12, 0] == 5
    assert grad_input.count_nonzero() == 2
