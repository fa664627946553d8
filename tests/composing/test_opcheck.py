"""Every operator has a right schema, fake kernel (shapes and strides) and registration, and can be traced."""

import pytest
import torch
from tensors import place, random

ops = torch.ops.pyops
POOL_ARGS = ((3, 2), (2, 1), 1, (1, 2), True)


def images(where, *shape, requires_grad=False):
    return random(shape, torch.float32, where).requires_grad_(requires_grad)


def opcheck_calls(where):
    """Arguments for every op, with tensors in the layout `where`."""
    x, w = images(where, 2, 4, 7, 6, requires_grad=True), images(where, 6, 2, 3, 2, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    conv = ((2, 1), (1, 0), (1, 2), 2)
    grad = images(where, *ops.conv2d(x, w, bias, *conv).shape, requires_grad=True)
    conv_backward = (x.shape, w.shape, *conv)
    a, b = images(where, 2, 3, 5, requires_grad=True), images(where, 4, 5, requires_grad=True)
    linear_grad = images(where, 2, 3, 4, requires_grad=True)
    batched_w = images(where, 2, 4, 5, requires_grad=True)
    argmax = ops.max_pool2d(x, *POOL_ARGS)[1]
    pool_grad = images(where, *argmax.shape, requires_grad=True)
    fixed = [t.detach() for t in (x, w, grad)]
    pool = (2, 1, 1, 1, True)
    fused = [(x, w, bias, *conv, *pool), (x[0], w, None, *conv, *pool)]
    codes = ops.conv2d_relu_max_pool2d_with_argmax(*fused[0])[1]
    fused_grad = images(where, *codes.shape, requires_grad=True)
    return {
        "relu": [(x,), (x[0, 0, 0],), (fixed[0],)],
        "relu_with_mask": [(x,), (x[0, 0, 0],), (fixed[0],)],
        "relu_backward": [(x, fixed[0])],
        "relu_mask_backward": [(x, ops.relu_with_mask(fixed[0])[1], torch.empty_like(x).stride())],
        "linear": [(a, b), (a, b, torch.randn(4, requires_grad=True)), (a[0, 0], b), (a.detach(), b)],
        "linear_backward": [
            (linear_grad, a, b, [True, True, True]),
            (linear_grad, a, None, [False, True, False]),
            (linear_grad, None, b, [True, False, True]),
        ],
        "linear_batched": [(a, batched_w), (a, batched_w, torch.randn(2, 4, requires_grad=True)), (a[:, 0], batched_w)],
        "linear_batched_backward": [
            (linear_grad, a, batched_w, [True, True, True]),
            (linear_grad, a, None, [False, True, False]),
            (linear_grad, None, batched_w, [True, False, True]),
        ],
        "conv2d": [
            (x, w, bias, *conv),
            (x[0], w, None, *conv),
            (x, w, None, 1, (0, 1, 2, 1), 1, 2),
            (fixed[0], w, bias, *conv),
        ],
        "conv2d_backward": [
            (grad, x, w, *conv_backward, [True, True, True]),
            (grad, None, w, *conv_backward, [True, False, False]),
            (grad, x, None, *conv_backward, [False, True, True]),
            (fixed[2][0], fixed[0][0], fixed[1], x.shape[1:], *conv_backward[1:], [True, True, False]),
        ],
        "linear_relu": [(a, b), (a, b, torch.randn(4, requires_grad=True)), (a[0, 0], b)],
        "linear_relu_backward": [
            (linear_grad, linear_grad.detach(), a, b, [True, True, True]),
            (linear_grad, linear_grad.detach(), None, b, [True, False, True]),
        ],
        "conv2d_relu": [(x, w, bias, *conv), (x[0], w, None, *conv), (fixed[0], w, bias, *conv)],
        "conv2d_relu_backward": [
            (grad, fixed[2], x, w, *conv_backward, [True, True, True]),
            (grad, fixed[2], x, None, *conv_backward, [False, True, True]),
        ],
        "conv2d_relu_max_pool2d": fused,
        "conv2d_relu_max_pool2d_with_argmax": fused,
        "conv2d_relu_max_pool2d_backward": [
            (fused_grad, codes, x, w, *conv_backward, *pool, [True, True, True]),
            (fused_grad, codes, None, w, *conv_backward, *pool, [True, False, True]),
        ],
        "max_pool2d": [(x, *POOL_ARGS), (x[0], 2), (fixed[0], 2)],
        "max_pool2d_backward": [(pool_grad, argmax, (7, 6), *POOL_ARGS), (pool_grad[0], argmax[0], (7, 6), *POOL_ARGS)],
        "max_pool2d_gather": [(x, argmax, *POOL_ARGS), (x[0], argmax[0], *POOL_ARGS)],
        "max_pool2d_indices": [(argmax, (7, 6), *POOL_ARGS), (argmax[0], (7, 6), *POOL_ARGS)],
    } | ({} if where == "expanded" else {"relu_": [(fixed[0].clone(),), (place(fixed[0], where),)]})


OPS = sorted(opcheck_calls("contiguous"))
LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced", "expanded"]
CALLS = [(op, where) for op in OPS for where in LAYOUTS if (op, where) != ("relu_", "expanded")]


def test_every_op_is_opchecked():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("pyops::")}
    assert registered == set(OPS)


@pytest.mark.parametrize(("op", "where"), CALLS)
def test_opcheck(op, where):
    # Tracing is slow, and what it adds depends on the layout only by the strides, which test_faketensor compares.
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    for i, args in enumerate(opcheck_calls(where)[op]):
        tracing = ["test_aot_dispatch_dynamic"] if where in ("contiguous", "channels_last") and i == 0 else []
        torch.library.opcheck(getattr(ops, op).default, args, test_utils=tests + tracing)


@pytest.mark.parametrize(("op", "where"), [call for call in CALLS if call[0] != "relu_"])
def test_fake_strides_are_real(op, where):
    for args in opcheck_calls(where)[op]:
        args = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
        fake_args = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") if isinstance(t, torch.Tensor) else t
            for t in args
        ]
        real, fake = (getattr(ops, op)(*a) for a in (args, fake_args))
        for r, f in zip(*([t] if isinstance(t, torch.Tensor) else t for t in (real, fake)), strict=True):
            assert (r is None) == (f is None)
            if r is not None:
                assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)
