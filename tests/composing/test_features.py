"""Everything that torch does with layers and their graphs works as with stock's, for every function and layer."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from kernel_log import KernelLog
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from twins import TWINS, lenets, training_pass

import pyops
from pyops import functional as F

every_twin = pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS)
both_lenets = pytest.mark.parametrize("fused", [False, True], ids=["layers", "fused"])
LAYERS = {
    "ReLU": (lambda nn: nn.ReLU(), (2, 3)),
    "Linear": (lambda nn: nn.Linear(3, 4), (2, 3)),
    "Conv2d": (lambda nn: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 6, 5)),
    "MaxPool2d": (lambda nn: nn.MaxPool2d(2), (2, 3, 6, 5)),
    "LinearReLU": (lambda nn: nn.LinearReLU(3, 4), (2, 3)),
    "ConvReLU2d": (lambda nn: nn.ConvReLU2d(3, 4, 3), (2, 3, 6, 5)),
    "ConvReLUMaxPool2d": (lambda nn: nn.ConvReLUMaxPool2d(3, 4, 3, pool_kernel_size=2), (2, 3, 6, 5)),
}
every_layer = pytest.mark.parametrize(("build", "shape"), LAYERS.values(), ids=LAYERS)
WEIGHTED = {name: LAYERS[name] for name in LAYERS if name not in ("ReLU", "MaxPool2d")}
every_weighted_layer = pytest.mark.parametrize(("build", "shape"), WEIGHTED.values(), ids=WEIGHTED)


def gradients(function, tensors):
    """The output, and the gradients of leaves made from the tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = function(*leaves)
    output.pow(3).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def stock(layer, x):
    """The result of one of our layers, computed by stock's functions."""
    for hook in layer._forward_pre_hooks.values():  # pruning computes the weight in such a hook
        hook(layer, (x,))
    kind = next(cls.__name__ for cls in type(layer).__mro__ if cls.__module__ == "pyops.nn")
    if "Conv" in kind:
        x = nn.functional.conv2d(x, layer.weight, layer.bias, padding=layer.padding)
    if "Linear" in kind:
        x = nn.functional.linear(x, layer.weight, layer.bias)
    if "ReLU" in kind:
        x = nn.functional.relu(x)
    return nn.functional.max_pool2d(x, 2) if "MaxPool2d" in kind else x


# ---- the graph and its saved tensors ----


@pytest.mark.composes("`checkpoint`, reentrant and not")
@every_twin
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(twin, use_reentrant):
    tensors = twin.tensors()
    function = partial(checkpoint, twin.ours, use_reentrant=use_reentrant)
    torch.testing.assert_close(gradients(function, tensors), gradients(twin.stock, tensors))


