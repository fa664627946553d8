"""Derivatives are right in every mode and order, only those asked for are computed, and only what is needed is kept.

The values of first gradients are compared with stock's in the test file of each op.
"""

import gc
import weakref
from functools import partial

import pytest
import torch
from tensors import random
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import pyops
from pyops import functional as F
from pyops.testing import gradcheck_input

ops = torch.ops.pyops
POOL = {"kernel_size": (3, 2), "stride": (2, 1), "padding": 1, "dilation": (1, 2), "ceil_mode": True}
POOL_ARGS = tuple(POOL.values())
SHAPES = {"linear": [(3, 4), (5, 4), (5,)], "conv2d": [(2, 3, 5, 5), (4, 3, 3, 3), (4,)]}  # input, weight, bias


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def relu_op_in_place(x):
    x = x * 1
    ops.relu_(x)
    return x


# ---- gradcheck ----

CASES = {
    "relu": (F.relu, lambda: [gradcheck_input(3, 5)]),
    "relu_apply": (pyops.autograd.ReLU.apply, lambda: [gradcheck_input(7)]),
    "relu_op": (ops.relu, lambda: [gradcheck_input(2, 3)]),
    "relu_with_mask_op": (lambda x: ops.relu_with_mask(x)[0], lambda: [gradcheck_input(2, 3)]),
    "relu_in_place": (lambda x: F.relu(x * 1, inplace=True), lambda: [gradcheck_input(2, 3)]),
    "relu_op_in_place": (relu_op_in_place, lambda: [gradcheck_input(2, 3)]),
    "linear": (F.linear, lambda: [leaf(2, 3, 4), leaf(5, 4), leaf(5)]),
    "linear_no_bias": (F.linear, lambda: [leaf(3, 4), leaf(5, 4)]),
    "linear_1d": (F.linear, lambda: [leaf(4), leaf(5, 4), leaf(5)]),
    "linear_apply": (pyops.autograd.Linear.apply, lambda: [leaf(3, 4), leaf(5, 4), leaf(5)]),
    "linear_batched_op": (ops.linear_batched, lambda: [leaf(2, 3, 4), leaf(2, 5, 4), leaf(2, 5)]),
    "linear_batched_op_of_vectors": (ops.linear_batched, lambda: [leaf(2, 4), leaf(2, 5, 4)]),
    "linear_op": (ops.linear, lambda: [leaf(3, 4), leaf(5, 4), leaf(5)]),
    "conv2d": (lambda *t: F.conv2d(*t, padding=1), lambda: [leaf(2, 2, 4, 3), leaf(3, 2, 3, 3), leaf(3)]),
    "conv2d_strided": (
        lambda *t: F.conv2d(*t, stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        lambda: [leaf(1, 2, 5, 4), leaf(2, 2, 3, 2), leaf(2)],
    ),
    "conv2d_groups": (lambda *t: F.conv2d(*t, groups=2), lambda: [leaf(2, 4, 3, 3), leaf(4, 2, 2, 2)]),
    "conv2d_same": (lambda *t: F.conv2d(*t, padding="same"), lambda: [leaf(1, 1, 4, 3), leaf(2, 1, 2, 4), leaf(2)]),
    "conv2d_unbatched": (F.conv2d, lambda: [leaf(2, 4, 3), leaf(3, 2, 2, 2), leaf(3)]),
    "conv2d_channels_last": (
        lambda x, w: F.conv2d(x.to(memory_format=torch.channels_last), w, padding=1),
        lambda: [leaf(2, 2, 3, 3), leaf(2, 2, 3, 3)],
    ),
    "conv2d_apply": (pyops.autograd.Conv2d.apply, lambda: [leaf(1, 2, 3, 3), leaf(2, 2, 2, 2), leaf(2)]),
    "conv2d_op": (ops.conv2d, lambda: [leaf(1, 2, 3, 3), leaf(2, 2, 2, 2), leaf(2)]),
    "linear_relu": (F.linear_relu, lambda: [leaf(3, 4), leaf(5, 4), leaf(5)]),
    "linear_relu_apply": (pyops.autograd.LinearReLU.apply, lambda: [leaf(3, 4), leaf(5, 4), leaf(5)]),
    "conv2d_relu": (lambda *t: F.conv2d_relu(*t, padding=1), lambda: [leaf(2, 2, 4, 3), leaf(3, 2, 3, 3), leaf(3)]),
    "conv2d_relu_apply": (pyops.autograd.Conv2dReLU.apply, lambda: [leaf(1, 2, 3, 3), leaf(2, 2, 2, 2), leaf(2)]),
    "conv2d_relu_max_pool2d": (
        lambda *t: F.conv2d_relu_max_pool2d(*t, padding=1, pool_kernel_size=3, pool_stride=2, pool_padding=1),
        lambda: [leaf(2, 2, 4, 3), leaf(3, 2, 3, 3), leaf(3)],
    ),
    "conv2d_relu_max_pool2d_apply": (
        lambda *t: pyops.autograd.Conv2dReLUMaxPool2d.apply(*t, 1, 0, 1, 1, 2, 2, 0, 1, False)[0],
        lambda: [leaf(1, 2, 5, 5), leaf(2, 2, 2, 2), leaf(2)],
    ),
    "conv2d_relu_max_pool2d_op": (
        lambda *t: ops.conv2d_relu_max_pool2d(*t, 1, 0, 1, 1, 2, 2, 0, 1, False),
        lambda: [leaf(1, 2, 5, 5), leaf(2, 2, 2, 2), leaf(2)],
    ),
    "conv2d_relu_max_pool2d_with_argmax_op": (
        lambda *t: ops.conv2d_relu_max_pool2d_with_argmax(*t, 1, 0, 1, 1, 2, 2, 0, 1, False)[0],
        lambda: [leaf(1, 2, 5, 5), leaf(2, 2, 2, 2), leaf(2)],
    ),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), lambda: [gradcheck_input(2, 2, 4, 5)]),
    "max_pool2d_overlapping": (lambda x: F.max_pool2d(x, **POOL), lambda: [gradcheck_input(1, 2, 6, 5)]),
    "max_pool2d_unbatched": (lambda x: F.max_pool2d(x, **POOL), lambda: [gradcheck_input(2, 6, 5)]),
    "max_pool2d_indices": (
        lambda x: F.max_pool2d(x, 3, 2, return_indices=True)[0],
        lambda: [gradcheck_input(1, 1, 5, 5)],
    ),
    "max_pool2d_many_taps": (lambda x: F.max_pool2d(x, (2, 128), 1), lambda: [gradcheck_input(1, 1, 3, 130)]),
    "max_pool2d_apply": (lambda x: pyops.autograd.MaxPool2d.apply(x, 2)[0], lambda: [gradcheck_input(1, 1, 4, 4)]),
    "max_pool2d_op": (lambda x: ops.max_pool2d(x, 2)[0], lambda: [gradcheck_input(1, 1, 4, 4)]),
}
every_case = pytest.mark.parametrize(("function", "inputs"), CASES.values(), ids=CASES)


