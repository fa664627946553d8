"""pyops.convert and pyops.revert."""

import copy

import pytest
import torch
from kernel_log import KernelLog, kernels_of_training, run_backward
from models import kinds
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import pyops
from pyops.lenet import StockLeNet

LAYERS = {
    "ReLU": lambda: nn.ReLU(),
    "Linear": lambda: nn.Linear(4, 3),
    "Conv2d": lambda: nn.Conv2d(1, 2, 3),
    "MaxPool2d": lambda: nn.MaxPool2d(2),
}


class Residual(nn.Module):
    """A network with everything that a conversion could lose: nesting, buffers, a shared layer, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.relu = nn.ReLU()
        self.blocks = nn.ModuleList(nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, padding=1)}) for _ in range(2))
        self.blocks.append(self.blocks[0])
        self.pool = nn.MaxPool2d(2)
        self.encode = nn.Linear(4 * 4 * 4, 8)
        self.decode = nn.Linear(8, 64, bias=False)
        self.head = nn.Linear(64, 8)
        self.head.weight = self.encode.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = self.relu(x + self.scale * block["conv"](x))
        return self.head(self.decode(self.relu(self.encode(self.pool(x).flatten(1)))))


def step(net: nn.Module) -> list[torch.Tensor]:
    """The output and the gradients of one pass."""
    torch.manual_seed(1)
    net.zero_grad()
    output = net(torch.randn(3, 1, 8, 8, dtype=torch.float64))
    run_backward(output)
    return [output, *(parameter.grad for parameter in net.parameters())]


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Residual().double()


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_is_the_root_changes_in_place_and_back(name):
    layer = LAYERS[name]()
    assert pyops.convert(layer) is layer
    assert type(layer) is getattr(pyops.nn, name)
    assert pyops.revert(layer) is layer
    assert type(layer) is getattr(nn, name)


def test_every_layer_is_switched_and_nothing_else(net):
    before = [type(module) for module in net.modules()]
    pyops.convert(net)
    ours = {getattr(nn, name): getattr(pyops.nn, name) for name in LAYERS}
    assert [type(module) for module in net.modules()] == [ours.get(cls, cls) for cls in before]
    assert len(set(before) & set(ours)) == 4
    pyops.revert(net)
    assert [type(module) for module in net.modules()] == before


def test_objects_stay_the_same(net):
    named = [*net.named_modules(remove_duplicate=False), *net.named_parameters(remove_duplicate=False)]
    named += net.named_buffers()
    before = [(name, id(thing)) for name, thing in named]
    for switch in (pyops.convert, pyops.revert):
        switch(net)
        named = [*net.named_modules(remove_duplicate=False), *net.named_parameters(remove_duplicate=False)]
        named += net.named_buffers()
        assert [(name, id(thing)) for name, thing in named] == before
        assert net.blocks[2] is net.blocks[0]
        assert net.head.weight is net.encode.weight


def test_computes_the_same_on_our_kernels(net):
    stock = copy.deepcopy(net)
    pyops.convert(net)
    with KernelLog() as log:
        ours = step(net)
    assert log.stock == set()
    assert set().union(*map(kernels_of_training, ("relu", "relu_", "linear", "conv2d", "max_pool2d"))) <= log.ours
    torch.testing.assert_close(ours, step(stock))

    pyops.revert(net)
    net.load_state_dict(stock.state_dict())
    with KernelLog() as log:
        reverted = step(net)
    assert log.ours == set()
    torch.testing.assert_close(reverted, step(stock), rtol=0, atol=0)


def test_twice_is_once(net):
    types = [type(module) for module in pyops.convert(net).modules()]
    assert [type(module) for module in pyops.convert(net).modules()] == types


def test_training_flags_stay(net):
    net.eval()
    net.stem.train()
    before = [module.training for module in net.modules()]
    assert [module.training for module in pyops.convert(net).modules()] == before


def test_hooks_stay(net):
    calls = []
    net.pool.register_forward_pre_hook(lambda module, args: calls.append("before"))
    net.pool.register_forward_hook(lambda module, args, output: calls.append("after"))
    net.head.register_full_backward_hook(lambda module, grad_input, grad_output: calls.append("backward"))
    net.encode.weight.register_hook(lambda grad: calls.append("weight"))
    step(pyops.convert(net))
    assert calls == ["before", "after", "backward", "weight"]


def test_an_optimizer_made_before_goes_on(net):
    stock = copy.deepcopy(net)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (net, stock)]
    for switch in (lambda each: each, pyops.convert, pyops.revert):
        switch(net)
        step(net), step(stock)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(net.state_dict(), stock.state_dict())


def test_subclasses_stay():
    class Mine(nn.Linear):
        def forward(self, input):
            return super().forward(input) + 1

    attention = nn.MultiheadAttention(8, 2)
    for module in (Mine(4, 3), attention.out_proj, nn.LazyLinear(3), nn.ReLU6(), nn.Conv1d(1, 2, 3)):
        cls = type(module)
        assert type(pyops.convert(module)) is cls
        assert type(pyops.revert(module)) is cls
    assert not isinstance(attention.out_proj, pyops.nn.Linear)


@pytest.mark.parametrize("training", [True, False])
def test_transformer_layer_with_its_fast_path(training):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64).train(training)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.inference_mode():
        expected = layer(x)
        torch.testing.assert_close(pyops.convert(layer)(x), expected)
    assert type(layer.linear1) is pyops.nn.Linear


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight + weight.mT


@pytest.mark.composes("parametrizations, weight and spectral norm, pruning")
@pytest.mark.parametrize(
    "parametrized",
    [
        lambda: parametrize.register_parametrization(nn.Linear(4, 4).double(), "weight", Symmetric()),
        lambda: parametrizations.weight_norm(nn.Linear(4, 4).double()),
        lambda: parametrizations.orthogonal(nn.Linear(4, 4).double()),
        lambda: nn.utils.spectral_norm(nn.Linear(4, 4).double()).eval(),  # uses hooks
        lambda: prune.l1_unstructured(nn.Linear(4, 4).double(), "weight", amount=5),  # uses a hook
    ],
    ids=["parametrization", "weight_norm", "orthogonal", "spectral_norm", "pruned"],
)
def test_parametrized_weights_stay_parametrized(parametrized):
    torch.manual_seed(0)
    layer = parametrized()
    text = repr(layer)
    x = torch.randn(3, 4, dtype=torch.float64)

    def outcome() -> list[torch.Tensor]:
        layer.zero_grad()
        output = layer(x)
        run_backward(output)
        return [output, *(parameter.grad for parameter in layer.parameters())]

    expected = outcome()
    pyops.convert(layer)
    with KernelLog() as log:
        result = outcome()
    assert "linear" in log.ours
    torch.testing.assert_close(result, expected)
    assert repr(layer) == text

    pyops.revert(layer)
    with KernelLog() as log:
        result = outcome()
    assert log.ours == set()
    torch.testing.assert_close(result, expected)


def test_copies_of_a_parametrized_layer_are_switched_one_by_one():
    layer = parametrize.register_parametrization(nn.Linear(4, 4), "weight", Symmetric())
    before = copy.deepcopy(layer)
    after = copy.deepcopy(pyops.convert(layer))
    assert not isinstance(before, pyops.nn.Linear)
    assert isinstance(after, pyops.nn.Linear)
    x = torch.randn(3, 4)
    torch.testing.assert_close(after(x), before(x))


def test_a_parametrization_can_be_removed_after_the_conversion():
    layer = parametrize.register_parametrization(nn.Linear(4, 4), "weight", Symmetric())
    x = torch.randn(3, 4)
    expected = layer(x)
    pyops.convert(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is pyops.nn.Linear
    torch.testing.assert_close(layer(x), expected)


def test_lenet_becomes_its_stock_twin_and_back():
    net = pyops.LeNet()
    pyops.revert(net)
    assert type(net) is StockLeNet
    with KernelLog() as log:
        net(torch.ones(1, 1, 32, 32))
    assert log.ours == set()
    assert type(pyops.convert(net)) is pyops.LeNet


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"convert: module must be a torch\.nn\.Module, got Tensor"):
        pyops.convert(torch.ones(1))
    with pytest.raises(TypeError, match=r"revert: module must be a torch\.nn\.Module, got list"):
        pyops.revert([nn.ReLU()])


# ---- fusing ----


class Net(nn.Module):
    """Layers as attributes, called in order; `use` says how the first ReLU's result is used."""

    def __init__(self, use: str = "once") -> None:
        super().__init__()
        self.use = use
        self.conv, self.relu, self.pool = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(inplace=use == "inplace"),
            nn.MaxPool2d(2),
        )
        self.fc, self.act = nn.Linear(64, 5), nn.ReLU()

    def forward(self, x):
        y = self.conv(x)
        z = self.relu(y)
        pooled = self.pool(z)
        if self.use == "again":
            pooled = pooled + z.mean()
        if self.use == "untraceable" and pooled.sum() > 1e9:
            return pooled
        if self.use == "called twice":
            pooled = self.relu(pooled)
        if self.use == "in training" and self.training:
            pooled = pooled + y.mean()
        return self.act(self.fc(pooled.flatten(1)))