@pytest.mark.composes("`checkpoint`, reentrant and not")
def test_checkpoint_of_a_sequence():
    net = pyops.convert(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = training_pass(net, net, x)
    expected = [t.clone() for t in expected]
    actual = training_pass(lambda x: checkpoint_sequential(net, 2, x, use_reentrant=False), net, x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.composes("saved tensors' hooks, `save_on_cpu`")
@every_twin
def test_saved_tensors_are_offloaded(twin):
    """Hooks store the saved tensors elsewhere and give back other tensors."""
    tensors, stored = twin.tensors(), []

    def pack(tensor):
        stored.append(pickle.dumps(tensor.detach()))
        return len(stored) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: pickle.loads(stored[i])):
        actual = gradients(twin.ours, tensors)
    assert stored
    torch.testing.assert_close(actual, gradients(twin.stock, tensors))
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(gradients(twin.ours, tensors), gradients(twin.stock, tensors))


@pytest.mark.composes("anomaly mode")
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@every_twin
def test_anomaly_mode(twin):
    """Results do not change, and a NaN in a gradient is reported with the call that it comes from."""
    tensors = twin.tensors()
    with torch.autograd.detect_anomaly():
        torch.testing.assert_close(gradients(twin.ours, tensors), gradients(twin.stock, tensors))
        leaves = [t.detach().requires_grad_() for t in tensors]
        output = twin.ours(*leaves)
        with pytest.raises(RuntimeError, match="returned nan values"), pytest.warns(UserWarning, match="Traceback"):
            output.backward(torch.full_like(output, float("nan")))


@pytest.mark.composes("backward hooks of layers, tensors and nodes")
@every_layer
def test_backward_hooks(build, shape):
    """Hooks of modules, tensors and graph nodes are called with the arguments that they get with stock."""
    layer = build(pyops.nn).double()
    x = pyops.testing.gradcheck_input(*shape)
    expected = gradients(partial(stock, layer), [x])
    layer.zero_grad()
    seen = []
    layer.register_full_backward_pre_hook(lambda _, grads: seen.append(("pre", grads[0])))
    layer.register_full_backward_hook(lambda _, grad_inputs, grads: seen.append(("full", grad_inputs[0], grads[0])))
    leaf = x.detach().requires_grad_()
    leaf.register_hook(lambda grad: seen.append(("leaf", grad)))
    output = layer(leaf)
    output.register_hook(lambda grad: seen.append(("output", grad)))
    output.pow(3).sum().backward()
    grad_output = 3 * expected[0].square()
    assert {name for name, *_ in seen} == {"output", "pre", "full", "leaf"} and len(seen) == 4
    for name, *tensors in seen:
        torch.testing.assert_close(tensors[-1], expected[1] if name == "leaf" else grad_output)
        torch.testing.assert_close(tensors[0], expected[1] if name in ("leaf", "full") else grad_output)


@pytest.mark.composes("`retain_graph`, `create_graph`")
@every_twin
def test_retain_graph_and_create_graph(twin):
    leaves = [t.requires_grad_() for t in twin.tensors()]
    output = twin.ours(*leaves).pow(3).sum()
    first = torch.autograd.grad(output, leaves, retain_graph=True)
    again = torch.autograd.grad(output, leaves, create_graph=True)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    second = torch.autograd.grad(sum(g.square().sum() for g in again), leaves)
    grads = torch.autograd.grad(twin.stock(*leaves).pow(3).sum(), leaves, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output, leaves)


@pytest.mark.composes("a change in place of what is saved raises")
@pytest.mark.parametrize("name", ["linear", "conv2d", "linear_relu", "conv2d_relu", "conv2d_relu_max_pool2d"])
@pytest.mark.parametrize("which", [0, 1], ids=["input", "weight"])
def test_changing_what_is_saved_raises(name, which):
    """As with stock, backward refuses an input or a weight that was changed in place after it was saved."""
    twin = TWINS[name]
    for function in (twin.ours, twin.stock):
        tensors = [t.requires_grad_() * 1 for t in twin.tensors()]
        output = function(*tensors)
        with torch.no_grad():
            tensors[which] += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@pytest.mark.composes("`use_deterministic_algorithms(True)`")
@every_twin
def test_deterministic_algorithms(twin):
    """All algorithms are deterministic, so nothing is refused, and nothing changes."""
    tensors = twin.tensors()
    expected = gradients(twin.ours, tensors)
    torch.use_deterministic_algorithms(True)
    try:
        actual = gradients(twin.ours, tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.composes("`no_grad`, `inference_mode`")
@every_twin
def test_without_gradients(twin):
    tensors = [t.requires_grad_() for t in twin.tensors()]
    expected = twin.stock(*tensors).detach()
    with torch.no_grad():
        output = twin.ours(*tensors)
    assert not output.requires_grad
    torch.testing.assert_close(output, expected)
    with torch.inference_mode():
        output = twin.ours(*tensors)
        inside = twin.ours(*(t.clone() for t in tensors))
    assert output.is_inference() and inside.is_inference()
    torch.testing.assert_close(output, expected)
    if len(tensors) > 1:
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            twin.ours(torch.inference_mode()(tensors[0].clone)(), *tensors[1:])


# ---- layers ----


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight + weight.flip(-1)


REPARAMETRIZATIONS = {
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer).eval(),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=5),
}


@pytest.mark.composes("parametrizations, weight and spectral norm, pruning")
@every_weighted_layer
@pytest.mark.parametrize("method", REPARAMETRIZATIONS)
def test_weights_that_are_computed(build, shape, method):
    """Weights may be computed on layers that were made as ours, including fused ones."""
    layer = REPARAMETRIZATIONS[method](build(pyops.nn).double())
    x = torch.randn(shape, dtype=torch.float64)
    with KernelLog() as log:
        actual = training_pass(layer, layer, x)
    assert log.ours and not {"addmm", "convolution"} & log.stock
    torch.testing.assert_close(actual, training_pass(lambda x: stock(layer, x), layer, x))


@pytest.mark.composes("lazy layers, by `convert` after their first call")
def test_lazy_layers():
    """They become stock's layers when they first see their input, and ours by a conversion afterwards."""
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(2, 3, 6, 5)
    pyops.convert(net)  # does not convert layers that do not know their shapes yet
    expected = net(x)
    assert type(net[0]) is nn.Conv2d and type(net[3]) is nn.Linear
    pyops.convert(net)
    with KernelLog() as log:
        torch.testing.assert_close(net(x), expected)
    assert log.ours == {"conv2d", "relu_with_mask", "linear"} and log.stock == set()


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda net: pickle.loads(pickle.dumps(net)), "save": saved_and_loaded}
every_way = pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)


@pytest.mark.composes("`deepcopy`, pickle, `torch.save` of whole modules")
@both_lenets
@every_way
def test_copies(fused, duplicate):
    """A network can be copied, also in the middle of training."""
    net, stock = lenets(fused)
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    training_pass(net, net, x)
    twin = duplicate(net)
    assert type(twin) is type(net)
    torch.testing.assert_close(training_pass(twin, twin, x), training_pass(stock, stock, x))