@pytest.mark.composes("`gradcheck`: reverse and forward mode, batched")
@every_case
def test_gradcheck(function, inputs):
    """Checks reverse and forward mode, also batched by vmap (which torch refuses for forward mode of in-place ops)."""
    batched_forward = function is not relu_op_in_place
    assert gradcheck(
        function, inputs(), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=batched_forward
    )


@pytest.mark.composes("`gradgradcheck`: reverse over reverse, forward over reverse, batched")
@every_case
def test_gradgradcheck(function, inputs):
    """Checks second derivatives, in reverse over reverse and forward over reverse mode."""
    assert gradgradcheck(function, inputs(), check_fwd_over_rev=True, check_batched_grad=True)


def backward_cases():
    """Direct calls of the backward ops, which are differentiable in every tensor that they take."""
    argmax = ops.max_pool2d(torch.randn(1, 2, 6, 5), *POOL_ARGS)[1]
    mask = [True, True, True]
    conv = ((2, 4, 5, 5), (6, 2, 3, 3), (2, 1), (1, 0), 1, 2)
    grad = ops.conv2d(torch.zeros(conv[0]), torch.zeros(conv[1]), None, *conv[2:])
    return {
        "relu_backward": (lambda g: ops.relu_backward(g, torch.randn(3, 4).double()), [leaf(3, 4)]),
        "relu_mask_backward": (
            lambda g: ops.relu_mask_backward(g, torch.tensor([0b0110_1010_0101]), [4, 1]),
            [leaf(3, 4)],
        ),
        "linear_backward": (lambda *t: ops.linear_backward(*t, mask), [leaf(2, 3), leaf(2, 4), leaf(3, 4)]),
        "linear_batched_backward": (
            lambda *t: ops.linear_batched_backward(*t, mask),
            [leaf(2, 3, 5), leaf(2, 3, 4), leaf(2, 5, 4)],
        ),
        "conv2d_backward": (
            lambda *t: ops.conv2d_backward(*t, *conv, mask),
            [leaf(*grad.shape), leaf(*conv[0]), leaf(*conv[1])],
        ),
        "max_pool2d_backward": (
            lambda g: ops.max_pool2d_backward(g, argmax, (6, 5), *POOL_ARGS),
            [leaf(*argmax.shape)],
        ),
        "max_pool2d_gather": (lambda x: ops.max_pool2d_gather(x, argmax, *POOL_ARGS), [leaf(1, 2, 6, 5)]),
    }


