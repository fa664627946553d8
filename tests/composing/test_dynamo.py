"""torch.compile(model, backend="pyops") runs stock models on our kernels, with stock's results."""

import copy
from collections import Counter

import pytest
import torch
from kernel_log import KernelLog
from models import FUSED, MODELS
from support_table import NETWORKS
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from twins import training_pass

import pyops
from pyops.dynamo import backend

FUNCTIONS = ("relu", "linear", "conv2d", "max_pool2d", "linear_relu", "conv2d_relu", "conv2d_relu_max_pool2d")


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()


@pytest.fixture
def calls():
    """Counts how often each function occurs in the graphs that the backend made."""
    counts = Counter()

    def counting(graph_module, example_inputs):
        run = backend(graph_module, example_inputs)
        graphs = [module.graph for module in graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
        targets = [node.target for graph in graphs for node in graph.nodes]
        for name in FUNCTIONS:
            if number := targets.count(getattr(pyops.functional, name)):
                counts[name] += number
        return run

    counting.counts = counts
    return counting


def same(model, *inputs, **options):
    """Checks that a compiled model trains like the eager one, to the rounding of float64, and leaves equal buffers."""
    compiled = copy.deepcopy(model)
    results = []
    for module, net in ((model, model), (compiled, torch.compile(compiled, **({"backend": "pyops"} | options)))):
        torch.manual_seed(1)
        results.append([training_pass(net, module, *inputs), dict(module.named_buffers())])
    torch.testing.assert_close(results[1], results[0])


def test_is_registered():
    """The package's entry point registers the backend, without an import."""
    assert "pyops" in torch._dynamo.list_backends()


@pytest.mark.composes('`torch.compile(backend="pyops")`', "linear_relu", NETWORKS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, training, calls):
    model = MODELS[name]().double().train(training)
    x = torch.randn(3, *model.shape, dtype=torch.float64)
    same(model, x, backend=calls, fullgraph=True)
    fused = {name: count for name, count in calls.counts.items() if "_" in name.replace("max_pool2d", "pool")}
    assert fused == FUSED[name]


@pytest.mark.composes('`torch.compile(backend="pyops")`')
@pytest.mark.parametrize("name", MODELS)
def test_models_run_on_our_kernels(name):
    """They run on none of stock's kernels, forward and backward."""
    log = KernelLog()

    def logged(graph_module, example_inputs):
        run = backend(graph_module, example_inputs)

        def run_logged(*args):
            with log:
                return run(*args)

        return run_logged

    model = MODELS[name]()
    output = torch.compile(model, backend=logged, fullgraph=True)(torch.randn(2, *model.shape, requires_grad=True))
    with log:
        output.sum().backward()
    assert log.stock == set()
    assert {"linear", "linear_backward"} < log.ours
    assert {"conv2d_backward", "conv2d_relu_max_pool2d_backward"} & log.ours


@pytest.mark.composes('`torch.compile(backend="pyops")`')
@pytest.mark.parametrize("name", MODELS)
def test_training_steps(name):
    """Ten steps of SGD lead to stock's parameters."""
    model = MODELS[name]().double()
    twin = copy.deepcopy(model)
    for module, net in ((model, model), (twin, torch.compile(twin, backend="pyops"))):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        torch.manual_seed(2)
        for _ in range(10):
            optimizer.zero_grad()
            scores = net(torch.randn(4, *module.shape, dtype=torch.float64))
            F.cross_entropy(scores, torch.tensor([0, 1, 2, 3])).backward()
            optimizer.step()
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=1e-9, atol=1e-9)


@pytest.mark.composes('`torch.compile(backend="pyops")`')
def test_a_changed_batch_size_is_not_compiled_again_when_dynamic():
    model = MODELS["AlexNet"]().double().eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("pyops")
    compiled = torch.compile(model, backend=counter, dynamic=True)
    for batch in (2, 3, 7, 5):
        x = torch.randn(batch, *model.shape, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


# ---- what is called how ----


class Calls(nn.Module):
    """A module that calls one function of tensors, with a weight for it."""

    def __init__(self, function, *weight):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(*weight, dtype=torch.float64)) if weight else None

    def forward(self, x):
        return self.function(x) if self.weight is None else self.function(x, self.weight)


def in_place(x):
    y = x * 1
    F.relu(y, inplace=True)
    return y


FORMS = {
    "F.relu": (F.relu, "relu"),
    "F.relu(inplace=True)": (in_place, "relu"),
    "torch.relu": (torch.relu, "relu"),
    "Tensor.relu": (lambda x: torch.Tensor.relu(x), "relu"),
    "x.relu": (lambda x: x.relu(), "relu"),
    "F.max_pool2d": (lambda x: F.max_pool2d(x, 2), "max_pool2d"),
    "F.max_pool2d by name": (lambda x: F.max_pool2d(input=x, kernel_size=(3, 2), stride=1, padding=1), "max_pool2d"),
    "torch.max_pool2d": (lambda x: torch.max_pool2d(x, [2], ceil_mode=True), "max_pool2d"),
    "nn.MaxPool2d": (nn.MaxPool2d(2, dilation=2), "max_pool2d"),
    "with indices": (lambda x: nn.MaxPool2d(2, return_indices=True)(x)[0], "max_pool2d"),
}


