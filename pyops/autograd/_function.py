"""The base of the four ops' `torch.autograd.Function`s, which says once how an op is called and registered."""

import functools
from collections.abc import Callable
from itertools import zip_longest
from typing import Any, ClassVar

import torch
from torch._functorch.autograd_function import VmapInfo, enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from pyops import _load

Dims = tuple[int | None, ...]


class OpFunction(torch.autograd.Function):
    """A differentiable function over the operator ``torch.ops.pyops.<op>``, which has the same arguments.

    A subclass states everything about the op's derivatives as static methods: `forward`, `setup_context`, `backward`,
    `jvp` (forward mode), `vmap` (batching) and `fake` (the shape and strides of the output). The decorator
    ``implements`` names the op and registers them with torch, so that the operator itself is differentiable, can be
    batched and can be traced.

    Derivatives are computed by calling further OpFunctions, so every op can be differentiated any number of times.
    """

    call: ClassVar[Callable[..., Any]]

    @staticmethod
    def fake(*args: Any) -> Any:
        """Outputs with the right shape, dtype, device and strides, and no values."""
        raise NotImplementedError


def implements(name: str) -> Callable[[type[OpFunction]], type[OpFunction]]:
    """Makes the decorated class the OpFunction of ``torch.ops.pyops.<name>``, and gives it its `call`."""

    def register(cls: type[OpFunction]) -> type[OpFunction]:
        cls.call = getattr(torch.ops.pyops, name).default
        cls.forward = staticmethod(below_this_level(cls.forward))
        cls.jvp = staticmethod(with_forward_mode(cls.jvp))
        register_op(name, single_level(cls).apply, cls.fake, cls.vmap)
        return cls

    return register


def single_level(cls: type[OpFunction]) -> type[torch.autograd.function._SingleLevelFunction]:
    """`cls` without what `torch.autograd.Function.apply` does first: it fills in default arguments, unwraps dead
    functorch wrappers and hands the call to the transforms, in Python until torch 2.13, which costs 10 us. An
    operator's call has all its arguments, and comes here from each transform already."""
    names = ("forward", "setup_context", "backward", "jvp", "_compiled_autograd_key")
    methods = {name: staticmethod(getattr(cls, name)) for name in names}
    return type(cls.__name__, (torch.autograd.function._SingleLevelFunction,), methods)