FUSED = ["ConvReLUMaxPool2d", "_FusedReLU", "_FusedMaxPool2d", "LinearReLU", "_FusedReLU"]


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        ("once", FUSED),
        ("inplace", FUSED),
        ("again", ["ConvReLU2d", "_FusedReLU", "MaxPool2d", "LinearReLU", "_FusedReLU"]),
        ("called twice", ["Conv2d", "ReLU", "MaxPool2d", "LinearReLU", "_FusedReLU"]),
        ("in training", ["Conv2d", "ReLU", "MaxPool2d", "LinearReLU", "_FusedReLU"]),
        ("untraceable", ["Conv2d", "ReLU", "MaxPool2d", "Linear", "ReLU"]),
    ],
)
def test_fuse(use, expected):
    torch.manual_seed(0)
    net = Net(use).double()
    stock = copy.deepcopy(net)
    before = step(pyops.convert(copy.deepcopy(net)))
    assert pyops.convert(net, fuse=True) is net
    assert kinds(net) == expected
    torch.testing.assert_close(step(net), before, rtol=0, atol=0)
    assert net.training
    assert str(net.load_state_dict(stock.state_dict())) == "<All keys matched successfully>"
    assert str(stock.load_state_dict(net.state_dict())) == "<All keys matched successfully>"
    assert kinds(pyops.convert(net, fuse=True)) == expected
    torch.testing.assert_close(step(copy.deepcopy(net)), before, rtol=0, atol=0)
    pyops.revert(net)
    assert [type(layer) for layer in net.modules()] == [type(layer) for layer in stock.modules()]
    assert {name: set(vars(layer)) for name, layer in net.named_modules()} == {
        name: set(vars(layer)) for name, layer in stock.named_modules()
    }


