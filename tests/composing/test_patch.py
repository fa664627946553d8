"""pyops.patch runs torch's own functions on our kernels where we have them, and only inside of the context."""

import concurrent.futures
import copy
import threading
import warnings

import pytest
import torch
from kernel_log import KernelLog
from models import MODELS
from torch import nn
from torch.nn import functional as F
from twins import training_pass

import pyops

IMAGES = (2, 3, 6, 5)
CALLS = {
    "F.relu": lambda x: F.relu(x),
    "F.relu(inplace=True)": lambda x: F.relu(x * 1, inplace=True),
    "F.relu_": lambda x: F.relu_(x * 1),
    "torch.relu": lambda x: torch.relu(input=x),
    "torch.relu_": lambda x: torch.relu_(x * 1),
    "Tensor.relu": lambda x: x.relu(),
    "Tensor.relu_": lambda x: (x * 1).relu_(),
    "F.linear": lambda x: F.linear(x, x[0, 0, :4] * 2, bias=x[0, 0, :4, 0]),
    "F.conv2d": lambda x: F.conv2d(x, x[:, :, :2, :3] * 2, stride=(2, 1), padding=(1, 2)),
    "F.conv2d same": lambda x: F.conv2d(x, x[:, :, :3, :3] * 2, padding="same"),
    "torch.conv2d": lambda x: torch.conv2d(x, weight=x[:, :, :2, :3] * 2, groups=1, dilation=2),
    "F.max_pool2d": lambda x: F.max_pool2d(x, 2),
    "F.max_pool2d all": lambda x: F.max_pool2d(x, (3, 2), stride=1, padding=1, dilation=1, ceil_mode=True),
    "F.max_pool2d indices": lambda x: F.max_pool2d(x, 2, return_indices=True),
    "F.max_pool2d_with_indices": lambda x: F.max_pool2d_with_indices(x, 2, 1),
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, [2], ceil_mode=True),
    "nn.ReLU": lambda x: nn.ReLU()(x),
    "nn.MaxPool2d": lambda x: nn.MaxPool2d(2, return_indices=True)(x),
}


def in_thread(function):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def runs_ours() -> bool:
    """Whether torch.relu runs on our kernels at this moment."""
    with KernelLog() as log:
        torch.relu(torch.ones(1))
    assert len(log.ours | log.stock) == 1
    return log.ours == {"relu"}


