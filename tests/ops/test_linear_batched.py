"""linear_batched gives the output and gradients of every sample the bits that linear gives."""

import pytest
import torch
from tensors import FLOATING, LAYOUTS, random

pytestmark = pytest.mark.every_device

ops = torch.ops.pyops
MASKS = [[True, True, True], [True, False, False], [False, True, False], [False, False, True], [False, True, True]]


def operands(samples, leading, in_features, out_features, dtype=torch.float32, where="contiguous"):
    return [
        random((samples, *leading, in_features), dtype, where),
        random((samples, out_features, in_features), dtype, where),
        random((samples, out_features), dtype, where),
    ]


def assert_same_as_linear(input, weight, bias):
    output = ops.linear_batched(input, weight, bias)
    assert torch.equal(output, torch.stack([ops.linear(*each) for each in zip(input, weight, bias, strict=True)]))
    without_bias = ops.linear_batched(input, weight)
    assert torch.equal(without_bias, torch.stack([ops.linear(*each) for each in zip(input, weight, strict=True)]))
    grad = random(output.shape, output.dtype)
    for mask in MASKS:
        actual = ops.linear_batched_backward(grad, input, weight, mask)
        rows = [ops.linear_backward(*each, mask) for each in zip(grad, input, weight, strict=True)]
        for wanted, result, expected in zip(mask, actual, zip(*rows, strict=True), strict=True):
            assert torch.equal(result, torch.stack(expected)) if wanted else result is None


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3)], ids=str)
@pytest.mark.parametrize("samples", [1, 5])
def test_leading_dimensions(samples, leading, dtype):
    assert_same_as_linear(*operands(samples, leading, 20, 11, dtype))


@pytest.mark.parametrize("where", LAYOUTS)
def test_layouts(where):
    assert_same_as_linear(*operands(3, (4,), 9, 6, where=where))


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_share_the_samples_or_each_sample(threads):
    torch.set_num_threads(threads)
    assert_same_as_linear(*operands(3, (17,), 130, 90))
    assert_same_as_linear(*operands(16, (), 130, 90))


@pytest.mark.parametrize("sizes", [(0, (2,), 3, 4), (2, (0,), 3, 4), (2, (3,), 0, 4), (2, (3,), 4, 0)], ids=str)
def test_empty(sizes):
    input, weight, bias = operands(*sizes)
    output = ops.linear_batched(input, weight, bias)
    expected = torch.einsum("b...i,boi->b...o", input, weight) + bias[:, None]
    torch.testing.assert_close(output, expected)
    grads = ops.linear_batched_backward(torch.ones_like(output), input, weight, [True] * 3)
    assert [grad.shape for grad in grads] == [input.shape, weight.shape, bias.shape]
    if not input.numel():
        assert not grads[1].any()
