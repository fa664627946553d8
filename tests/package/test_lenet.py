"""pyops.LeNet and its stock twin."""

import copy
import pickle

import pytest
import torch
from kernel_log import KernelLog, kernels_of_training, run_backward

import pyops
from pyops.lenet import StockLeNet


def twins(kernel_size: int, dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The stock network and ours, made from the same seed."""
    torch.manual_seed(0)
    stock = StockLeNet(kernel_size).to(dtype)
    torch.manual_seed(0)
    return stock, pyops.LeNet(kernel_size).to(dtype)


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("batch", [(), (1,), (7,), (0,)], ids=str)
def test_output_and_gradients_equal_stock(kernel_size, batch):
    results = []
    for net in twins(kernel_size):
        torch.manual_seed(1)
        x = torch.randn(*batch, 1, 32, 32, dtype=torch.float64, requires_grad=True)
        output = net(x)
        assert output.shape == (*batch, 10)
        run_backward(output)
        results.append([output, x.grad, *(parameter.grad for parameter in net.parameters())])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("kernel_size", "in_features"), [(3, 576), (5, 400)])
def test_parameters(kernel_size, in_features):
    k = kernel_size
    expected = {
        "conv1.weight": (6, 1, k, k),
        "conv1.bias": (6,),
        "conv2.weight": (16, 6, k, k),
        "conv2.bias": (16,),
        "fc1.weight": (120, in_features),
        "fc1.bias": (120,),
        "fc2.weight": (84, 120),
        "fc2.bias": (84,),
        "fc3.weight": (10, 84),
        "fc3.bias": (10,),
    }
    stock, ours = twins(kernel_size)
    assert {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()} == expected
    torch.testing.assert_close(ours.state_dict(), stock.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_kernels_are_ours_in_one_and_stock_in_the_other(kernel_size):
    stock, ours = twins(kernel_size)
    logs = []
    for net in (stock, ours):
        with KernelLog() as log:
            run_backward(net(torch.ones(2, 1, 32, 32, dtype=torch.float64)))
        logs.append(log)
    assert logs[0].ours == set()
    assert logs[1].stock == set()
    assert logs[1].ours == set().union(*map(kernels_of_training, ("relu", "linear", "conv2d", "max_pool2d")))


def test_num_classes():
    assert pyops.LeNet(num_classes=26)(torch.ones(3, 1, 32, 32)).shape == (3, 26)


def test_other_kernel_sizes_are_refused():
    with pytest.raises(ValueError, match="kernel_size must be 5 or 3, got 4"):
        pyops.LeNet(kernel_size=4)


def test_other_image_sizes_are_refused():
    with pytest.raises(RuntimeError):
        pyops.LeNet()(torch.ones(1, 1, 28, 28))


def test_repr_names_the_layers():
    assert repr(pyops.LeNet()) == (
        "LeNet(\n"
        "  (conv1): Conv2d(1, 6, kernel_size=(5, 5), stride=(1, 1))\n"
        "  (conv2): Conv2d(6, 16, kernel_size=(5, 5), stride=(1, 1))\n"
        "  (fc1): Linear(in_features=400, out_features=120, bias=True)\n"
        "  (fc2): Linear(in_features=120, out_features=84, bias=True)\n"
        "  (fc3): Linear(in_features=84, out_features=10, bias=True)\n"
        ")"
    )


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies(duplicate):
    net = pyops.LeNet(kernel_size=3)
    twin = duplicate(net)
    assert type(twin) is pyops.LeNet
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(twin(x), net(x), rtol=0, atol=0)
