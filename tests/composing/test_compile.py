"""torch.compile, torch.export and AOTInductor turn our functions and layers into one graph with stock's results."""

import copy
import io
import shutil
from contextlib import nullcontext

import pytest
import torch
from support_table import OPS
from torch import func
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from twins import TWINS, lenets, training_pass

import pyops
from pyops import _load

every_twin = pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS)
both_lenets = pytest.mark.parametrize("fused", [False, True], ids=["layers", "fused"])
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="inductor compiles C++")


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()


# ---- torch.compile ----


@pytest.mark.composes("`torch.compile(fullgraph=True)`, static and dynamic, no recompilation")
@every_twin
@pytest.mark.parametrize("dynamic", [None, True])
def test_functions(twin, dynamic):
    """Forward and backward form one graph, which AOTAutograd splits as the real kernels do. With dynamic shapes, one
    graph serves every size of the first dimension."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin.ours, backend=counter, fullgraph=True, dynamic=dynamic)
    input, *others = twin.tensors()
    for size in (7, 11, 13) if dynamic else (2,):  # no other size is equal: torch would take both to be always equal
        batch = torch.cat([input + i / 1e3 for i in range(size)]) if input.dim() > 1 else input.expand(size, -1)
        tensors = [t.detach().requires_grad_() for t in (batch, *others)]
        results = []
        for function in (compiled, twin.stock):
            output = function(*tensors)
            results.append([output, *torch.autograd.grad(output.pow(3).sum(), tensors)])
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1


class AllFunctions(torch.nn.Module):
    """Calls every function of the twins, each on tensors of its own."""

    def __init__(self, side):
        super().__init__()
        self.side = side

    def forward(self, *tensors):
        outputs, rest = [], list(tensors)
        for twin in TWINS.values():
            own, rest = rest[: len(twin.shapes)], rest[len(twin.shapes) :]
            outputs.append(getattr(twin, self.side)(*own))
        return tuple(outputs)


def tensors_for_all_functions():
    return tuple(tensor for twin in TWINS.values() for tensor in twin.tensors())


@pytest.mark.composes("`torch.compile` by inductor", *OPS)
@needs_compiler
def test_functions_by_inductor():
    tensors, results = [t.requires_grad_() for t in tensors_for_all_functions()], []
    for net in (torch.compile(AllFunctions("ours"), fullgraph=True), AllFunctions("stock")):
        outputs = net(*tensors)
        results.append([*outputs, *torch.autograd.grad(sum(each.pow(3).sum() for each in outputs), tensors)])
    torch.testing.assert_close(*results)


@pytest.mark.skipif(not (_load.build_info.cuda and torch.cuda.is_available()), reason="needs a GPU")
@both_lenets
def test_reduced_overhead(fused):
    """Forward and backward run as CUDA graphs."""
    net, stock = (each.to("cuda", torch.float32) for each in lenets(fused))
    compiled = torch.compile(net, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # the graph runs eagerly, is recorded, and is replayed
        x = torch.randn(3, 1, 32, 32, device="cuda")
        torch.testing.assert_close(training_pass(compiled, net, x), training_pass(stock, stock, x))


def test_options_that_are_symbols():
    """Sizes of windows and paddings may be given as arguments, which dynamic shapes turn into symbols."""
    x, weight = torch.randn(2, 3, 9, 8, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)

    def run(functional, padding, stride, window):
        y = functional.relu(functional.conv2d(x, weight, None, stride, padding))
        return functional.max_pool2d(y, window, (window, 1))

    def run_fused(padding, stride, window):
        pool = {"pool_kernel_size": window, "pool_stride": (window, 1)}
        return pyops.functional.conv2d_relu_max_pool2d(x, weight, None, stride, padding, **pool)

    for function in (lambda *options: run(pyops.functional, *options), run_fused):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
        for options in ((1, 1, 2), (2, 2, 3), (0, 1, 2)):
            torch.testing.assert_close(compiled(*options), run(torch.nn.functional, *options))


@pytest.mark.composes("`torch.compile` by inductor")
@needs_compiler
@both_lenets
@pytest.mark.parametrize("dynamic", [None, True])
def test_networks_by_inductor(fused, dynamic):
    """There is no graph break, and with dynamic shapes one compilation serves all batch sizes, in both formats."""
    net, stock = lenets(fused)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=dynamic)
    for batch in (3, 4, 7) if dynamic else (3,):
        x = torch.randn(batch, 1, 32, 32, dtype=torch.float64)
        torch.testing.assert_close(training_pass(compiled, net, x), training_pass(stock, stock, x))
    assert counter.frame_count == 1


@pytest.mark.composes("`torch.compile` by inductor")
@needs_compiler
def test_layouts_by_inductor():
    """Inductor's assumptions about the strides of our results hold, also for channels-last results."""
    layers = [pyops.nn.Conv2d(3, 4, 3), pyops.nn.ReLU(inplace=True), pyops.nn.MaxPool2d(2)]
    net = torch.nn.Sequential(*layers, pyops.nn.ConvReLU2d(4, 2, 2)).double()
    stock = pyops.revert(copy.deepcopy(net[:3])).append(torch.nn.Conv2d(4, 2, 2).double()).append(torch.nn.ReLU())
    stock.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch._dynamo.reset()
        for module in (net, stock):
            module.to(memory_format=memory_format)
        compiled = torch.compile(net, fullgraph=True)
        inputs = x.contiguous(memory_format=memory_format)
        actual, expected = training_pass(compiled, net, inputs), training_pass(stock, stock, inputs)
        torch.testing.assert_close(actual, expected)
        assert actual[0].is_contiguous(memory_format=memory_format)


