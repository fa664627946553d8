"""linear_relu, conv2d_relu and conv2d_relu_max_pool2d equal the single ops in turn, to the last bit."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_log import KernelLog
from tensors import FLOATING
from torch import func

import pyops
from pyops import functional as F

pytestmark = pytest.mark.every_device

ops = torch.ops.pyops


def same_bits(expected, actual):
    for e, a in zip(expected, actual, strict=True):
        assert a.shape == e.shape and a.stride() == e.stride() and a.dtype == e.dtype
        assert torch.equal(a.isnan(), e.isnan())
        assert torch.equal(a.nan_to_num(7), e.nan_to_num(7))


def results(function, tensors):
    """The output of a function and the gradients of all tensors."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    output = function(*tensors)
    torch.manual_seed(1)
    return [output.detach(), *torch.autograd.grad(output, tensors, torch.randn_like(output))]


def composed(*tensors, pool=None, **conv):
    output = F.relu(F.conv2d(*tensors, **conv))
    if pool is None:
        return output
    return F.max_pool2d(output, **{name.removeprefix("pool_"): value for name, value in pool.items()})


def fused(*tensors, pool=None, **conv):
    if pool is None:
        return F.conv2d_relu(*tensors, **conv)
    return F.conv2d_relu_max_pool2d(*tensors, **conv, **pool)