@pytest.mark.parametrize("op", backward_cases())
def test_gradcheck_of_backward_ops(op):
    function, inputs = backward_cases()[op]
    fixed = torch.get_rng_state()

    def seeded(*tensors):
        torch.set_rng_state(fixed)
        return function(*tensors)

    assert gradcheck(seeded, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(seeded, inputs)


@pytest.mark.composes("forward mode by dual numbers")
@pytest.mark.parametrize("which", ["input", "weight", "bias"])
@pytest.mark.parametrize(("op", "shapes"), SHAPES.items())
def test_forward_mode_by_one_tensor(op, shapes, which):
    """The output's tangent is right if only one of the tensors has a tangent, whichever it is."""
    primals = [torch.randn(s, dtype=torch.float64) for s in shapes]
    i = ["input", "weight", "bias"].index(which)
    tangent = torch.randn_like(primals[i])

    def tangent_of(function):
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(p, tangent) if j == i else p for j, p in enumerate(primals)]
            return forward_ad.unpack_dual(function(*dual)).tangent

    expected = tangent_of(getattr(torch.nn.functional, op))
    torch.testing.assert_close(tangent_of(getattr(F, op)), expected)
    torch.testing.assert_close(tangent_of(getattr(ops, op)), expected)


# ---- only the gradients asked for are computed ----


class CallLog(TorchDispatchMode):
    """Records the arguments and results of the calls of one op."""

    def __init__(self, op):
        super().__init__()
        self.op, self.calls = getattr(ops, op).default, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is self.op:
            self.calls.append((args, result))
        return result


MASKS = [(i, w, b) for i in (False, True) for w in (False, True) for b in (False, True) if i or w or b]


@pytest.mark.parametrize(("mask", "bias"), [(m, b) for m in MASKS for b in (True, False) if b or not m[2]], ids=str)
@pytest.mark.parametrize(("op", "shapes"), SHAPES.items())
def test_backward_computes_what_is_asked_for(op, shapes, bias, mask):
    tensors = [torch.randn(s).requires_grad_(wanted) for s, wanted in zip(shapes, mask, strict=True)]
    with CallLog(f"{op}_backward") as log:
        getattr(F, op)(*tensors[: 3 if bias else 2]).sum().backward()
    assert [t.grad is not None for t in tensors] == list(mask)
    ((args, gradients),) = log.calls
    assert tuple(args[-1]) == mask
    assert tuple(g is not None for g in gradients) == mask
    assert args[1] is None or mask[1], "input is there for the gradient of weight only"
    assert args[2] is None or mask[0], "weight is there for the gradient of input only"


@pytest.mark.parametrize("function", [lambda x: F.relu(x), lambda x: F.max_pool2d(x, 2), lambda x: F.conv2d(x, x)])
def test_nothing_is_recorded_where_no_gradient_is_wanted(function):
    x = torch.randn(1, 1, 4, 4)
    assert function(x).grad_fn is None
    with torch.no_grad():
        assert function(x.requires_grad_()).grad_fn is None
    with torch.inference_mode():
        assert function(x).is_inference()


# ---- saved tensors ----


