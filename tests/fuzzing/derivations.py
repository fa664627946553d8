"""The derivations that the problems of transforms.py apply to a function: everything that torch can derive from it.

A function takes tensors and returns a tuple of tensors, and so do the functions derived from it. A problem is printed
as a test that contains the source text of these functions, so the test needs nothing but torch and pyops.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad


def normal(seed, *shapes, dtype=torch.float64):
    """Tensors of normally distributed values."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def direction(like):
    """Numbers without special values, equal for all tensors of one shape."""
    numbers = torch.linspace(1.0, 0.3 + like.numel(), like.numel(), dtype=like.dtype, device=like.device)
    return numbers.cos().reshape(like.shape)


def laid(tensor, layout):
    """The values of the tensor, stored in another layout."""
    match layout:
        case "channels_last":
            return tensor.movedim(-3, -1).contiguous().movedim(-1, -3)
        case "transposed":
            return tensor.mT.contiguous().mT
        case "sliced":
            return torch.stack([tensor, tensor], -1)[..., 0]
        case "expanded":
            return tensor[:1].expand(tensor.shape)
    return tensor


# ---- transforms of torch.func; each of them can be applied to the result of another one ----


def pull(function, argnums, curved):
    """Gradients of a scalar that is linear in the results, or not if `curved`."""

    def value(*tensors):
        return sum((r.sin() if curved else r * direction(r)).sum() for r in function(*tensors))

    return torch.func.grad(value, argnums)


def vjp(function, argnums):
    """The results, and the gradients that a direction is pulled back to."""

    def pulled(*tensors):
        results, back = torch.func.vjp(function, *tensors)
        grads = back(tuple(direction(r) for r in results))
        return *results, *(grads[i] for i in argnums)

    return pulled


def push(function, argnums, curved):
    """The tangents of the results for tangents of some arguments, which depend on these arguments if `curved`."""

    def pushed(*tensors):
        def of_chosen(*chosen):
            arguments = list(tensors)
            for i, argument in zip(argnums, chosen, strict=True):
                arguments[i] = argument
            return function(*arguments)

        chosen = tuple(tensors[i] for i in argnums)
        return torch.func.jvp(of_chosen, chosen, tuple(t.cos() if curved else direction(t) for t in chosen))[1]

    return pushed


def jacobian(function, mode, argnum, chunk_size):
    """The Jacobians of all results by one argument."""
    if mode == "forward":
        return torch.func.jacfwd(function, argnum)
    return torch.func.jacrev(function, argnum, chunk_size=chunk_size)


# ---- torch.autograd ----


def tangents(function, tensors, with_tangent, needs):
    """The results and tangents of dual numbers, and the gradients of both by the tensors that need one."""
    leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = []
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, direction(t)) if d else t for t, d in zip(leaves, with_tangent, strict=True)]
        for result in function(*duals):
            for each in forward_ad.unpack_dual(result):
                found.append(each)
                options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
                value = each.sin().sum() + sum(leaf.sum() * 0 for leaf in wanted)
                found += torch.autograd.grad(value, wanted, **options) if wanted else ()
    return tuple(found)


def second(function, tensors, needs, of, grad_needs, curved):
    """Gradients by the tensors `of`, and their gradients, or None, by all tensors and grad_outputs that need one."""
    leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    (output,) = function(*leaves)
    grad_output = direction(output).requires_grad_(grad_needs)
    first = torch.autograd.grad(output, [leaves[i] for i in of], grad_output, create_graph=True)
    found = [*first, torch.tensor([g.requires_grad for g in first])]
    used = [g.sin() if curved else g for g in first if g.requires_grad]
    if used:
        operands = [t for t in (*leaves, grad_output) if t.requires_grad]
        found += torch.autograd.grad(used, operands, [direction(g) for g in used], allow_unused=True)
    return tuple(found)


def batched(function, tensors, needs, count):
    """Gradients for several values of grad_output in one call."""
    leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    (output,) = function(*leaves)
    grads = direction(output.expand(count, *output.shape))
    return torch.autograd.grad(output, [t for t in leaves if t.requires_grad], grads, is_grads_batched=True)


def gradients(function, tensors, needs, layout):
    """The results, and the gradients if the gradient of the first result has that layout."""
    leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    results = function(*leaves)
    wanted = [t for t in leaves if t.requires_grad]
    if not wanted:
        return results
    return *results, *torch.autograd.grad(results[0], wanted, laid(direction(results[0]), layout))


def gradients_of_all(function, tensors, needs):
    """The results of a transformed function, and the gradients of a scalar, which are zeros if there are none."""
    leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    results = function(*leaves)
    value = sum(r.sin().sum() for r in results) + sum(leaf.sum() * 0 for leaf in wanted)
    return *results, *torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)


# ---- comparisons ----

LIMITS_OF_STOCK = (
    "ZeroTensors are immutable",
    "Trying to use forward AD with aten::copy",
    "NYI: Tensor.clone(memory_format) inside vmap",
    "NYI: querying is_contiguous inside of vmap for memory_format",
    "derivative for aten::copy is not implemented",
    "Expected the output of forward differentiable view operations to have the tangent have the same layout",
    "output_padding is not supported for non-transposed convolutions",
    "slow_conv2d: grad_weight must be contiguous",
)


def compare(derive, ours, stock):
    """Raises an AssertionError unless `derive` gives equal results for both functions."""
    try:
        expected = derive(stock)
    except RuntimeError as error:
        if not any(limit in str(error) for limit in LIMITS_OF_STOCK):
            raise
        return
    actual = derive(ours)
    assert len(actual) == len(expected), f"{len(actual)} results instead of {len(expected)}"
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a is None) == (e is None), f"result {i} is {a} instead of {e}"
        if e is None:
            continue
        assert (a.shape, a.dtype) == (e.shape, e.dtype), f"result {i}: {a.shape} {a.dtype}, not {e.shape} {e.dtype}"
        a, e = a.detach().double(), e.detach().double()
        scale = max(1.0, float(e.abs().max())) if e.numel() else 1.0
        same = torch.isclose(a, e, rtol=0, atol=1e-10 * scale, equal_nan=True)
        if not same.all():  # stock is wrong for grouped channels-last weights, and derivatives may amplify rounding
            e, rounded = (
                derive(lambda *t, factor=factor: stock(*(x.contiguous() * factor for x in t)))[i].detach().double()
                for factor in (1, 1 + 2**-50)
            )
            same = (a - e).abs() <= 1e-10 * scale + 1e3 * (rounded - e).abs().max()
        if not same.all():
            at = tuple((~same).nonzero()[0].tolist())
            raise AssertionError(
                f"result {i} of shape {tuple(e.shape)}: {int((~same).sum())} elements wrong, the first at {at}: "
                f"{a[at].item()!r} instead of {e[at].item()!r}"
            )


def compare_with_fakes(derive, tensors, fake, exact):
    """Raises an AssertionError unless the results of `derive` for the tensors have the shapes, strides and dtypes of
    its results for meta or fake tensors. With `exact`, this includes the strides of dimensions of one element, which
    torch's own operators do not predict."""
    real = derive(tensors)
    if fake:
        with FakeTensorMode() as mode:
            foretold = derive([mode.from_tensor(t) for t in tensors])
    else:
        meta = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors]
        foretold = derive(meta)
    for i, (r, f) in enumerate(zip(real, foretold, strict=True)):
        if r is None and f is None:
            continue
        r, f = (
            (t.dtype, tuple(t.shape), [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1 or exact])
            for t in (r, f)
        )
        assert r == f, f"result {i}: {r}, but {f} of tensors without values"