def composition(
    name: str, fake: Callable[..., Any], vmap: Callable[..., Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes the decorated function the derivatives of ``torch.ops.pyops.<name>``, which computes the same at once.

    Where nobody wants a derivative of it the operator is called; else the function, made of OpFunctions.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        check = checks(name)

        def apply(*args: Any) -> Any:
            check(*args)
            return function(*args)

        register_op(name, apply, fake, vmap)
        return function

    return register


def in_transform() -> bool:
    """Whether this is called inside of vmap, grad, jvp, ..."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def below_this_level(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with recording on, as torch turns it off: nested transforms record the same call each on its level, and
    for those outside of the one that is recording now nothing is recorded yet."""

    @functools.wraps(forward)
    def on_the_levels_below(*args: Any) -> Any:
        if not in_transform():
            return forward(*args)
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            return forward(*args)

    return on_the_levels_below


def with_forward_mode(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """`jvp` with forward mode on, as torch turns it off for all levels of nested transforms, not for its own alone; for
    its own there are :func:`primals`."""

    @functools.wraps(jvp)
    def inner(ctx: Any, *tangents: Any) -> Any:
        if not in_transform():
            return jvp(ctx, *tangents)
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(ctx, *tangents)

    return inner


def primals(ctx: Any) -> tuple[torch.Tensor | None, ...]:
    """What was saved, without the tangents of the level that a jvp is computed for."""
    saved = ctx.saved_tensors
    return tuple(None if tensor is None else forward_ad.unpack_dual(tensor, level=0).primal for tensor in saved)


def register_op(name: str, apply: Callable[..., Any], fake: Callable[..., Any], vmap: Callable[..., Any]) -> None:
    """Tells torch of the derivatives, the shapes and the batching rule of ``torch.ops.pyops.<name>``."""
    APPLY[f"pyops::{name}"] = apply
    register_shapes(name, fake, vmap)


def register_shapes(name: str, fake: Callable[..., Any], vmap: Callable[..., Any]) -> None:
    """The same for an op that has no derivative."""
    torch.library.register_fake(f"pyops::{name}", checked(name, fake))
    register_vmap(name, vmap)


LIBRARY = torch.library.Library("pyops", "FRAGMENT")


def register_vmap(name: str, vmap: Callable[..., Any]) -> None:
    """`torch.library.register_vmap` for an op whose arguments and results are tensors and lists of numbers: the same
    contract (`custom_function_call_vmap_helper`), without the search for tensors in any structure, which takes longer
    than most ops, of `vmap(grad)` of LeNet half the time. No op is random."""
    op = getattr(torch.ops.pyops, name).default
    check = checks(name)
    defaults = [argument.default_value for argument in op._schema.arguments]
    batched = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)
    functorch = torch._C._functorch

    def kernel(*args: Any) -> Any:
        check(*args)  # a batched tensor has the sizes of a sample
        interpreter = functorch.peek_interpreter_stack()
        level = interpreter.level()
        args += tuple(defaults[len(args) :])  # torch leaves out trailing arguments that have their default value
        operands, in_dims = zip(
            *(functorch._unwrap_batched(a, level) if isinstance(a, torch.Tensor) else (a, None) for a in args),
            strict=True,
        )
        with torch._C._ExcludeDispatchKeyGuard(batched):
            if all(dim is None for dim in in_dims):  # batched on another level
                return op(*operands)
            info = VmapInfo(functorch.CVmapInterpreterPtr(interpreter).batchSize(), "error")
            rule = vmap if info.batch_size else functools.partial(vmap_of_no_samples, op)
            results, out_dims = rule(info, in_dims, *operands)
        if not op._schema.returns:
            return None
        if isinstance(results, torch.Tensor):
            return functorch._add_batch_dim(results, out_dims, level)
        return tuple(
            result if dim is None else functorch._add_batch_dim(result, dim, level)
            for result, dim in zip(results, out_dims, strict=True)
        )

    LIBRARY.impl(name, kernel, "FuncTorchBatched")


def checks(name: str) -> Callable[..., None]:
    """The checks that the operator (csrc/<op>.cpp) makes of its arguments, as a function of them.

    Where tensors or numbers have symbols for sizes, what is checked is the example that the tracer has of them. A size
    that depends on data has none: then nothing is checked before the operator runs.
    """
    check_known = _load._C.bind_checks(getattr(torch.ops.pyops, name).default)

    def check(*args: Any) -> None:
        if not check_known(*args):
            examples = [example(arg) for arg in args]
            if all(each is not UNKNOWN for each in examples):
                check_known(*examples)

    return check


UNKNOWN = object()


def example(argument: Any) -> Any:
    """An argument of an operator with numbers in the place of symbols; UNKNOWN where one of them has no example."""
    match argument:
        case torch.SymInt():
            return UNKNOWN if argument.node.hint is None else argument.node.hint
        case list() | tuple():
            numbers = [example(each) for each in argument]
            return UNKNOWN if any(each is UNKNOWN for each in numbers) else numbers
        case torch.Tensor():
            size, stride = example(tuple(argument.shape)), example(argument.stride())
            if size is UNKNOWN or stride is UNKNOWN:
                return UNKNOWN
            return torch.empty_strided(size, stride, dtype=argument.dtype, device="meta")
    return argument


def checked(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake` after the checks that the real kernels make too. torch calls it if any tensor is on the meta device."""
    check = checks(name)

    def checked_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    return checked_fake


def vmap_of_no_samples(op: Callable[..., Any], info: Any, in_dims: Dims, *args: Any) -> tuple[Any, Any]:
    """The batching rule for a vmapped dimension of size 0, which no rule could infer other sizes from: results of the
    shapes that those of one sample have, of zeros."""
    sample = (a if dim is None else a.sum(dim, dtype=a.dtype) for a, dim in zip(args, in_dims, strict=True))
    results = op(*sample)
    if isinstance(results, torch.Tensor):
        return results[None][:0], 0
    outputs = tuple(None if result is None else result[None][:0] for result in results or ())
    return outputs, dims_of(outputs)


APPLY: dict[str, Callable[..., Any]] = {}


def apply_function(name: str, args: tuple[Any, ...]) -> Any:
    """What the operators' Autograd kernel (csrc/autograd/dispatch.cpp) calls where somebody wants a derivative."""
    with enable_single_level_autograd_function():  # under torch.func.grad that kernel runs once for each level
        return APPLY[name](*args)


_load._C.set_autograd(apply_function)


def with_path_to_output(grad_output: torch.Tensor) -> torch.Tensor:
    """In the backward of a Function that does not save its output: grad_output with the path to the output that it has
    with stock, whose derivative is zeros (`Path` in csrc/autograd/node.h)."""
    if is_differentiated():
        grad_output = grad_output.clone()
        _load._C.add_path_to_output(grad_output)
    return grad_output


def add_path_to_input(grad_input: torch.Tensor) -> None:
    """In the backward of a Function that does not save its input: gives its gradient such a path to that."""
    if is_differentiated():
        _load._C.add_path_to_input(grad_input)


def add_path_to_factors(gradient: torch.Tensor) -> None:
    """In the backward of a convolution: gives one of its gradients a path to input and weight, whose derivative is
    undefined; but the gradient requires grad if they do, as stock's."""
    if is_differentiated():
        _load._C.add_path_to_factors(gradient)


def is_differentiated() -> bool:
    """In a backward: whether it is recorded, which no compiler supports."""
    return torch.is_grad_enabled() and not is_compiling()


def batch_first(tensor: torch.Tensor | None, dim: int | None, size: int) -> torch.Tensor | None:
    """`tensor` with the vmapped dimension `dim` in front; where there is none, the tensor repeated by expansion."""
    if tensor is None:
        return None
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def fold(tensor: torch.Tensor) -> torch.Tensor:
    """Merges the vmapped first dimension of images [B, N, C, H, W] or [B, C, H, W] into one batch of images."""
    return tensor.flatten(0, 1) if tensor.dim() == 5 else tensor


def unfold(tensor: torch.Tensor, *batch: int) -> torch.Tensor:
    """Undoes `fold` on a result, for an input whose first dimensions are `batch`: B and N, or B."""
    return tensor.unflatten(0, batch)


def merge(tensor: torch.Tensor | None, dim: int, groups: int = 1) -> torch.Tensor | None:
    """Merges the vmapped first dimension of a tensor into its negative dimension `dim`, inside of each of `groups`
    parts of that: [B, .., groups * n, ..] becomes [.., groups * B * n, ..]."""
    if tensor is None:
        return None
    return tensor.unflatten(dim, (groups, -1)).movedim(0, dim - 1).flatten(dim - 2, dim)


def split(tensor: torch.Tensor | None, dim: int, size: int, groups: int = 1) -> torch.Tensor | None:
    """Undoes `merge` on a result."""
    if tensor is None:
        return None
    return tensor.unflatten(dim, (groups, size, -1)).movedim(dim - 1, 0).flatten(dim - 1, dim)


def dims_of(outputs: tuple[torch.Tensor | None, ...]) -> tuple[int | None, ...]:
    """The vmapped dimension of each output, the first, where there is one."""
    return tuple(None if output is None else 0 for output in outputs)


def vmap_by_loop(call: Callable[..., Any], info: Any, in_dims: Dims, args: tuple[Any, ...]) -> tuple[Any, Any]:
    """The batching rule of last resort: one call for each sample, the results stacked. `in_dims` may be those of the
    tensors alone."""
    rows = [
        call(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip_longest(args, in_dims)))
        for i in range(info.batch_size)
    ]
    if isinstance(rows[0], torch.Tensor):
        return torch.stack(rows), 0
    outputs = tuple(None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True))
    return outputs, dims_of(outputs)