def saved_by(function):
    """The tensors that `function` keeps for backward, and its result."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = function()
    return kept, result


def is_one_of(tensor, others):
    return any(tensor.data_ptr() == other.data_ptr() for other in others)


def test_relu_saves_a_bit_for_each_element():
    x = torch.randn(100, requires_grad=True)
    for function in (F.relu, ops.relu, pyops.nn.ReLU(), lambda x: ops.relu_with_mask(x)[0]):
        kept, output = saved_by(lambda function=function: function(x))
        assert [t.nbytes for t in kept] == [16] and not is_one_of(kept[0], [x, output])
    kept, output = saved_by(lambda: pyops.autograd.ReLU.apply(x))
    assert len(kept) == 1 and is_one_of(kept[0], [output])


@pytest.mark.parametrize("where", ["contiguous", "channels_last", "sliced"])
def test_max_pool2d_saves_one_byte_for_each_output(where):
    x = random((2, 3, 8, 8), torch.float32, where).requires_grad_()
    for function in (F.max_pool2d, lambda *a: ops.max_pool2d(*a)[0]):
        kept, output = saved_by(lambda function=function: function(x, 2))
        assert [t.nbytes for t in kept] == [output.numel()]
        assert kept[0].dtype == torch.uint8 and not is_one_of(kept[0], [x, output])


@pytest.mark.parametrize(("op", "shapes"), SHAPES.items())
def test_linear_and_conv2d_save_what_the_gradients_need(op, shapes):
    for function in (getattr(F, op), getattr(ops, op)):
        for mask in MASKS:
            x, w, b = (torch.randn(s).requires_grad_(wanted) for s, wanted in zip(shapes, mask, strict=True))
            kept, _ = saved_by(lambda t=(x, w, b), function=function: function(*t))
            expected = ([x] if mask[1] else []) + ([w] if mask[0] else [])
            assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in expected)
            assert all(is_one_of(t, expected) for t in kept)


def test_nothing_outlives_the_graph():
    """A tensor kept as an attribute of a Function's context would keep the graph alive as a cycle."""
    gc.disable()
    try:
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        w = torch.randn(4, 3, 3, 3, requires_grad=True)
        fc = torch.randn(5, 4 * 9, requires_grad=True)
        hidden = [F.conv2d(x, w)]
        hidden.append(F.relu(hidden[-1]))
        hidden.append(F.max_pool2d(hidden[-1], 2))
        hidden.append(F.linear(hidden[-1].flatten(1), fc))
        references = [weakref.ref(t) for t in hidden]
        hidden.clear()
        assert [r() for r in references] == [None] * 4
    finally:
        gc.enable()


# ---- the rest of autograd ----


def test_nodes_are_named_by_the_op_that_they_call():
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    assert F.relu(x).grad_fn.name() == "pyops::relu_mask_backward"
    assert F.conv2d(x, x).grad_fn.name() == "pyops::conv2d_backward"


def test_long_graphs_are_freed_without_recursion():
    x = torch.randn(1, 1, 1, 1, requires_grad=True)
    y = x
    for _ in range(100_000):
        y = F.relu(y)
    del y
    y = x
    for _ in range(100_000):
        y = F.max_pool2d(y, 1)
    y.sum().backward()
    assert x.grad.item() == 1


def test_argmax_and_indices_have_no_gradient():
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    assert not F.max_pool2d(x, 2, return_indices=True)[1].requires_grad
    assert not ops.max_pool2d(x, 2)[1].requires_grad
    assert not pyops.autograd.MaxPool2d.apply(x, 2)[1].requires_grad
    pooled, argmax = ops.conv2d_relu_max_pool2d_with_argmax(x, x[..., 1:, 1:], None, 1, 0, 1, 1, 2, 2, 0, 1, False)
    assert pooled.requires_grad and not argmax.requires_grad


def test_integers_have_no_gradient():
    x = torch.ones(1, 1, 4, 4, dtype=torch.int32)
    assert F.relu(x).grad_fn is None and F.max_pool2d(x, 2).grad_fn is None


def test_backward_twice_needs_retain_graph():
    x = torch.randn(3, requires_grad=True)
    y = F.relu(x)
    y.sum().backward(retain_graph=True)
    y.sum().backward(retain_graph=False)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@pytest.mark.composes("a change in place of what is saved raises", "relu", "linear_relu")
def test_saved_output_that_is_overwritten_is_noticed():
    x = torch.randn(3, requires_grad=True)
    for function in (pyops.autograd.ReLU.apply, lambda x: F.linear_relu(x, torch.eye(3))):
        y = function(x)
        y += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_output_of_relu_may_be_overwritten():
    """The backward keeps a mask, not the output itself."""
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    y = F.relu(x)
    y += 1
    y.sum().backward()
    assert x.grad.tolist() == [0, 1]


def test_results_of_a_single_image_may_be_overwritten():
    """Neither the output nor a gradient that is differentiated again is a view of a batch of one."""
    x, w = torch.randn(2, 5, 5, requires_grad=True), torch.randn(3, 2, 3, 3, requires_grad=True)
    pool = partial(F.conv2d_relu_max_pool2d, pool_kernel_size=2)
    for function in (F.conv2d, pool):
        y = function(x, w)
        y.mul_(2)
        (g,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        g.mul_(2)
        g.sum().backward()
