"""pyops.testing."""

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

import pyops
from pyops.testing import gradcheck_input


@pytest.mark.parametrize("size", [(), (0,), (1,), (2, 0, 3), (7,), (3, 4, 5, 6), (30_001,)], ids=str)
def test_values_keep_their_distance(size):
    x = gradcheck_input(*size)
    assert x.shape == size
    assert x.dtype == torch.float64
    assert x.is_leaf
    assert x.requires_grad
    ordered = x.detach().flatten().sort().values
    assert (ordered.diff() > 0.999e-4).all()
    assert (ordered.abs() > 0.499e-4).all()
    if x.numel() > 1:
        assert ordered[0] < 0 < ordered[-1]
        assert (ordered.abs() < max(1, x.numel() * 1e-4)).all()


def test_order_is_drawn_by_torchs_generator():
    torch.manual_seed(1)
    first = gradcheck_input(50)
    assert not torch.equal(first, gradcheck_input(50))
    torch.manual_seed(1)
    assert torch.equal(first, gradcheck_input(50))


@pytest.mark.parametrize(
    "function",
    [
        pyops.functional.relu,
        lambda x: pyops.functional.max_pool2d(x, 3, 2, 1),
        lambda x: pyops.functional.max_pool2d(x, 2, 1, ceil_mode=True),
    ],
)
def test_gradcheck_passes_at_its_default_tolerances(function):
    x = gradcheck_input(2, 2, 6, 5)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_gradcheck_would_fail_at_a_kink():
    x = gradcheck_input(2, 2).detach()
    x[0, 0] = 0
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(pyops.functional.relu, x.requires_grad_())
