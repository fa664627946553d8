"""The fast call from `pyops.functional` to the operators (csrc/autograd/fast_call.cpp) takes the arguments that torch's
own call takes, and leaves arguments that it does not know to torch's call."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyops.functional import _bound

X, W, B = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 2, 2), torch.randn(4)
conv2d = torch.ops.pyops.conv2d.default


@pytest.mark.parametrize("options", [(1, 0, 1, 1), ([2, 1], (0, 1), [1], 1), ((1, 1), [0, 1, 1, 0], (2, 2), 1)])
@pytest.mark.parametrize("bias", [B, None, torch.nn.Parameter(B)])
def test_calls_as_torch_does(options, bias):
    assert torch.equal(_bound.conv2d(X, W, bias, *options), conv2d(X, W, bias, *options))


def test_several_results_and_none():
    values, argmax = _bound.max_pool2d(X, 2, 2, 0, 1, False)
    assert torch.equal(values, torch.nn.functional.max_pool2d(X, 2)) and argmax.dtype == torch.uint8
    assert _bound.relu_(X.clone()) is None


@pytest.mark.parametrize(
    "arguments",
    [
        (X, W),  # relies on defaults
        (X, W, B, 2**70),  # fits no int64
        (X, W, B, 1.0),
        (X, W, B, [1, 1.5]),
        (X, None, B, 1, 0, 1, 1),
        ("X", W, B, 1, 0, 1, 1),
        (X, W, B, 1, 0, 1, 1, 1),  # has one argument too many
        (X, W, B, -1, 0, 1, 1),  # is refused by the operator
    ],
)
def test_leaves_the_unknown_to_torch(arguments):
    def outcome(call):
        try:
            return call(*arguments).shape
        except Exception as error:
            return type(error), str(error)

    assert outcome(_bound.conv2d) == outcome(conv2d)


def test_modes_and_subclasses_see_the_operator():
    seen = []

    class FunctionMode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    class DispatchMode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    for mode in FunctionMode(), DispatchMode():
        with mode:
            _bound.relu(X)
        assert torch.ops.pyops.relu.default in seen
        seen.clear()

    class Subclass(torch.Tensor):
        pass

    assert type(_bound.relu(X.as_subclass(Subclass))) is Subclass