@st.composite
def convolutions(draw):
    """The tensors and options of a convolution, and the options of a pooling or None."""
    groups, kernel = draw(st.sampled_from([1, 1, 2, 3])), (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    images, side = draw(st.sampled_from([1, 2, 5, 17, 33])), st.integers(4, 13)
    input_size = (images, groups * draw(st.integers(1, 3)), draw(side), draw(side))
    weight_size = (groups * draw(st.integers(1, 9)), input_size[1] // groups, *kernel)
    torch.manual_seed(draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from(FLOATING))
    tensors = [torch.randn(size).to(dtype) for size in (input_size, weight_size, weight_size[:1])]
    if draw(st.booleans()):
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    if draw(st.booleans()):
        tensors[0][0, 0, 0, 0] = float("nan")
    if draw(st.booleans()):
        tensors = tensors[:2]
    conv = {"stride": draw(st.integers(1, 2)), "padding": draw(st.integers(0, 2)), "groups": groups}
    pool = {"pool_kernel_size": 2, "pool_stride": draw(st.sampled_from([None, 1])), "ceil_mode": draw(st.booleans())}
    out = F.conv2d(*tensors, **conv).shape[-2:]
    return tensors, conv, pool if min(out) >= 2 and draw(st.booleans()) else None


@given(convolutions())
def test_convolutions_equal_the_single_ops(case):
    tensors, conv, pool = case
    same_bits(
        results(lambda *t: composed(*t, pool=pool, **conv), tensors),
        results(lambda *t: fused(*t, pool=pool, **conv), tensors),
    )


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("size", [(1, 3, 5), (7, 200, 33), (64, 400, 120), (3, 0, 4), (0, 3, 2)], ids=str)
def test_linear_equals_the_single_ops(size, dtype):
    m, k, n = size
    tensors = [torch.randn(s).to(dtype) for s in ((2, m, k), (n, k), (n,))]
    if m and k:
        tensors[0][0, 0, 0] = float("nan")
    same_bits(results(lambda *t: F.relu(F.linear(*t)), tensors), results(F.linear_relu, tensors))


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("channels", "weight_size"),
    [(3, (5, 3, 3, 3)), (3, (3, 1, 3, 3)), (16, (16, 4, 3, 3))],
    ids=["dense", "depthwise", "narrow groups"],
)
def test_infinite_weights(channels, weight_size, memory_format, padding):
    """The border is exact, and an output is rectified only after all of its terms are added."""
    input = torch.randn(2, channels, 6, 7).contiguous(memory_format=memory_format)
    weight = torch.randn(weight_size)
    weight[1, 0, 0, 0], weight[2, 0, 1, 1] = float("inf"), float("-inf")
    conv = {"padding": padding, "groups": channels // weight_size[1]}
    for pool in (None, {"pool_kernel_size": 2}):
        expected = composed(input, weight, pool=pool, **conv)
        assert expected.isinf().any()
        same_bits([expected], [fused(input, weight, pool=pool, **conv)])


@pytest.mark.parametrize("pool", [2, (2, 1)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_no_tap_meets_the_image(memory_format, pool):
    """The output is the bias, in the kernels over CHWN blocks too."""
    tensors = [torch.randn(size) for size in ((19, 3, 31, 2), (5, 3, 7, 2), (5,))]
    tensors[0] = tensors[0].contiguous(memory_format=memory_format)
    options = {"padding": 2, "dilation": (1, 4), "pool": {"pool_kernel_size": pool}}
    same_bits(results(partial(composed, **options), tensors), results(partial(fused, **options), tensors))


@pytest.mark.parametrize("kernel", [(15, 17), (16, 16)], ids=["255 taps", "256 taps"])
def test_dead_windows(kernel):
    """The argmax of a window without gradient names no tap, in either dtype of argmax; a NaN has a gradient."""
    input = torch.full((1, 3, *kernel), -1.0)
    input[0, 1, 3, 4], input[0, 2, 0, 1] = 2.0, float("nan")
    weight = torch.ones(3, 1, 1, 1)
    options = (1, 0, 1, 3, kernel, kernel, 0, 1, False)
    output, argmax = ops.conv2d_relu_max_pool2d_with_argmax(input, weight, None, *options)
    assert argmax.dtype == (torch.uint8 if kernel[0] * kernel[1] <= 255 else torch.int64)
    assert argmax.flatten().tolist() == [255 if argmax.dtype == torch.uint8 else -1, 3 * kernel[1] + 4, 1]
    assert output.flatten()[:2].tolist() == [0.0, 2.0] and output.flatten()[2].isnan()
    tensors = [input, weight]
    same_bits(
        results(lambda *t: composed(*t, groups=3, pool={"pool_kernel_size": kernel}), tensors),
        results(lambda *t: fused(*t, groups=3, pool={"pool_kernel_size": kernel}), tensors),
    )


# Input, weight, and options of the convolution and of the pooling, for which different algorithms are chosen.
POOLED = {
    "2x2 windows, long sums": ((33, 17, 9, 11), (7, 17, 3, 3), {}, (2, 2, 0, 1, False)),
    "2x2 windows, more channels than 8 lanes": ((33, 5, 8, 11), (14, 5, 3, 3), {}, (2, 2, 0, 1, False)),
    "2x2 windows, padded images": ((17, 2, 9, 8), (5, 2, 3, 3), {"padding": 1}, (2, 2, 0, 1, False)),
    "3x2 windows": ((19, 4, 10, 9), (6, 2, 3, 2), {"groups": 2}, ((3, 2), (3, 2), 0, 1, False)),
    "overlapping windows": ((70, 3, 30, 29), (8, 3, 3, 3), {"padding": 1}, (3, 2, 1, 1, True)),
    "few images": ((3, 3, 9, 11), (7, 3, 3, 3), {}, (2, 2, 0, 1, False)),
    "one image": ((3, 9, 11), (7, 3, 3, 3), {}, (2, 2, 0, 1, False)),
    "many channels": ((2, 20, 8, 8), (40, 20, 3, 3), {}, (2, 2, 0, 1, False)),
    "large filters": ((1, 4, 4, 4), (4, 2, 33, 33), {"padding": 16, "groups": 2}, (2, 2, 0, 1, False)),
    "three taps at once": ((16, 3, 32, 32), (16, 3, 3, 3), {}, (2, 2, 0, 1, False)),
    "three taps at once, padded": ((16, 2, 16, 16), (16, 2, 3, 3), {"padding": 1}, (2, 2, 0, 1, False)),
    "groups that share vectors": ((16, 16, 10, 10), (16, 4, 3, 3), {"groups": 4}, (2, 2, 0, 1, False)),
    "256 taps": ((2, 2, 18, 17), (3, 2, 1, 1), {}, (16, 1, 0, 1, False)),
}


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("case", POOLED)
def test_the_output_is_the_same_without_the_argmax(case, memory_format, dtype):
    """This holds for ties, NaNs, infinities, and the zeros of windows that pass no gradient, which are positive. A NaN
    may have the sign of either term, depending on the order that the compiler chooses."""
    input_size, weight_size, conv, pool = POOLED[case]
    input, weight = torch.randint(-2, 3, input_size).to(dtype), torch.randint(-1, 2, weight_size).to(dtype)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0], dtype=dtype)
    input = torch.where(torch.rand(input_size) < 0.01, special[torch.randint(4, input_size)], input)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    input.view(-1, *input_size[-3:])[0], weight[0] = -smallest, smallest  # their products are -0.0
    if input.dim() == 4:
        input = input.contiguous(memory_format=memory_format)
    options = (1, conv.get("padding", 0), 1, conv.get("groups", 1), *pool)
    output = ops.conv2d_relu_max_pool2d(input, weight, None, *options)
    expected, _ = ops.conv2d_relu_max_pool2d_with_argmax(input, weight, None, *options)
    assert output.stride() == expected.stride()
    numbers = [t.where(~t.isnan(), torch.nan).contiguous() for t in (output, expected)]
    assert torch.equal(*(t.view(torch.uint8) for t in numbers))
    assert (output == 0).any() and not output[output == 0].signbit().any()
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    same_bits([composed(input, weight, pool=dict(zip(names, pool, strict=True)), **conv)], [output])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("case", POOLED)
def test_sums_are_taken_in_the_order_of_the_single_ops(case, memory_format, dtype):
    input_size, weight_size, conv, pool = POOLED[case]
    tensors = [torch.randn(size).to(dtype) for size in (input_size, weight_size, weight_size[:1])]
    if len(input_size) == 4:
        tensors[0] = tensors[0].contiguous(memory_format=memory_format)
    names = ("pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation", "ceil_mode")
    options = conv | {"pool": dict(zip(names, pool, strict=True))}
    same_bits(results(partial(composed, **options), tensors), results(partial(fused, **options), tensors))
    same_bits(  # gradients of the parameters alone, as in a first layer
        results(partial(composed, tensors[0], **options), tensors[1:]),
        results(partial(fused, tensors[0], **options), tensors[1:]),
    )


def test_argmax_is_computed_where_a_gradient_is_wanted_and_nowhere_else():
    layer = pyops.nn.ConvReLUMaxPool2d(1, 4, 3, pool_kernel_size=2)
    x = torch.randn(2, 1, 8, 8)

    def called(function=layer):
        with KernelLog() as log:
            function(x)
        return log.ours

    without, with_argmax = {"conv2d_relu_max_pool2d"}, {"conv2d_relu_max_pool2d_with_argmax"}
    assert called() == with_argmax
    with torch.no_grad():
        assert called() == called(func.vmap(layer)) == without
        assert called(lambda x: func.jvp(layer, (x,), (x,))) >= with_argmax
    with torch.inference_mode():
        assert called() == without
    layer.requires_grad_(False)
    assert called() == called(func.vmap(layer)) == without
    assert called(func.grad(lambda x: layer(x).sum())) >= with_argmax


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kernel", [2, (3, 2)], ids=str)
@pytest.mark.parametrize("padding", [0, 1])
def test_blocks_of_images(padding, kernel, memory_format, dtype):
    """The sums have more than one chunk of K."""
    tensors = [torch.randn(size).to(dtype) for size in ((33, 17, 9, 11), (7, 17, 3, 3), (7,))]
    tensors[0] = tensors[0].contiguous(memory_format=memory_format)
    tensors[0][20, 5, 4, 3] = float("nan")
    pool = {"pool_kernel_size": kernel}
    same_bits(
        results(lambda *t: composed(*t, padding=padding, pool=pool), tensors),
        results(lambda *t: fused(*t, padding=padding, pool=pool), tensors),
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_many_chunks(memory_format):
    """There are more images than fit one chunk, or an image is larger than a chunk."""
    for size in ((70, 3, 30, 29), (3, 2, 190, 181)):
        tensors = [torch.randn(size).contiguous(memory_format=memory_format), torch.randn(8, size[1], 3, 3)]
        pool = {"pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1}
        same_bits(
            results(lambda *t: composed(*t, padding=1, pool=pool), tensors),  # noqa: B023
            results(lambda *t: fused(*t, padding=1, pool=pool), tensors),  # noqa: B023
        )


def test_empty_batch_and_unbatched():
    weight = torch.randn(4, 2, 3, 3)
    for input in (torch.randn(0, 2, 8, 8), torch.randn(2, 8, 8)):
        for pool in (None, {"pool_kernel_size": 2}):
            same_bits([composed(input, weight, pool=pool)], [fused(input, weight, pool=pool)])


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding):
    tensors = [torch.randn(2, 2, 8, 9), torch.randn(4, 2, 2, 4)]
    for pool in (None, {"pool_kernel_size": 2}):
        same_bits([composed(*tensors, padding=padding, pool=pool)], [fused(*tensors, padding=padding, pool=pool)])


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(autocast):
    tensors = [torch.randn(2, 2, 8, 9), torch.randn(4, 2, 3, 3), torch.randn(4)]
    with torch.autocast(tensors[0].device.type, autocast):
        for pool in (None, {"pool_kernel_size": 2}):
            expected, actual = (results(lambda *t, f=f: f(*t, pool=pool), tensors) for f in (composed, fused))  # noqa: B023
            assert actual[0].dtype == autocast and actual[1].dtype == torch.float32
            same_bits(expected, actual)
        linear = [torch.randn(3, 5), torch.randn(4, 5), torch.randn(4)]
        same_bits(results(lambda *t: F.relu(F.linear(*t)), linear), results(F.linear_relu, linear))


def test_errors_name_the_op():
    x, w = torch.randn(1, 2, 8, 8), torch.randn(4, 2, 3, 3)
    with pytest.raises(RuntimeError, match="linear_relu: mat1 and mat2 shapes cannot be multiplied"):
        F.linear_relu(torch.randn(2, 3), torch.randn(4, 5))
    with pytest.raises(RuntimeError, match="conv2d_relu: non-positive stride is not supported"):
        F.conv2d_relu(x, w, stride=0)
    with pytest.raises(RuntimeError, match=r"conv2d_relu_max_pool2d: .* expected input.* to have 2 channels"):
        F.conv2d_relu_max_pool2d(x[:, :1], w, pool_kernel_size=2)
    with pytest.raises(RuntimeError, match=r"conv2d_relu_max_pool2d: .*Output size is too small"):
        F.conv2d_relu_max_pool2d(x, w, pool_kernel_size=7)
    with pytest.raises(RuntimeError, match="conv2d_relu_max_pool2d: pad should be at most half"):
        F.conv2d_relu_max_pool2d(x, w, pool_kernel_size=2, pool_padding=2)
    with pytest.raises(RuntimeError, match="conv2d_relu_max_pool2d: pad should be at most half"):
        ops.conv2d_relu_max_pool2d_with_argmax(x, w, None, 1, 0, 1, 1, 2, 2, 2, 1, False)
    with pytest.raises(NotImplementedError, match="conv2d_relu"):
        F.conv2d_relu(x.long(), w.long())


def saved_bytes(function, *inputs):
    """The bytes of all storages that are kept for the backward."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs)
    return sum(storages.values())


def test_saved_bytes_of_the_convolutional_part_of_lenet():
    def convolutional(net, functional):
        if getattr(net, "fused", False):
            return lambda x: net.conv2(net.conv1(x))
        pool, relu = functional.max_pool2d, functional.relu
        return lambda x: pool(relu(net.conv2(pool(relu(net.conv1(x)), 2))), 2)

    x = torch.randn(1024, 1, 32, 32)
    stock = saved_bytes(convolutional(pyops.lenet.StockLeNet(), torch.nn.functional), x)
    drop_in = saved_bytes(convolutional(pyops.LeNet(), F), x)
    fused = saved_bytes(convolutional(pyops.LeNet(fused=True), F), x)
    assert stock > 45e6
    assert drop_in <= 0.77 * stock
    assert fused <= 13e6