@pytest.mark.composes("`torch.func` inside of compiled code")
def test_a_training_step_in_one_graph():
    """The graph holds forward, loss, gradients computed by torch.func, and the update of the parameters."""
    net, stock = lenets()
    images, labels = torch.randn(4, 1, 32, 32, dtype=torch.float64), torch.arange(4)

    def step(net, parameters):
        def loss(parameters):
            return torch.nn.functional.cross_entropy(func.functional_call(net, parameters, (images,)), labels)

        return {name: parameters[name] - 0.1 * gradient for name, gradient in func.grad(loss)(parameters).items()}

    parameters = {name: p.detach() for name, p in net.named_parameters()}
    compiled = torch.compile(lambda parameters: step(net, parameters), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(parameters), step(stock, parameters))


TRANSFORMS = {
    "vmap": lambda f: lambda *t: func.vmap(f)(*(torch.stack([x, x.sin()]) for x in t)),
    "grad": lambda f: lambda *t: func.grad(lambda *t: f(*t).pow(3).sum(), tuple(range(len(t))))(*t),
    "jvp": lambda f: lambda *t: func.jvp(f, t, tuple(x.cos() for x in t)),
    "hessian": lambda f: lambda *t: func.hessian(lambda *t: f(*t).pow(3).sum(), tuple(range(len(t))))(*t),
}


@pytest.mark.composes("`torch.func` inside of compiled code")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["linear", "max_pool2d", "conv2d_relu"])
def test_transforms_inside_of_compiled_code(name, transform):
    """Custom operators are known to lose derivatives there (pytorch#192985); ours do not."""
    twin = TWINS[name]
    compiled = torch.compile(TRANSFORMS[transform](twin.ours), backend="aot_eager", fullgraph=True)
    tensors = twin.tensors()
    torch.testing.assert_close(compiled(*tensors), TRANSFORMS[transform](twin.stock)(*tensors))


@pytest.mark.composes("`torch.func` inside of compiled code")
@both_lenets
def test_gradients_of_each_sample(fused):
    """vmap(grad) compiles to one graph, with static and with dynamic shapes."""
    net, stock = lenets(fused)
    images, labels = torch.randn(3, 1, 32, 32, dtype=torch.float64), torch.arange(3)

    def per_sample(net):
        def loss(parameters, image, label):
            return torch.nn.functional.cross_entropy(func.functional_call(net, parameters, (image,)), label)

        parameters = {name: p.detach() for name, p in net.named_parameters()}
        return lambda images, labels: func.vmap(func.grad(loss), (None, 0, 0))(parameters, images, labels)

    expected = per_sample(stock)(images, labels)
    for dynamic in (None, True):
        torch._dynamo.reset()
        compiled = torch.compile(per_sample(net), backend="aot_eager", fullgraph=True, dynamic=dynamic)
        torch.testing.assert_close(compiled(images, labels), expected)


@pytest.mark.composes("autocast to bfloat16 and float16")
@both_lenets
def test_autocast(fused):
    net, _ = lenets(fused, torch.float32)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 1, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = (training_pass(each, net, x) for each in (compiled, net))
    assert actual[0].dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)


def test_errors_are_those_of_eager():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        torch.compile(pyops.functional.linear, backend="aot_eager")(torch.ones(2, 3), torch.ones(4, 5))


# ---- compiled autograd ----


@pytest.mark.composes("compiled autograd")
@every_twin
def test_compiled_backward(twin):
    """Each backward of eager mode is traced without a break, and is not traced again for tensors of other values."""
    in_python = twin is TWINS["relu_in_place"]  # the one op whose node is not in C++: dynamo does not look into it
    counter = CompileCounterWithBackend("aot_eager")
    compiler = torch.compile(backend=counter, fullgraph=not in_python)
    tensors = [t.requires_grad_() for t in twin.tensors()]
    counts = []
    for _ in range(2):
        expected = torch.autograd.grad(twin.ours(*tensors).pow(3).sum(), tensors)
        output = twin.ours(*tensors).pow(3).sum()
        with compiled_autograd._enable(compiler):
            output.backward()
        for tensor, gradient in zip(tensors, expected, strict=True):
            assert torch.equal(tensor.grad, gradient)
            tensor.grad = None
            tensor.detach().add_(0.25)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0