@pytest.mark.composes("`deepcopy`, pickle, `torch.save` of whole modules")
@every_layer
@every_way
def test_copies_of_layers(build, shape, duplicate):
    layer = build(pyops.nn).double()
    x = pyops.testing.gradcheck_input(*shape).detach()
    expected = [t.clone() for t in training_pass(partial(stock, layer), layer, x)]
    twin = duplicate(layer)
    assert type(twin) is type(layer)
    torch.testing.assert_close(training_pass(twin, twin, x), expected)


@pytest.mark.composes("`state_dict` by `weights_only=True`")
@every_weighted_layer
def test_state_dict_of_layers(build, shape):
    """Stock's layer loads it; for a fused layer, this is the layer that it begins with."""
    layer = build(pyops.nn)
    twin = nn.Linear(3, 4) if isinstance(layer, nn.Linear) else nn.Conv2d(3, 4, 3)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin.weight, layer.weight) and torch.equal(twin.bias, layer.bias)


@pytest.mark.composes("`state_dict` by `weights_only=True`")
@both_lenets
def test_state_dict_is_loaded_safely(fused):
    """weights_only=True, the default, loads it, into stock's network too."""
    net, stock = lenets(fused)
    with torch.no_grad():
        net.fc3.bias += 1
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    stock.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(net(x), stock(x))


@pytest.mark.composes("`half()`, `bfloat16()`, `double()`")
@every_layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_layers_in_other_dtypes(build, shape, dtype):
    layer = build(pyops.nn).to(dtype)
    exact = copy.deepcopy(layer).double()
    x = pyops.testing.gradcheck_input(*shape).detach().to(dtype)
    actual = training_pass(layer, layer, x)
    assert {t.dtype for t in actual} == {dtype}
    for ours, stocks in zip(actual, training_pass(partial(stock, exact), exact, x.double()), strict=True):
        assert (ours.double() - stocks).norm() <= max(torch.finfo(dtype).eps, 1e-12) * stocks.norm()


@pytest.mark.composes("`to(memory_format=torch.channels_last)`")
@every_layer
def test_layers_in_channels_last(build, shape):
    layer = build(pyops.nn).double().to(memory_format=torch.channels_last)
    x = pyops.testing.gradcheck_input(*shape).detach()
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
        assert layer(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(training_pass(layer, layer, x), training_pass(partial(stock, layer), layer, x))


@pytest.mark.composes("`half()`, `bfloat16()`, `double()`")
@both_lenets
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_networks_in_other_dtypes(fused, dtype):
    """After half(), bfloat16() and double(), results are as close to float64 as the dtype allows."""
    net, stock = lenets(fused, torch.float64)
    change = {torch.float16: nn.Module.half, torch.bfloat16: nn.Module.bfloat16, torch.float64: nn.Module.double}
    change[dtype](net)
    x = torch.randn(3, 1, 32, 32, dtype=torch.float64)
    actual = training_pass(net, net, x.to(dtype))
    assert {t.dtype for t in actual} == {dtype}
    tolerance = 8 * torch.finfo(dtype).eps
    for ours, exact in zip(actual, training_pass(stock, stock, x), strict=True):
        assert (ours.double() - exact).norm() <= max(tolerance, 1e-12) * 4 * exact.norm()


@pytest.mark.composes("`to(memory_format=torch.channels_last)`")
@both_lenets
def test_channels_last(fused):
    net, stock = lenets(fused)
    for module in (net, stock):
        module.to(memory_format=torch.channels_last)
    x = torch.randn(3, 1, 32, 32, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(training_pass(net, net, x), training_pass(stock, stock, x))
    assert net.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert F.conv2d(x, net.conv1.weight).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.composes("autocast to bfloat16 and float16")
@both_lenets
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(fused, target):
    """Activations have the autocast dtype, as stock's do, and gradients have that of the parameters."""
    net, stock = lenets(fused, torch.float32)
    x = torch.randn(3, 1, 32, 32)
    with torch.autocast("cpu", target):
        actual, expected = training_pass(net, net, x), training_pass(stock, stock, x)
    assert [t.dtype for t in actual] == [t.dtype for t in expected]
    assert actual[0].dtype == target and actual[-1].dtype == torch.float32
    for ours, stocks in zip(actual, expected, strict=True):
        assert (ours - stocks).double().norm() <= 16 * torch.finfo(target).eps * stocks.double().norm()


@pytest.mark.composes("ONNX: refused, naming the operator")
@every_layer
def test_onnx_is_refused_by_name(build, shape):
    """ONNX has no such operators; a reverted network can be exported."""
    layer = build(pyops.nn)
    with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match="pyops::"), pytest.warns():
        torch.onnx.export(layer, (torch.ones(shape),), io.BytesIO(), dynamo=False)


def test_onnx_of_a_traced_program_is_refused_by_name():
    pytest.importorskip("onnxscript")
    with pytest.raises(torch.onnx.OnnxExporterError) as info:
        torch.onnx.export(pyops.LeNet(), (torch.ones(1, 1, 32, 32),), io.BytesIO(), dynamo=True)
    assert "pyops.conv2d" in str(info.value.__cause__)
