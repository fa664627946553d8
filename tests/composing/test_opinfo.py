"""Runs torch's own test data: its samples of arguments and of errors for the four functions and their modules."""

import pytest
import torch
from oracle import assert_close
from tensors import FLOATING, INTEGER
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import pyops

NAMES = ("relu", "linear", "conv2d", "max_pool2d")
OPINFOS = {name: next(op for op in op_db if op.name == f"nn.functional.{name}") for name in NAMES}
MODULES = ("ReLU", "Linear", "Conv2d", "MaxPool2d")
MODULE_INFOS = {name: next(m for m in module_db if m.module_cls is getattr(torch.nn, name)) for name in MODULES}

# Only every n-th sample of these functions is tried: max_pool2d has 1,440 samples, all combinations of a few values of
# each argument. 31 shares no divisor with the numbers of values, so every value occurs.
EVERY = {"max_pool2d": 31}


def samples(name, dtype):
    opinfo = OPINFOS[name]
    return list(opinfo.sample_inputs("cpu", dtype, requires_grad=dtype.is_floating_point))[:: EVERY.get(name, 1)]


def doubles(arguments):
    """Copies of the arguments, with the tensors in float64 as leaves of their own."""
    return [
        a.detach().double().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in arguments
    ]


def leaves(arguments):
    return [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]


def compare(ours, like, exact, our_leaves, exact_leaves):
    """Compares our results with stock's in the same dtype (for the strides) and in float64, and compares gradients."""
    ours, like, exact = (result if isinstance(result, tuple) else (result,) for result in (ours, like, exact))
    for result, stock, expected in zip(ours, like, exact, strict=True):
        assert (result.dtype, result.stride()) == (stock.dtype, stock.stride())
        close(result, expected)
    if our_leaves:
        grad = torch.randn_like(ours[0])
        our_grads = torch.autograd.grad(ours[0], our_leaves, grad)
        exact_grads = torch.autograd.grad(exact[0], exact_leaves, grad.double())
        for result, expected in zip(our_grads, exact_grads, strict=True):
            close(result, expected)


def close(result, expected):
    """Compares with the usual tolerances, where ten times the largest value replaces the sum of absolute values."""
    result, expected = result.detach(), expected.detach()
    if result.is_floating_point():
        largest = expected.abs().max() if expected.numel() else torch.zeros(())
        assert_close("result", result, expected, (10 * largest + 1).expand_as(expected))
    else:
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_samples(name, dtype):
    ours, stock = getattr(pyops.functional, name), getattr(torch.nn.functional, name)
    for sample in samples(name, dtype):
        arguments, options = [sample.input, *sample.args], sample.kwargs
        exact_arguments, exact_options = doubles(arguments), dict(zip(options, doubles(options.values()), strict=True))
        compare(
            ours(*arguments, **options),
            stock(*arguments, **options),
            stock(*exact_arguments, **exact_options),
            leaves([*arguments, *options.values()]),
            leaves([*exact_arguments, *exact_options.values()]),
        )


@pytest.mark.parametrize("dtype", INTEGER, ids=str)
@pytest.mark.parametrize("name", ["relu", "max_pool2d"])
def test_integer_samples(name, dtype):
    for sample in samples(name, dtype):
        arguments = [sample.input, *sample.args]
        ours = getattr(pyops.functional, name)(*arguments, **sample.kwargs)
        stock = getattr(torch.nn.functional, name)(*arguments, **sample.kwargs)
        torch.testing.assert_close(ours, stock, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_in_place_samples(dtype):
    """OpInfo itself would not notice an ignored inplace=True."""
    for sample in samples("relu", dtype):
        input = sample.input.detach().clone()
        assert pyops.functional.relu(input, inplace=True) is input
        assert torch.equal(input, torch.relu(sample.input))


ERRORS = [
    pytest.param(name, error, id=f"{name}-{i}")
    for name in NAMES
    if OPINFOS[name].error_inputs_func
    for i, error in enumerate(OPINFOS[name].error_inputs("cpu"))
]


@pytest.mark.parametrize(("name", "error"), ERRORS)
def test_errors(name, error):
    sample = error.sample_input
    with pytest.raises(error.error_type, match=error.error_regex):
        getattr(pyops.functional, name)(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, dtype, training):
    info = MODULE_INFOS[name]
    for case in info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training):
        constructor, forward = case.constructor_input, case.forward_input
        ours = getattr(pyops.nn, name)(*constructor.args, **constructor.kwargs).to(dtype).train(training)
        like, exact = (
            getattr(torch.nn, name)(*constructor.args, **constructor.kwargs).to(kind).train(training)
            for kind in (dtype, torch.float64)
        )
        like.load_state_dict(ours.state_dict())
        exact.load_state_dict(ours.state_dict())
        inputs = [*forward.args, *forward.kwargs.values()]
        exact_inputs = doubles(inputs)
        compare(
            *(
                layer(*(t.clone() for t in given))
                for layer, given in ((ours, inputs), (like, inputs), (exact, exact_inputs))
            ),
            [*leaves(inputs), *ours.parameters()],
            [*leaves(exact_inputs), *exact.parameters()],
        )


def test_module_errors():
    info = MODULE_INFOS["MaxPool2d"]
    cases = info.module_error_inputs_func(info, "cpu", torch.float32, requires_grad=False, training=True)
    assert cases
    for case in cases:
        constructor, forward = case.module_error_input.constructor_input, case.module_error_input.forward_input
        module = pyops.nn.MaxPool2d(*constructor.args, **constructor.kwargs)
        with pytest.raises(case.error_type, match=case.error_regex):
            module(*forward.args, **forward.kwargs)
