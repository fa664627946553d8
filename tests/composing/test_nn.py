"""pyops.nn has torch's classes in everything but the kernels."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from kernel_log import KernelLog, kernels_of_training, run_backward

import pyops

CASES = [
    # Each entry holds the class, the constructor's arguments, and the shape of the input.
    ("ReLU", {}, (2, 3, 4)),
    ("ReLU", {"inplace": True}, (5,)),
    ("Linear", {"in_features": 4, "out_features": 3}, (2, 5, 4)),
    ("Linear", {"in_features": 4, "out_features": 3, "bias": False}, (4,)),
    ("Conv2d", {"in_channels": 2, "out_channels": 4, "kernel_size": 3}, (2, 2, 7, 6)),
    ("Conv2d", {"in_channels": 2, "out_channels": 4, "kernel_size": 3, "bias": False}, (2, 7, 6)),
    ("Conv2d", {"in_channels": 4, "out_channels": 6, "kernel_size": (3, 2), "groups": 2}, (2, 4, 7, 6)),
    (
        "Conv2d",
        {"in_channels": 1, "out_channels": 2, "kernel_size": 3, "stride": 2, "padding": (1, 2), "dilation": (2, 1)},
        (2, 1, 9, 9),
    ),
    ("Conv2d", {"in_channels": 2, "out_channels": 2, "kernel_size": (4, 3), "padding": "same"}, (1, 2, 6, 6)),
    ("Conv2d", {"in_channels": 2, "out_channels": 2, "kernel_size": 3, "padding": "valid"}, (1, 2, 6, 6)),
    *(
        (
            "Conv2d",
            {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": padding, "padding_mode": mode, **extra},
            (2, 2, 6, 7),
        )
        for mode in ("reflect", "replicate", "circular")
        for padding, extra in (((1, 2), {"stride": 2}), ("same", {"dilation": (2, 1)}))
    ),
    ("MaxPool2d", {"kernel_size": 2}, (2, 3, 6, 7)),
    ("MaxPool2d", {"kernel_size": (3, 2), "stride": (2, 1), "padding": 1, "dilation": (1, 2)}, (2, 3, 8, 7)),
    ("MaxPool2d", {"kernel_size": 3, "stride": 2, "ceil_mode": True}, (3, 8, 8)),
    ("MaxPool2d", {"kernel_size": 2, "return_indices": True}, (2, 3, 6, 6)),
]
NAMES = ("ReLU", "Linear", "Conv2d", "MaxPool2d")


def describe(value) -> str | None:
    return "-".join(f"{k}={v}" for k, v in value.items()).replace(" ", "") if isinstance(value, dict) else None


every_case = pytest.mark.parametrize(("name", "options", "shape"), CASES, ids=describe)


def build(name: str, options: dict) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch's layer and ours, made from the same seed."""
    torch.manual_seed(0)
    stock = getattr(torch.nn, name)(**options, **({"dtype": torch.float64} if name in ("Linear", "Conv2d") else {}))
    torch.manual_seed(0)
    ours = getattr(pyops.nn, name)(**options, **({"dtype": torch.float64} if name in ("Linear", "Conv2d") else {}))
    return stock, ours


