"""vmap's batching rules give right results over every choice of tensors, nested, and under derivatives."""

import itertools

import pytest
import torch
from torch import func
from twins import TWINS, all_of, squares, tangents

import pyops
from pyops.testing import gradcheck_input

every_twin = pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS)


@pytest.mark.composes("`vmap` over inputs, weights and any of them")
@every_twin
@pytest.mark.parametrize("inner", ["itself", "grad", "jvp"])
def test_vmap_over_every_choice_of_tensors(twin, inner):
    """vmap runs over the input, the weight, the bias and any of them together, in the first or another dimension."""

    def transformed(function, tensors):
        match inner:
            case "itself":
                return function
            case "grad":
                return func.grad(squares(function), all_of(tensors))
            case "jvp":
                return lambda *t: func.jvp(function, t, tangents(t))

    choices = itertools.product(*((None, 0, 1) if len(shape) > 1 else (None, 0) for shape in twin.shapes))
    for in_dims in list(choices)[1:]:
        tensors = [
            stack if d is not None else stack[0].clone()
            for stack, d in zip(twin.tensors(torch.float64, 3), in_dims, strict=True)
        ]
        tensors = [t if d is None else t.movedim(0, d) for t, d in zip(tensors, in_dims, strict=True)]
        ours, stock = (
            func.vmap(transformed(function, tensors), in_dims)(*tensors) for function in (twin.ours, twin.stock)
        )
        torch.testing.assert_close(ours, stock, msg=lambda text, dims=in_dims: f"in_dims={dims}: {text}")


CONVOLUTIONS = {  # the shapes of input and weight, and the options
    "unbatched": ((2, 5, 4), (3, 2, 3, 3), {"padding": 1}),
    "one image": ((1, 2, 6, 7), (3, 2, 2, 3), {"stride": 2}),
    "many images": ((9, 2, 4, 4), (3, 2, 3, 3), {"padding": (1, 0)}),
    "groups": ((4, 5, 4), (6, 2, 3, 3), {"groups": 2, "padding": 1}),
    "groups, images": ((2, 4, 5, 4), (6, 2, 3, 3), {"groups": 2, "dilation": (1, 1)}),
    "groups, many images": ((8, 4, 4, 4), (4, 1, 3, 2), {"groups": 4}),
    "no images": ((0, 2, 4, 4), (3, 2, 3, 3), {}),
}