@pytest.mark.composes('`torch.compile(backend="pyops")`', "relu", "max_pool2d")
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, calls):
    function, name = FORMS[form]
    same(Calls(function), pyops.testing.gradcheck_input(2, 3, 6, 5), backend=calls, fullgraph=True)
    assert calls.counts == {name: 1}


WEIGHTED = {
    "F.linear": (F.linear, (4, 5), "linear"),
    "F.linear by name": (lambda x, w: F.linear(weight=w, input=x), (4, 5), "linear"),
    "a weight of one dimension": (F.linear, (5,), "linear"),
    "F.conv2d": (F.conv2d, (4, 3, 2, 2), "conv2d"),
    "torch.conv2d by name": (lambda x, w: torch.conv2d(x, w, groups=3, padding="same"), (3, 1, 2, 3), "conv2d"),
    "reflected": (lambda x, w: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), w), (4, 3, 3, 3), "conv2d"),
}


@pytest.mark.composes('`torch.compile(backend="pyops")`', "linear", "conv2d")
@pytest.mark.parametrize("form", WEIGHTED)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_forms_with_a_weight(form, calls):
    function, weight, name = WEIGHTED[form]
    same(Calls(function, *weight), torch.randn(2, 3, 6, 5, dtype=torch.float64), backend=calls, fullgraph=True)
    assert calls.counts == {name: 1}


def test_method_in_place(calls):
    def function(x):
        y = x * 1
        z = y.relu_()
        return y + torch.relu_(z - 0.5)

    same(Calls(function), pyops.testing.gradcheck_input(4, 5), backend=calls, fullgraph=True)


# ---- fusing ----


FUSIONS = {
    "conv, relu": (lambda x, w: F.conv2d(x, w, padding=1).relu(), {"conv2d_relu": 1}),
    "conv, relu in place": (lambda x, w: F.conv2d(x, w).relu_(), {"conv2d_relu": 1}),
    "conv, pool, relu in place": (lambda x, w: F.max_pool2d(F.conv2d(x, w), 2).relu_(), {"conv2d_relu_max_pool2d": 1}),
    "all options": (
        lambda x, w: F.max_pool2d(F.relu(F.conv2d(x, w, None, 1, 1, 2)), 3, 2, 1, dilation=1, ceil_mode=True),
        {"conv2d_relu_max_pool2d": 1},
    ),
    "conv, relu, pool with indices": (
        lambda x, w: F.max_pool2d(F.relu(F.conv2d(x, w)), 2, return_indices=True)[0],
        {"conv2d_relu": 1, "max_pool2d": 1},
    ),
    "relu used twice": (
        lambda x, w: (lambda y: F.max_pool2d(y, 2).sum() + y.sum())(F.relu(F.conv2d(x, w))),
        {"conv2d_relu": 1, "max_pool2d": 1},
    ),
    "conv used twice": (
        lambda x, w: (lambda y: F.relu(y) + y)(F.conv2d(x, w)),
        {"conv2d": 1, "relu": 1},
    ),
    "conv used detached": (
        lambda x, w: (lambda y: F.relu(y) * y.detach())(F.conv2d(x, w)),
        {"conv2d": 1, "relu": 1},
    ),
    "conv, pool": (lambda x, w: F.max_pool2d(F.conv2d(x, w), 2), {"conv2d": 1, "max_pool2d": 1}),
    "conv, pool, pool": (
        lambda x, w: F.max_pool2d(F.max_pool2d(F.conv2d(x, w), 2), 2),
        {"conv2d": 1, "max_pool2d": 2},
    ),
    "relu of the weight": (lambda x, w: F.conv2d(x, F.relu(w)), {"conv2d": 1, "relu": 1}),
}


@pytest.mark.composes('`torch.compile(backend="pyops")`', "conv2d_relu", "conv2d_relu_max_pool2d")
@pytest.mark.parametrize("case", FUSIONS)
def test_fusions(case, calls):
    function, expected = FUSIONS[case]
    same(Calls(function, 4, 3, 3, 3), torch.randn(2, 3, 9, 8, dtype=torch.float64), backend=calls, fullgraph=True)
    assert calls.counts == expected


