"""Draws the calls of `fuzzing.hostile`: valid calls of every operator, and mutations of these."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import func
from torch.utils._python_dispatch import TorchDispatchMode

from pyops import functional

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = (*FLOATING, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16)
DTYPES += (torch.complex64, torch.complex128, torch.float8_e4m3fn)
# There is no number between the small and the huge ones: a padding of 10,000 is allowed and gives gigabytes of output.
SMALL = (0, 1, 2, 3, 4, 5, -1, -2)
HUGE = (2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), -(2**63) - 1)
# Conversions to tensors that are not strided. Quantized and nested tensors are made by calls instead of methods.
FORMS = (".to_sparse()", ".to_mkldnn()", ".to_sparse_csr()", "nested", "quantized")


@dataclass(frozen=True)
class Placed:
    """A tensor argument, given by strides over memory of its own."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    offset: int = 0
    start: int = 0  # the memory holds the integers from -3 to 8 in turn, beginning with this one of them
    scale: int = 1  # a factor of the integers
    grad: str = ""  # "leaf" or "inner" if it requires grad
    form: str = ""
    elsewhere: bool = False  # on the meta device, unlike the other tensors

    def source(self) -> str:
        """The expression that makes the tensor on `device`."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        count = self.offset + (last + 1 if 0 not in self.shape else 0)
        place = f"as_strided({self.shape}, {self.strides}, {self.offset})"
        device = "'meta'" if self.elsewhere else "device"
        memory = f"torch.arange({self.start}, {self.start + count}, device={device}).remainder(12).sub(3)"
        memory += f".mul({self.scale})" * (self.scale != 1) + f".to({self.dtype})"
        if self.form == "quantized":
            return f"torch.quantize_per_tensor({memory}.float().{place}, 0.1, 0, torch.qint8)"
        if self.form == "nested":
            return f"torch.nested.nested_tensor([{memory}.{place}])"
        if self.form:
            return f"{memory}.{place}{self.form}"
        if self.grad == "inner":
            return f"{memory}.requires_grad_().mul(1).{place}"
        return f"{memory}.{place}" + ".requires_grad_()" * (self.grad == "leaf")


Argument = Placed | Any  # anything else is a literal


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= max(size, 1)
    return tuple(reversed(strides))


# ---- valid calls ----


def images_program(name: str, rng: random.Random) -> tuple[Callable[..., Any], list[tuple[int, ...]]]:
    """A call of a function on images, and the shapes of its tensors."""
    groups, dilation = rng.choice((1, 1, 2)), rng.choice((1, 1, 2))
    channels, outputs = groups * rng.randint(1, 2), groups * rng.randint(1, 3)
    kernel = rng.randint(1, 3), rng.randint(1, 3)
    batch = rng.choice(((), (1,), (2,), (9,), (0,)))
    image = (*batch, channels, rng.randint(9, 11), rng.randint(9, 11))
    window = {"stride": rng.randint(1, 2), "padding": rng.choice((0, 1, (0, 1))), "dilation": dilation}
    pool = {"kernel_size": rng.choice((2, (2, 3), 3)), "stride": rng.choice((1, 2)), "padding": rng.choice((0, 1))}
    pool["ceil_mode"] = rng.random() < 0.3
    if name == "max_pool2d":
        if rng.random() < 0.1:  # gives an argmax of int64
            pool |= {"kernel_size": (16, 17), "padding": (8, 8)}
        return partial(functional.max_pool2d, **pool, return_indices=True), [image]
    if name == "conv2d_relu_max_pool2d":
        window |= {"pool_" * (key != "ceil_mode") + key: value for key, value in pool.items()}
    shapes = [image, (outputs, channels // groups, *kernel), *[(outputs,)] * rng.randint(0, 1)]
    return partial(getattr(functional, name), **window, groups=groups), shapes


def program(name: str, rng: random.Random) -> tuple[Callable[..., Any], list[tuple[int, ...]]]:
    """A call of any function, and the shapes of its tensors."""
    if name == "relu":
        shape = tuple(rng.randint(0, 5) for _ in range(rng.randint(0, 5)))
        return partial(functional.relu, inplace=rng.random() < 0.5), [shape]
    if name.startswith("linear"):
        features, outputs = rng.randint(1, 5), rng.randint(1, 5)
        rows = tuple(rng.randint(0, 4) for _ in range(rng.randint(0, 3)))
        return getattr(functional, name), [(*rows, features), (outputs, features), *[(outputs,)] * rng.randint(0, 1)]
    return images_program(name, rng)


def first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def run_backward(function: Callable[..., Any], tensors: list[torch.Tensor]) -> None:
    tensors = [t.requires_grad_() for t in tensors]
    grads = torch.autograd.grad(first(function(*(t * 1 for t in tensors))).sum(), tensors, create_graph=True)
    torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors, allow_unused=True)


def run_gradient(function: Callable[..., Any], tensors: list[torch.Tensor]) -> None:
    tensors = [t.requires_grad_() for t in tensors]
    first(function(*(t * 1 for t in tensors))).sum().backward()


def run_vmap(function: Callable[..., Any], tensors: list[torch.Tensor]) -> None:
    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return first(function(*(t * 1 for t in tensors))).sum()

    stacked = [torch.stack([t, t]) for t in tensors]
    func.vmap(func.grad(loss, tuple(range(len(tensors)))))(*stacked)


def run_jvp(function: Callable[..., Any], tensors: list[torch.Tensor]) -> None:
    func.jvp(lambda *t: first(function(*(each * 1 for each in t))), tuple(tensors), tuple(tensors))


WAYS = {
    "call": lambda function, tensors: function(*tensors),
    "gradient": run_gradient,
    "backward": run_backward,
    "vmap": run_vmap,
    "jvp": run_jvp,
}


class Recorder(TorchDispatchMode):
    """Records the calls of pyops' operators, with all of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Any]]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "pyops":
            rest = [argument.default_value for argument in op._schema.arguments[len(args) :]]
            self.calls.append((op._schema.name.removeprefix("pyops::"), [*args, *rest]))
        return op(*args, **(kwargs or {}))


