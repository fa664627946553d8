"""The base class of the ops' `torch.autograd.Function`s, and the code that registers an op with torch."""

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
    ``implements`` names the op and registers these methods with torch, so that the operator itself can be
    differentiated, batched and traced.

    Derivatives are computed by calling further OpFunctions, so every op can be differentiated any number of times.
    """

    call: ClassVar[Callable[..., Any]]

    @staticmethod
    def fake(*args: Any) -> Any:
        """Outputs that have the right shape, dtype, device and strides, but no values."""
        raise NotImplementedError


def implements(name: str) -> Callable[[type[OpFunction]], type[OpFunction]]:
    """Makes the decorated class the OpFunction of ``torch.ops.pyops.<name>`` and sets its `call`."""

    def register(cls: type[OpFunction]) -> type[OpFunction]:
        cls.call = getattr(torch.ops.pyops, name).default
        cls.forward = staticmethod(below_this_level(cls.forward))
        cls.jvp = staticmethod(with_forward_mode(cls.jvp))
        register_op(name, single_level(cls).apply, cls.fake, cls.vmap)
        return cls

    return register


def single_level(cls: type[OpFunction]) -> type[torch.autograd.function._SingleLevelFunction]:
    """`cls` without the first steps of `torch.autograd.Function.apply`, which fills in default arguments, unwraps dead
    functorch wrappers and hands the call to the transforms; until torch 2.13 it does so in Python, which is slow. The
    call of an operator has all of its arguments, and each transform has already been applied."""
    names = ("forward", "setup_context", "backward", "jvp", "_compiled_autograd_key")
    methods = {name: staticmethod(getattr(cls, name)) for name in names}
    return type(cls.__name__, (torch.autograd.function._SingleLevelFunction,), methods)


def composition(
    name: str, fake: Callable[..., Any], vmap: Callable[..., Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as the differentiable form of the fused operator ``torch.ops.pyops.<name>``.

    Both compute the same result. If no derivative is needed, the operator runs; otherwise the function runs, which
    calls OpFunctions.
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
    """`forward` with recording enabled, which torch disables. Nested transforms each record the call on their own
    level, and the outer transforms still have to record the call."""

    @functools.wraps(forward)
    def on_the_levels_below(*args: Any) -> Any:
        if not in_transform():
            return forward(*args)
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            return forward(*args)

    return on_the_levels_below


def with_forward_mode(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """`jvp` with forward mode enabled: torch disables it for all levels of nested transforms, although only the level
    of this jvp must not record. For that level, :func:`primals` removes the tangents."""

    @functools.wraps(jvp)
    def inner(ctx: Any, *tangents: Any) -> Any:
        if not in_transform():
            return jvp(ctx, *tangents)
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(ctx, *tangents)

    return inner


def primals(ctx: Any) -> tuple[torch.Tensor | None, ...]:
    """The saved tensors, without their tangents on the level that a jvp is computed for."""
    saved = ctx.saved_tensors
    return tuple(None if tensor is None else forward_ad.unpack_dual(tensor, level=0).primal for tensor in saved)


def register_op(name: str, apply: Callable[..., Any], fake: Callable[..., Any], vmap: Callable[..., Any]) -> None:
    """Registers the derivatives, the fake kernel and the batching rule of ``torch.ops.pyops.<name>``."""
    APPLY[f"pyops::{name}"] = apply
    register_shapes(name, fake, vmap)


def register_shapes(name: str, fake: Callable[..., Any], vmap: Callable[..., Any]) -> None:
    """Registers the fake kernel and the batching rule of an op; this is all for an op that has no derivative."""
    torch.library.register_fake(f"pyops::{name}", checked(name, fake))
    register_vmap(name, vmap)


LIBRARY = torch.library.Library("pyops", "FRAGMENT")


def register_vmap(name: str, vmap: Callable[..., Any]) -> None:
    """`torch.library.register_vmap` for an op whose arguments and results are tensors and lists of numbers. It has the
    same contract (`custom_function_call_vmap_helper`), but does not search arbitrary structures for tensors, which
    would take longer than most ops do. The randomness mode is irrelevant, because no op is random."""
    op = getattr(torch.ops.pyops, name).default
    check = checks(name)
    defaults = [argument.default_value for argument in op._schema.arguments]
    batched = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)
    functorch = torch._C._functorch

    def kernel(*args: Any) -> Any:
        check(*args)  # a batched tensor shows the sizes of one sample
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
    """The checks that the operator (csrc/<op>.cpp) makes of its arguments, as a function of these arguments.

    If sizes or numbers are symbolic, the examples that the tracer has for them are checked. A size that depends on data
    has no example; then nothing is checked before the operator runs.
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
    """An argument of an operator with its symbols replaced by numbers; UNKNOWN if a symbol has no example."""
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
    """`fake`, preceded by the checks of the real kernels. torch also calls it if any tensor is on the meta device."""
    check = checks(name)

    def checked_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    return checked_fake