@pytest.mark.composes("`pyops.patch()`")
@pytest.mark.parametrize("call", CALLS)
def test_every_function(call):
    """Results and gradients are stock's, and the kernels are ours."""
    function = CALLS[call]

    def results():
        x = pyops.testing.gradcheck_input(*IMAGES)
        outputs = function(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(1)
        return [*outputs, *torch.autograd.grad(outputs[0], x, torch.randn_like(outputs[0]))]

    torch.manual_seed(0)
    expected = results()
    torch.manual_seed(0)
    with KernelLog() as log, pyops.patch():
        actual = results()
    assert log.ours and log.stock == set()
    torch.testing.assert_close(actual, expected)


@pytest.mark.composes("`pyops.patch()`")
@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model = MODELS[name]().double()
    x = torch.randn(3, *model.shape, dtype=torch.float64)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    expected = training_pass(model, model, x)
    torch.manual_seed(1)
    with KernelLog() as log, pyops.patch():
        actual = training_pass(twin, twin, x)
    assert log.stock == set()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(dict(twin.named_buffers()), dict(model.named_buffers()))


def test_in_place_returns_its_argument():
    x = torch.tensor([-1.0, 2.0])
    with pyops.patch():
        assert x.relu_() is x and F.relu(x, inplace=True) is x
    assert x.tolist() == [0.0, 2.0]


@pytest.mark.composes("`pyops.patch()` nests, ends with an exception, holds for its thread")
def test_ends_with_the_block_and_nests():
    assert not runs_ours()
    mode = pyops.patch()
    with mode:
        assert runs_ours()
        with pyops.patch(), mode:
            assert runs_ours()
        assert runs_ours()
    assert not runs_ours()
    with mode:
        assert runs_ours()
    assert not runs_ours()


@pytest.mark.composes("`pyops.patch()` nests, ends with an exception, holds for its thread")
def test_ends_with_an_exception():
    with pytest.raises(ZeroDivisionError), pyops.patch():
        raise ZeroDivisionError
    assert not runs_ours()
    with pytest.raises(RuntimeError), pyops.patch():
        F.conv2d(torch.ones(1, 2, 3, 3), torch.ones(1, 3, 3, 3))
    assert not runs_ours()


@pytest.mark.composes("`pyops.patch()` nests, ends with an exception, holds for its thread")
def test_holds_for_its_thread_only():
    with pyops.patch():
        assert not in_thread(runs_ours)
        assert runs_ours()


@pytest.mark.composes("`pyops.patch()` nests, ends with an exception, holds for its thread")
def test_threads_do_not_disturb_each_other():
    """Eight threads enter and leave one context at different times."""
    mode, barrier = pyops.patch(), threading.Barrier(8)

    def work(i):
        barrier.wait()
        seen = []
        for step in range(50):
            if (i + step) % 3:
                with mode:
                    seen.append(runs_ours())
            else:
                seen.append(not runs_ours())
        return all(seen)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


# ---- what stays with stock ----


class Tagged(torch.Tensor):
    """A subclass that records which functions it is passed to."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


STOCK = {
    "complex": lambda: F.linear(torch.ones(2, 3, dtype=torch.complex64), torch.ones(4, 3, dtype=torch.complex64)),
    "complex convolution": lambda: F.conv2d(
        torch.ones(1, 1, 3, 3, dtype=torch.complex64), torch.ones(1, 1, 2, 2, dtype=torch.complex64)
    ),
    "integer linear": lambda: F.linear(torch.ones(2, 3, dtype=torch.int64), torch.ones(4, 3, dtype=torch.int64)),
    "sparse": lambda: torch.relu(torch.eye(3).to_sparse()).to_dense(),
    "nested": lambda: torch.relu(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])).unbind()[1],
    "quantized": lambda: torch.relu(torch.quantize_per_tensor(torch.randn(3), 0.1, 2, torch.quint8)).dequantize(),
    "other device": lambda: torch.relu(torch.empty(3, device="meta")).shape,
    "subclass": lambda: torch.relu(torch.randn(3).as_subclass(Tagged)),
    "other functions": lambda: F.conv1d(torch.ones(1, 1, 5), torch.ones(1, 1, 2)) + F.relu6(torch.ones(1)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", STOCK)
def test_stock_does_what_we_have_no_kernels_for(case):
    torch.manual_seed(0)
    expected = STOCK[case]()
    torch.manual_seed(0)
    with KernelLog() as log, pyops.patch():
        actual = STOCK[case]()
    assert log.ours == set()
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual, expected)


def test_a_subclass_keeps_its_own_say():
    Tagged.seen.clear()
    with pyops.patch():
        F.linear(torch.ones(2, 3), torch.ones(4, 3).as_subclass(Tagged))
    assert F.linear in Tagged.seen


def test_errors_are_stocks():
    bad = (torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), pyops.patch():
        F.linear(*bad)
    with pytest.raises(TypeError), pyops.patch():
        F.relu(torch.ones(1), no_such_option=True)
    with pytest.raises(NotImplementedError), pyops.patch():
        F.relu(torch.ones(1, dtype=torch.bool).cfloat())


# ---- together with the rest ----


def test_autocast():
    x, weight = torch.randn(2, 3), torch.randn(4, 3, requires_grad=True)
    with pyops.patch(), torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, weight)
    assert y.dtype == torch.bfloat16 and "pyops" in y.grad_fn.name()


def test_transforms():
    x = torch.randn(3, 4, dtype=torch.float64)

    def loss(row):
        return F.relu(row).pow(3).sum()

    expected = torch.func.vmap(torch.func.hessian(loss))(x)
    with KernelLog() as log, pyops.patch():
        actual = torch.func.vmap(torch.func.hessian(loss))(x)
    assert "relu" in log.ours
    torch.testing.assert_close(actual, expected)


def test_attention():
    """torch calls its linear layers inside of a function of its own, which is not patched."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = training_pass(lambda x: attention(x, x, x)[0], attention, x)
    with pyops.patch():
        actual = training_pass(lambda x: attention(x, x, x)[0], attention, x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "pyops"])
def test_compiled_code(backend):
    torch._dynamo.reset()
    model = MODELS["LeNet"]().double()
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    expected = training_pass(model, model, x)
    compiled = torch.compile(copy.deepcopy(model), backend=backend)
    with pyops.patch():
        patched = training_pass(compiled, compiled, x)
    torch.testing.assert_close(patched, expected)
    torch.testing.assert_close(training_pass(compiled, compiled, x), expected)


def test_scripted_code():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # only some versions of torch warn
        scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
    x = torch.randn(4, 3)
    expected = scripted(x)
    with pyops.patch():
        torch.testing.assert_close(scripted(x), expected)