VARIANTS = 40  # the number of variants of each program


@cache
def recorded(name: str, way: str, variant: int) -> list[tuple[str, list[Argument]]]:
    """The calls of operators that a function and its derivatives make."""
    rng = random.Random(variant)
    function, shapes = program(name, rng)
    dtype = rng.choice(FLOATING)
    with Recorder() as recorder:
        WAYS[way](function, [torch.ones(shape, dtype=dtype) for shape in shapes])
    return [(op, [described(argument) for argument in arguments]) for op, arguments in recorder.calls]


def described(argument: Any) -> Argument:
    if isinstance(argument, torch.Tensor):
        scale = 2**60 + 1 if argument.dtype == torch.int64 and argument.numel() % 3 == 0 else 1
        return Placed(tuple(argument.shape), argument.stride(), argument.dtype, scale=scale)
    return list(argument) if isinstance(argument, list | tuple) else argument


def operators() -> list[str]:
    schemas = torch._C._jit_get_all_schemas()
    return sorted({s.name.removeprefix("pyops::") for s in schemas if s.name.startswith("pyops::")})


@cache
def programs() -> dict[str, list[tuple[str, str]]]:
    """For each operator, the functions that call it and the kinds of calls that do."""
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in operators()}
    for name in functional.__all__:
        for way in WAYS:
            for op in {op for variant in range(6) for op, _ in recorded(name, way, variant)}:
                found[op].append((name, way))
    return found


def valid_operator_call(op: str, rng: random.Random) -> list[Argument]:
    """The arguments of a valid call of an operator, or arbitrary ones if no function calls it."""
    for _ in range(20 if programs()[op] else 0):
        calls = recorded(*rng.choice(programs()[op]), rng.randrange(VARIANTS))
        calls = [arguments for name, arguments in calls if name == op]
        if calls:
            return list(rng.choice(calls))
    return [any_argument(rng) for _ in getattr(torch.ops.pyops, op).default._schema.arguments]


def valid_function_call(name: str, rng: random.Random) -> tuple[list[Argument], dict[str, Any]]:
    function, shapes = program(name, rng)
    dtype = rng.choice(FLOATING)
    options = dict(function.keywords) if isinstance(function, partial) else {}
    return [Placed(shape, contiguous(shape), dtype) for shape in shapes], options


# ---- mutations ----


def any_number(rng: random.Random) -> int:
    return rng.choice(SMALL if rng.random() < 0.7 else HUGE)


def any_list(rng: random.Random) -> list[Any]:
    return [any_number(rng) for _ in range(rng.randint(0, 5))]


def any_tensor(rng: random.Random) -> Placed:
    shape = tuple(rng.choice((0, 1, 1, 2, 3, 4, 7)) for _ in range(rng.randint(0, 7)))
    return Placed(shape, contiguous(shape), rng.choice(DTYPES))