def vmap_of_no_samples(op: Callable[..., Any], info: Any, in_dims: Dims, *args: Any) -> tuple[Any, Any]:
    """The batching rule for a vmapped dimension of size 0. No rule could infer other sizes from such an operand, so the
    op runs on one sample of zeros, whose results have the right shapes but for the vmapped dimension."""
    sample = (a if dim is None else a.sum(dim, dtype=a.dtype) for a, dim in zip(args, in_dims, strict=True))
    results = op(*sample)
    if isinstance(results, torch.Tensor):
        return results[None][:0], 0
    outputs = tuple(None if result is None else result[None][:0] for result in results or ())
    return outputs, dims_of(outputs)


APPLY: dict[str, Callable[..., Any]] = {}


def apply_function(name: str, args: tuple[Any, ...]) -> Any:
    """Differentiable form of an operator; its Autograd kernel (csrc/autograd/dispatch.cpp) calls this if it records."""
    with enable_single_level_autograd_function():  # under torch.func.grad that kernel runs once for each level
        return APPLY[name](*args)


_load._C.set_autograd(apply_function)


def with_path_to_output(grad_output: torch.Tensor) -> torch.Tensor:
    """For the backward of a Function that does not save its output: grad_output with a path to the output in the graph,
    as stock torch has it, with a derivative of zeros (`Path` in csrc/autograd/node.h)."""
    if is_differentiated():
        grad_output = grad_output.clone()
        _load._C.add_path_to_output(grad_output)
    return grad_output


def add_path_to_input(grad_input: torch.Tensor) -> None:
    """For the backward of a Function that does not save its input: gives the gradient such a path to the input."""
    if is_differentiated():
        _load._C.add_path_to_input(grad_input)


def add_path_to_factors(gradient: torch.Tensor) -> None:
    """For the backward of a convolution: gives one of its gradients a path to input and weight. The derivative along it
    is undefined, but the gradient requires grad if input or weight does, as in stock torch."""
    if is_differentiated():
        _load._C.add_path_to_factors(gradient)


def is_differentiated() -> bool:
    """Whether the backward that calls this is recorded; compilers do not support that."""
    return torch.is_grad_enabled() and not is_compiling()


def batch_first(tensor: torch.Tensor | None, dim: int | None, size: int) -> torch.Tensor | None:
    """`tensor` with the vmapped dimension `dim` in front; if it has none, the tensor is expanded to `size` samples."""
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
    """Merges the vmapped first dimension of a tensor into its dimension `dim`, which is negative, inside of each of the
    `groups` parts of that dimension: [B, .., groups * n, ..] becomes [.., groups * B * n, ..]."""
    if tensor is None:
        return None
    return tensor.unflatten(dim, (groups, -1)).movedim(0, dim - 1).flatten(dim - 2, dim)


def split(tensor: torch.Tensor | None, dim: int, size: int, groups: int = 1) -> torch.Tensor | None:
    """Undoes `merge` on a result."""
    if tensor is None:
        return None
    return tensor.unflatten(dim, (groups, size, -1)).movedim(dim - 1, 0).flatten(dim - 1, dim)


def dims_of(outputs: tuple[torch.Tensor | None, ...]) -> tuple[int | None, ...]:
    """The vmapped dimension of each output: 0, or None for an output that is None."""
    return tuple(None if output is None else 0 for output in outputs)


def vmap_by_loop(call: Callable[..., Any], info: Any, in_dims: Dims, args: tuple[Any, ...]) -> tuple[Any, Any]:
    """The batching rule of last resort: one call for each sample, whose results are stacked. `in_dims` may be shorter
    than `args` and cover the tensors alone."""
    rows = [
        call(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip_longest(args, in_dims)))
        for i in range(info.batch_size)
    ]
    if isinstance(rows[0], torch.Tensor):
        return torch.stack(rows), 0
    outputs = tuple(None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True))
    return outputs, dims_of(outputs)
