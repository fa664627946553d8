"""Wrong arguments are refused alike wherever a call is made: on meta and fake tensors, under autograd and by vmap.

`fuzzing.hostile` draws such calls; there is a test below for each kind of problem that it found.
"""

import pytest
import torch
from bad_calls import BACKWARD_CALLS, CALLS, describe
from fuzzing import hostile, hostile_calls
from torch import func
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import pyops

ops = torch.ops.pyops
x, w, b = torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3), torch.ones(4)
a, fc = torch.ones(2, 3), torch.ones(4, 3)


# ---- the checks of the operators, made by other kernels ----


def on_meta(op, arguments):
    return op(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments))


def on_fake(op, arguments):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return op(*arguments)


def on_symbols(op, arguments):
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:

        def fake(tensor):
            context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * tensor.dim())
            return mode.from_tensor(tensor, symbolic_context=context)

        return op(*(fake(t) if isinstance(t, torch.Tensor) else t for t in arguments))


def under_autograd(op, arguments):
    def leaf(argument):
        floating = isinstance(argument, torch.Tensor) and argument.is_floating_point()
        return argument.clone().requires_grad_() if floating else argument

    return op(*map(leaf, arguments))


def by_vmap(op, arguments):
    """Calls the operator by vmap over the first tensor, of which there are two samples."""
    first, *rest = arguments
    return func.vmap(lambda sample: op(sample, *rest))(torch.stack([first, first]))


WAYS = (on_meta, on_fake, on_symbols, under_autograd, by_vmap)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(("op", "arguments", "message"), [*CALLS, *BACKWARD_CALLS], ids=describe)
def test_the_same_refusal_everywhere(op, arguments, message, way):
    call = getattr(ops, op)
    with pytest.raises(Exception) as plain:
        call(*arguments)
    with pytest.raises(plain.type, match=message) as other:
        way(call, arguments)
    assert other.type is plain.type
    assert op in str(other.value)


def test_a_layout_that_no_kernel_takes():
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(NotImplementedError, match="pyops::relu"):
        ops.relu(sparse)
    mode = FakeTensorMode()
    with mode, pytest.raises(NotImplementedError, match="pyops::relu takes strided tensors, not Sparse"):
        ops.relu(mode.from_tensor(sparse))


def test_sizes_without_an_example():
    """Sizes that depend on data can be traced; the operator checks them when it runs."""

    class Selected(torch.nn.Module):
        def forward(self, images, chosen, weight):
            images = images[chosen.nonzero().squeeze(1)]
            return pyops.functional.max_pool2d(pyops.functional.conv2d(images, weight), 2)

    arguments = x, torch.tensor([False, True]), w
    program = torch.export.export(Selected(), arguments)
    assert torch.equal(program.module()(*arguments), Selected()(*arguments))


# ---- arguments that are no tensors ----


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("linear", (a, None)),
        ("linear", (None, fc)),
        ("linear_relu", (a, None, b)),
        ("conv2d", (x, None)),
        ("relu_backward", (None, a)),
        ("max_pool2d_backward", (None, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), (8, 8), 2)),
    ],
)
def test_none_for_a_tensor(op, arguments):
    for way in (lambda call, arguments: call(*arguments), *WAYS[:4]):
        with pytest.raises(TypeError, match=rf"{op}\(\): argument .* must be Tensor, not None"):
            way(getattr(ops, op), arguments)


@pytest.mark.parametrize("arguments", [(a, None), (a, 2), (a, [fc]), (a, fc, 1.5)], ids=str)
def test_a_linear_layer_of_no_tensors(arguments):
    for op in ("linear", "linear_relu"):
        with pytest.raises(TypeError):
            torch.nn.functional.linear(*arguments)
        with pytest.raises(TypeError, match=f"{op}: weight must be a Tensor, and bias a Tensor or None"):
            getattr(pyops.functional, op)(*arguments)


@pytest.mark.parametrize("options", [{"stride": 1.5}, {"stride": [None]}, {"dilation": "1"}, {"dilation": [1, None]}])
def test_same_padding_of_no_numbers(options):
    with pytest.raises((TypeError, RuntimeError), match=r"conv2d.*(stride|dilation)"):
        pyops.functional.conv2d(x, w, padding="same", **options)


# ---- autograd ----


def test_an_argmax_that_requires_grad():
    """max_pool2d_indices has no derivative, and autograd did not know that."""
    with pytest.raises(RuntimeError, match="max_pool2d_indices: expected argmax of dtype Byte"):
        ops.max_pool2d_indices(torch.ones(2, 3, 4, 4, requires_grad=True), (8, 8), 2)


def test_nothing_is_allocated_for_strides_that_are_refused():
    mask = torch.ones(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="dense tensor of shape"):
        ops.relu_mask_backward(torch.ones(2), mask, [2**60])


# ---- vmap ----


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("linear", (torch.ones(3), fc)),  # the samples are numbers, and together as many as the features
        ("max_pool2d", (torch.ones(3, 8, 8), 2)),  # the samples are planes without channels, and together an image
    ],
)
def test_samples_of_too_few_dimensions(op, arguments):
    samples, *rest = arguments
    for function in (getattr(ops, op), getattr(pyops.functional, op)):
        with pytest.raises(RuntimeError, match=op):
            function(samples[0], *rest)
        with pytest.raises(RuntimeError, match=op):
            func.vmap(lambda sample, function=function: function(sample, *rest))(samples)


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)])
@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (pyops.functional.linear, ((2, 3), (4, 3))),
        (pyops.functional.linear_relu, ((2, 3), (4, 3))),
        (pyops.functional.conv2d, ((2, 3, 8, 8), (4, 3, 3, 3))),
        (pyops.functional.conv2d, ((9, 3, 8, 8), (4, 3, 3, 3))),
        (lambda x, w: pyops.functional.max_pool2d(x * w, 2), ((2, 3, 8, 8), (8, 8))),
        (lambda x, w: pyops.functional.relu(x * w), ((2, 3), (2, 3))),
    ],
)
def test_no_samples(function, shapes, in_dims):
    tensors = [torch.ones(shape if d is None else (0, *shape)) for shape, d in zip(shapes, in_dims, strict=True)]
    shape = function(*map(torch.ones, shapes)).shape
    assert func.vmap(function, in_dims)(*tensors).shape == (0, *shape)
    grads = func.vmap(func.grad(lambda *t: function(*t).sum(), (0, 1)), in_dims)(*tensors)
    assert [grad.shape for grad in grads] == [(0, *shape) for shape in shapes]


# ---- the fuzzer ----


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_drawn_calls(first):
    for seed in range(first, first + 100):
        hostile.draw(seed).check()


def test_every_operator_is_drawn():
    """Calls of an operator are drawn from a valid call, which some function makes. Each operator also has a fake kernel
    and a batching rule."""
    for op, programs in hostile_calls.programs().items():
        assert programs, f"no function calls {op}"
        for key in ("Meta", "FuncTorchBatched"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pyops::{op}", key), (op, key)


def test_a_problem_as_a_test():
    source = hostile.draw(5).as_test()
    names = {}
    exec(source, names)
    names["test_hostile_5"]()