@pytest.mark.composes("`vmap` over inputs, weights and any of them")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["conv2d", "conv2d_relu", "conv2d_relu_max_pool2d"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_vmap_of_convolutions(case, name, layout):
    """vmap runs over images, weights or both, for one gradient or all, however many images a sample has."""
    *shapes, options = CONVOLUTIONS[case]
    if case == "no images" and "pool" in name:
        pytest.skip("stock's max_pool2d refuses them")
    tensors = [gradcheck_input(3, *shape).detach() for shape in (*shapes, shapes[1][:1])]
    tensors = [t.movedim(-3, -1).contiguous().movedim(-1, -3) if layout != "contiguous" else t for t in tensors[:2]]
    tensors.append(gradcheck_input(3, shapes[1][0]).detach())
    pool = {"pool_kernel_size": 2} if "pool" in name else {}

    def ours(*t):
        return getattr(pyops.functional, name)(*t, **options, **pool)

    def stock(*t):
        y = torch.nn.functional.conv2d(*t, **options)
        y = y.relu() if "relu" in name else y
        return torch.nn.functional.max_pool2d(y, 2) if pool else y

    for in_dims in ((0, None, None), (None, 0, None), (None, 0, 0), (0, 0, 0), (0, None, 0)):
        chosen = [t if d is not None else t[0] for t, d in zip(tensors, in_dims, strict=True)]
        for argnums in (None, (0,), (1,), (2,), (0, 1, 2)):
            actual, expected = (
                func.vmap(f if argnums is None else func.grad(squares(f), argnums), in_dims)(*chosen)
                for f in (ours, stock)
            )
            message = f"in_dims={in_dims}, gradients of {argnums}"
            torch.testing.assert_close(actual, expected, msg=lambda text, where=message: f"{where}: {text}")


def test_vmap_over_nothing():
    """There may be no samples, or samples without channels, for which stock fails."""
    images, weight = torch.ones(0, 2, 3, 4, 4), torch.ones(5, 3, 2, 2)
    f = pyops.functional
    assert func.vmap(f.conv2d, (0, None))(images, weight).shape == (0, 2, 5, 3, 3)  # stock's is (0, 0, 5, 3, 3)
    assert func.vmap(lambda x: f.max_pool2d(x, 2))(images).shape == (0, 2, 3, 2, 2)
    assert func.vmap(f.linear, (0, None))(torch.ones(0, 2, 3), torch.ones(4, 3)).shape == (0, 2, 4)
    empty, weights, bias = torch.ones(6, 2, 0, 4, 4), torch.ones(6, 3, 0, 2, 2), torch.ones(3)
    assert func.vmap(f.conv2d, (0, 0, None))(empty, weights, bias).shape == (6, 2, 0, 3, 3)


@pytest.mark.composes("nested `vmap`")
@every_twin
def test_nested_vmap(twin):
    tensors = twin.tensors(torch.float64, 2, 3)
    torch.testing.assert_close(func.vmap(func.vmap(twin.ours))(*tensors), func.vmap(func.vmap(twin.stock))(*tensors))
    by_chunks = func.vmap(func.vmap(twin.ours), chunk_size=1)(*tensors)
    torch.testing.assert_close(by_chunks, func.vmap(func.vmap(twin.stock))(*tensors))


@pytest.mark.composes("nested `vmap`")
@every_twin
def test_grad_of_vmap(twin):
    tensors = twin.tensors(torch.float64, 3)
    ours, stock = (
        func.grad(squares(func.vmap(function)), all_of(tensors))(*tensors) for function in (twin.ours, twin.stock)
    )
    torch.testing.assert_close(ours, stock)


BACKWARD_OPS = {  # a call's arguments, and those of its backward op between grad_output and the options
    "linear": (((5, 4), (3, 4)), (), lambda x, w, kept: (x, w)),
    "linear_relu": (((5, 4), (3, 4)), (), lambda x, w, kept: (kept, x, w)),
    "conv2d": (((9, 2, 4, 4), (3, 2, 3, 3)), (1, 1, 1, 1), lambda x, w, kept: (x, w, x.shape, w.shape)),
    "conv2d_relu": (((9, 2, 4, 4), (3, 2, 3, 3)), (1, 1, 1, 1), lambda x, w, kept: (kept, x, w, x.shape, w.shape)),
    "conv2d_relu_max_pool2d_with_argmax": (
        ((9, 2, 4, 4), (3, 2, 3, 3)),
        (1, 1, 1, 1, 2, 2, 0, 1, False),
        lambda x, w, kept: (kept, x, w, x.shape, w.shape),
    ),
}


@pytest.mark.parametrize("name", BACKWARD_OPS)
def test_vmap_of_backward_operators(name):
    """Backward operators that are not differentiated again run under vmap, for one gradient or all, and many images."""
    shapes, options, arguments = BACKWARD_OPS[name]
    ops = torch.ops.pyops
    op, backward = getattr(ops, name), getattr(ops, name.removesuffix("_with_argmax") + "_backward")
    input, weight = (gradcheck_input(3, *shape).detach() for shape in shapes)
    for in_dims, mask in itertools.product(
        ((0, 0), (0, None), (None, 0)), ([True, False, False], [False, True, True], [True] * 3)
    ):

        def gradients(x, w, mask=mask):
            results = op(x, w, None, *options)
            output, kept = results if isinstance(results, tuple) else (results, results)
            grads = backward(output.cos(), *arguments(x, w, kept), *options, mask)
            return tuple(grad for grad in grads if grad is not None)

        chosen = [t if d == 0 else t[0] for t, d in zip((input, weight), in_dims, strict=True)]
        repeated = [t if d == 0 else t.expand(3, *t.shape) for t, d in zip(chosen, in_dims, strict=True)]
        loop = [gradients(*sample) for sample in zip(*repeated, strict=True)]
        expected = [torch.stack(rows) for rows in zip(*loop, strict=True)]
        with torch.no_grad():
            torch.testing.assert_close(func.vmap(gradients, in_dims)(*chosen), tuple(expected))