def test_modes_that_change_in_between_are_kept(calls):
    """A ReLU outside of no_grad or autocast is not fused into a layer inside of it, and vice versa."""

    def without_gradient(x, w):
        y = F.conv2d(x, w)
        with torch.no_grad():
            z = F.relu(y)
        return z * y

    def constant(x, w):
        with torch.no_grad():
            y = F.conv2d(x, w)
        return F.relu(y) * x.sum() * w.sum()

    def only_relu_without_gradient(x, w):
        y = F.conv2d(x, w)
        with torch.no_grad():
            z = F.relu(y)
        return z + (x.sum() + w.sum())

    for function in (without_gradient, constant, only_relu_without_gradient):
        same(Calls(function, 4, 3, 3, 3), torch.randn(2, 3, 6, 6, dtype=torch.float64), backend=calls, fullgraph=True)
    assert calls.counts == {"conv2d": 3, "relu": 3}


def test_what_is_changed_in_between_is_read_before():
    def function(x, w):
        x = x * 1
        with torch.no_grad():
            y = F.conv2d(x, w)
            x.relu_()
            z = F.relu(y)
        return F.conv2d(x, w) * z

    same(Calls(function, 4, 3, 3, 3), torch.randn(2, 3, 6, 6, dtype=torch.float64), fullgraph=True)


def test_options_that_are_computed():
    """With dynamic shapes, the options may be computed from the sizes of the input."""

    def function(x, w):
        y = F.relu(F.conv2d(x, w, padding=x.shape[0] // 2))
        return F.max_pool2d(y, x.shape[-1] // 4)

    model = Calls(function, 4, 3, 3, 3)
    for size in ((2, 3, 8, 8), (4, 3, 12, 13)):
        same(model, torch.randn(size, dtype=torch.float64), fullgraph=True, dynamic=True)


# ---- what stays with stock ----


@pytest.mark.parametrize("dtype", [torch.complex128, torch.bfloat16, torch.float16, torch.int64], ids=str)
def test_dtypes(dtype, calls):
    def function(x):
        return F.linear(x, x[:2]) if dtype.is_complex else F.max_pool2d(x.unsqueeze(0), 2).relu()

    x = torch.randn(4, 6).to(dtype) if dtype.is_floating_point or dtype.is_complex else torch.randint(-9, 9, (4, 6))
    torch.testing.assert_close(torch.compile(function, backend=calls)(x), function(x))
    assert calls.counts == ({} if dtype.is_complex else {"max_pool2d": 1, "relu": 1})


def test_other_devices(calls):
    compiled = torch.compile(lambda x: F.relu(x), backend=calls)
    assert compiled(torch.empty(2, 3, device="meta")).device.type == "meta"
    assert calls.counts == {}


# ---- together with the rest ----


def test_autocast():
    model = MODELS["LeNet"]()
    x = torch.randn(2, 1, 32, 32)
    eager = pyops.convert(copy.deepcopy(model), fuse=True)
    compiled = torch.compile(model, backend="pyops", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = training_pass(eager, eager, x), training_pass(compiled, model, x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert actual[0].dtype == torch.bfloat16 and actual[2].dtype == torch.float32


def test_graph_breaks():
    """The parts before and after a graph break are compiled."""

    def function(x, w):
        y = F.conv2d(x, w).relu()
        if y.sum() > 0:
            y = F.max_pool2d(y, 2)
        torch._dynamo.graph_break()
        return F.relu(y - 0.1)

    same(Calls(function, 4, 3, 3, 3), torch.randn(2, 3, 6, 6, dtype=torch.float64))


def test_checkpoints_inside(calls):
    """Dynamo makes graphs of their own for checkpoints."""

    def function(x, w):
        return checkpoint(lambda x: F.conv2d(x, w).relu(), x, use_reentrant=False).relu()

    same(Calls(function, 4, 3, 3, 3), torch.randn(2, 3, 6, 6, dtype=torch.float64), backend=calls, fullgraph=True)
    assert calls.counts == {"conv2d_relu": 1, "relu": 1}


def test_transforms_inside():
    """The compiled program may use torch.func."""
    weight = torch.randn(2, 5, dtype=torch.float64)

    def function(x):
        def loss(row):
            return F.relu(F.linear(row, weight)).square().sum()

        return torch.func.vmap(torch.func.grad(loss))(x)

    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(function, backend="pyops", fullgraph=True)(x), function(x))


def test_hooks_see_what_they_see_in_eager():
    """If a layer has a hook, more than the next layer uses its result, so it is not fused."""

    def seen(compiled):
        torch.manual_seed(0)
        model, outputs = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double(), []
        model[0].register_forward_hook(lambda _, args, output: outputs.append(output.detach().clone()))
        net = torch.compile(model, backend="pyops") if compiled else model
        result = net(torch.ones(2, 5, dtype=torch.float64))
        return [*outputs, result]

    torch.testing.assert_close(seen(compiled=True), seen(compiled=False))


def test_errors_are_raised():
    compiled = torch.compile(MODELS["LeNet"](), backend="pyops")
    with pytest.raises(RuntimeError):
        compiled(torch.ones(1, 1, 28, 28))