def any_argument(rng: random.Random) -> Argument:
    kinds = (any_number, any_list, any_tensor, any_tensor, any_tensor)
    others = (None, True, False, 1.5, float("nan"), "same", [True, False, True], [True] * 2, [None], [1.5, 2], {}, 1j)
    return rng.choice(kinds)(rng) if rng.random() < 0.75 else rng.choice(others)


def with_shape(tensor: Placed, shape: Sequence[int]) -> Placed:
    return replace(tensor, shape=tuple(shape), strides=contiguous(shape))


def other_shape(tensor: Placed, rng: random.Random) -> Placed:
    shape = list(tensor.shape)
    at = rng.randrange(len(shape)) if shape else 0
    match rng.randrange(4):
        case 0:
            shape.insert(at, rng.choice((0, 1, 1, 2)))
        case 1 if shape:
            del shape[at]
        case 2 if shape:
            shape[at] = rng.choice((0, 1, 2, shape[at] + 1, max(shape[at] - 1, 0), 2 * shape[at]))
        case _:
            rng.shuffle(shape)
    return with_shape(tensor, shape)


def other_strides(tensor: Placed, rng: random.Random) -> Placed:
    """The tensor with other strides: in another order, with gaps, expanded, overlapping, or arbitrary."""
    rank, strides = len(tensor.shape), list(tensor.strides)
    match rng.randrange(5):
        case 0:
            order = rng.sample(range(rank), rank)
            dense = contiguous([tensor.shape[d] for d in order])
            strides = [dense[order.index(d)] for d in range(rank)]
        case 1:
            strides = [2 * stride for stride in strides]
        case 2 if rank:
            strides[rng.randrange(rank)] = 0
        case 3 if rank >= 3:  # channels-last
            order = [*range(rank - 3), rank - 2, rank - 1, rank - 3]
            dense = contiguous([tensor.shape[d] for d in order])
            strides = [dense[order.index(d)] for d in range(rank)]
        case _:
            strides = [rng.choice((0, 1, 1, 2, 3, 5, 8)) for _ in strides]
    return replace(tensor, strides=tuple(strides), offset=rng.choice((0, 0, 1, 3)))


def other_tensor(tensor: Placed, rng: random.Random) -> Argument:
    if tensor.form:
        return None
    chance = rng.random()
    if chance < 0.4:
        return other_shape(tensor, rng)
    if chance < 0.6:
        return other_strides(tensor, rng)
    if chance < 0.75:
        return replace(tensor, dtype=rng.choice(DTYPES))
    if chance < 0.8 and len(tensor.shape) == 2 and not tensor.elsewhere:
        return replace(with_shape(tensor, tensor.shape), dtype=torch.float32, form=rng.choice(FORMS))
    if chance < 0.85:
        return replace(tensor, elsewhere=True)
    if chance < 0.9:
        return None
    return any_argument(rng)


def other_list(numbers: list[Any], rng: random.Random) -> Argument:
    changed = list(numbers)
    at = rng.randrange(len(changed)) if changed else 0
    match rng.randrange(6):
        case 0 if changed:
            del changed[at]
        case 1:
            changed.insert(at, any_number(rng))
        case 2 if changed and type(changed[at]) is bool:
            changed[at] = not changed[at]
        case 2 | 3 if changed:
            changed[at] = any_number(rng)
        case 4:
            return any_number(rng)
        case _:
            return any_argument(rng) if rng.random() < 0.5 else any_list(rng)
    return changed


def mutated(argument: Argument, rng: random.Random) -> Argument:
    if isinstance(argument, Placed):
        return other_tensor(argument, rng)
    if isinstance(argument, list | tuple):
        return other_list(list(argument), rng)
    if type(argument) is bool and rng.random() < 0.7:
        return not argument
    if type(argument) is int and rng.random() < 0.7:
        return any_number(rng) if rng.random() < 0.6 else any_list(rng)
    return any_argument(rng)


def with_values(argument: Argument, rng: random.Random) -> Argument:
    """The argument with values unlike those of other arguments, and perhaps with a gradient that is wanted."""
    if isinstance(argument, Placed):
        argument = replace(argument, start=rng.randrange(12))
    if isinstance(argument, Placed) and (argument.dtype.is_floating_point or argument.dtype.is_complex):
        return replace(argument, grad=rng.choice(("", "", "leaf", "inner" if argument.dtype in FLOATING else "leaf")))
    return argument