@pytest.mark.composes("compiled autograd")
@both_lenets
def test_compiled_backward_of_networks(fused):
    """The backward may have several shapes, and a hook may unpack the saved tensors."""
    net = pyops.LeNet(fused=fused)
    compiler = torch.compile(backend="aot_eager")
    for batch in (2, 3, 2):
        images = torch.randn(batch, 1, 32, 32)
        expected = training_pass(net, net, images)
        with (
            compiled_autograd._enable(compiler),
            torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda packed: packed + 0),
        ):
            assert all(map(torch.equal, training_pass(net, net, images), expected))


@pytest.mark.parametrize("name", ["relu", "conv2d", "max_pool2d", "linear_relu", "conv2d_relu_max_pool2d"])
def test_compiled_second_backward(name):
    """Gradients are differentiated by every tensor and by grad_output; some of these derivatives are zeros. Stock's are
    not compiled, because torch 2.13 fails to compile that of conv2d."""
    results = []
    for function in (TWINS[name].ours, TWINS[name].stock):
        torch.manual_seed(0)
        tensors = [t.requires_grad_() for t in TWINS[name].tensors()]
        output = function(*tensors)
        grad_output = output.detach().cos().requires_grad_()
        grads = torch.autograd.grad(output, tensors, grad_output, create_graph=True)
        compiled = compiled_autograd._enable(torch.compile(backend="aot_eager"))
        with compiled if function is TWINS[name].ours else nullcontext():
            sum(grad.sum() for grad in grads).backward()
        results.append([t.grad for t in (*tensors, grad_output)])
    torch.testing.assert_close(*results)


# ---- torch.export ----


@pytest.mark.composes("`torch.export`, strict and not; saved, loaded, trained")
@both_lenets
@pytest.mark.parametrize("strict", [True, False])
def test_export(fused, strict):
    """The exported program holds our operators, serves all batch sizes, and can be saved, loaded and trained."""
    net, stock = lenets(fused)
    x = torch.randn(3, 1, 32, 32, dtype=torch.float64)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict)
    names = {node.target.name() for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    operators = {name for name in names if name.startswith("pyops::")}
    assert operators == (
        {"pyops::conv2d_relu_max_pool2d", "pyops::linear_relu", "pyops::linear"}
        if fused
        else {"pyops::conv2d", "pyops::relu", "pyops::max_pool2d", "pyops::linear"}
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for each in (program, torch.export.load(file), program.run_decompositions()):
        module = each.module()
        for batch in (3, 5):
            x = torch.randn(batch, 1, 32, 32, dtype=torch.float64)
            torch.testing.assert_close(training_pass(module, module, x), training_pass(stock, stock, x))


class Calls(torch.nn.Module):
    """A function as a module, because only modules can be exported."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


@pytest.mark.composes("`torch.export`, strict and not; saved, loaded, trained")
@every_twin
@pytest.mark.parametrize("strict", [True, False])
def test_export_of_functions(twin, strict):
    tensors = tuple(twin.tensors())
    program = torch.export.export(Calls(twin.ours), tensors, strict=strict)
    results = []
    for function in (program.module(), twin.stock):
        leaves = [t.clone().requires_grad_() for t in tensors]
        output = function(*leaves)
        results.append([output, *torch.autograd.grad(output.pow(3).sum(), leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.composes("AOTInductor: a package, loaded and run")
@needs_compiler
@both_lenets
def test_aot_inductor(fused, tmp_path):
    """A network is compiled into a package, loaded and run, on another batch size too."""
    net, stock = lenets(fused, torch.float32)
    x = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "lenet.pt2"))
        run = torch._inductor.aoti_load_package(package)
        for batch in (3, 8):
            x = torch.randn(batch, 1, 32, 32)
            torch.testing.assert_close(run(x), stock(x))


@pytest.mark.composes("AOTInductor: a package, loaded and run", *OPS)
@needs_compiler
def test_aot_inductor_of_functions(tmp_path):
    """All functions are compiled into one package."""
    tensors = tensors_for_all_functions()
    with torch.no_grad():
        program = torch.export.export(AllFunctions("ours"), tensors)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "all.pt2"))
        tensors = tensors_for_all_functions()
        run = torch._inductor.aoti_load_package(package)
        torch.testing.assert_close(tuple(run(*tensors)), AllFunctions("stock")(*tensors))