def run(layer: torch.nn.Module, input: torch.Tensor) -> list[torch.Tensor]:
    """The outputs, the gradient of the input and the gradients of the parameters."""
    input = input.clone().requires_grad_()
    outputs = layer(input.clone())  # cloned because a leaf cannot be changed in place
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    run_backward(outputs[0])
    return [*outputs, input.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # stock makes a copy
@every_case
def test_computes_what_stock_computes(name, options, shape):
    stock, ours = build(name, options)
    input = pyops.testing.gradcheck_input(*shape).detach()
    torch.testing.assert_close(run(ours, input), run(stock, input))


@every_case
def test_runs_on_our_kernels_alone(name, options, shape):
    _, ours = build(name, options)
    with KernelLog() as log:
        run(ours, pyops.testing.gradcheck_input(*shape).detach())
    forward = "relu_" if options.get("inplace") else {"MaxPool2d": "max_pool2d"}.get(name, name.lower())
    assert kernels_of_training(forward) <= log.ours
    assert log.stock == set()


@every_case
def test_looks_like_stock(name, options, shape):
    stock, ours = build(name, options)
    assert repr(ours) == repr(stock)
    assert isinstance(ours, type(stock))
    assert vars(ours).keys() == vars(stock).keys()


@pytest.mark.composes("`state_dict` by `weights_only=True`")
@every_case
def test_same_initial_parameters_and_checkpoints_both_ways(name, options, shape):
    stock, ours = build(name, options)
    assert list(ours.state_dict()) == list(stock.state_dict())
    torch.testing.assert_close(ours.state_dict(), stock.state_dict(), rtol=0, atol=0)
    assert str(stock.load_state_dict(ours.state_dict())) == "<All keys matched successfully>"
    assert str(ours.load_state_dict(stock.state_dict())) == "<All keys matched successfully>"


@pytest.mark.composes("`deepcopy`, pickle, `torch.save` of whole modules")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@every_case
def test_copies(name, options, shape, duplicate):
    _, ours = build(name, options)
    twin = duplicate(ours)
    assert type(twin) is getattr(pyops.nn, name)
    assert {p.data_ptr() for p in twin.parameters()}.isdisjoint(p.data_ptr() for p in ours.parameters())
    input = pyops.testing.gradcheck_input(*shape).detach()
    torch.testing.assert_close(run(twin, input), run(ours, input), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_only_forward_is_ours(name):
    ours, stock = getattr(pyops.nn, name), getattr(torch.nn, name)
    added = set(vars(ours)) - {"__module__", "__doc__", "__static_attributes__", "__firstlineno__"}
    assert added == {"forward"}
    assert inspect.signature(ours) == inspect.signature(stock)


def test_inplace_relu_returns_its_input_changed():
    x = torch.tensor([-1.0, 2.0])
    assert pyops.nn.ReLU(inplace=True)(x) is x
    assert x.tolist() == [0.0, 2.0]
    y = torch.tensor([-1.0, 2.0])
    assert pyops.nn.ReLU()(y) is not y
    assert y.tolist() == [-1.0, 2.0]


@pytest.mark.parametrize("layer", [pyops.nn.Conv2d(3, 4, 3), pyops.nn.MaxPool2d(2), pyops.nn.ReLU()], ids=repr)
def test_channels_last_stays_channels_last(layer):
    x = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)
    assert layer.to(memory_format=torch.channels_last)(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("build_layer", "shape"),
    [
        (lambda nn: nn.Linear(4, 3), (2, 5)),
        (lambda nn: nn.Conv2d(3, 4, 3), (2, 2, 8, 8)),
        (lambda nn: nn.Conv2d(3, 4, 3), (8, 8)),
        (lambda nn: nn.Conv2d(3, 4, 3, padding=8, padding_mode="reflect"), (1, 3, 6, 6)),
        (lambda nn: nn.Conv2d(3, 4, 3, stride=2, padding="same"), (1, 3, 6, 6)),
        (lambda nn: nn.Conv2d(3, 4, 3, groups=2), (1, 3, 6, 6)),
        (lambda nn: nn.MaxPool2d(2, padding=2), (1, 3, 6, 6)),
        (lambda nn: nn.MaxPool2d(2), (6, 6)),
    ],
)
def test_raises_what_stock_raises(build_layer, shape):
    def error(nn):
        with pytest.raises(Exception) as info:
            build_layer(nn)(torch.ones(shape))
        return info.type

    assert error(pyops.nn) is error(torch.nn)


def test_a_saved_module_is_loaded_safely_once_its_classes_are_known():
    module = torch.nn.Sequential(
        pyops.nn.Conv2d(1, 2, 3), pyops.nn.ReLU(), pyops.nn.MaxPool2d(2), torch.nn.Flatten(), pyops.nn.Linear(8, 3)
    )
    file = io.BytesIO()
    torch.save(module, file)
    known = torch.serialization.get_safe_globals()
    try:
        torch.serialization.clear_safe_globals()
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        pyops.nn.add_safe_globals(torch.nn.Sequential, torch.nn.Flatten)
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(known)
    x = torch.randn(2, 1, 6, 6)
    assert repr(loaded) == repr(module)
    torch.testing.assert_close(loaded(x), module(x), rtol=0, atol=0)