@pytest.mark.parametrize("pool_first", [False, True])
def test_fuse_in_sequential(pool_first):
    middle = [nn.ReLU(), nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)]
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), *(reversed(middle) if pool_first else middle)), nn.Conv2d(4, 2, 1), nn.ReLU()
    )
    net.append(nn.Flatten()).append(nn.Linear(32, 3)).double()
    before = step(pyops.convert(copy.deepcopy(net)))
    pyops.convert(net, fuse=True)
    assert kinds(net)[1] == "ConvReLUMaxPool2d" and kinds(net)[4] == "ConvReLU2d" and kinds(net)[-1] == "Linear"
    torch.testing.assert_close(step(net), before, rtol=0, atol=0)


def test_fuse_leaves_alone_what_others_see():
    hooked = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    hooked[0].register_forward_hook(lambda *_: None)
    assert kinds(pyops.convert(hooked, fuse=True)) == ["Linear", "ReLU"]
    shared = nn.ReLU()
    assert kinds(pyops.convert(nn.Sequential(nn.Linear(4, 3), shared, nn.Linear(3, 3), shared), fuse=True)) == [
        "Linear",
        "ReLU",
        "Linear",
    ]
    indices = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2, return_indices=True))
    assert kinds(pyops.convert(indices, fuse=True)) == ["ConvReLU2d", "_FusedReLU", "MaxPool2d"]
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.ReLU())
    assert kinds(pyops.convert(normed, fuse=True))[-1] == "ReLU"


def test_fuse_lenet():
    torch.manual_seed(0)
    net = StockLeNet()
    fused = pyops.convert(copy.deepcopy(net), fuse=True)
    assert str(fused) == str(pyops.LeNet(fused=True))
    x = torch.randn(3, 1, 32, 32)
    assert torch.equal(fused(x), pyops.convert(copy.deepcopy(net))(x))
    assert type(pyops.revert(fused)) is StockLeNet and str(fused) == str(net)
    assert torch.equal(fused(x), net(x))


def test_layers_built_fused_stay():
    net = nn.Sequential(pyops.nn.LinearReLU(4, 3), nn.Linear(3, 2))
    assert kinds(pyops.revert(pyops.convert(net, fuse=True))) == ["LinearReLU", "Linear"]
    assert type(net[0]) is pyops.nn.LinearReLU
