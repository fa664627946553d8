"""Random derivations of the ops, including the fused ones, compared with those of stock in float64: transforms of
torch.func, nested in any order; forward mode; second derivatives; and the shapes and strides of tensors without values.

A problem is a short program, which is the body of the test that it is printed as.
"""

import inspect
import math
import random
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import pyops
from fuzzing import derivations, geometry

# The weights with which the ops and the kinds of problems are drawn.
OPS = {
    "conv2d": 30,
    "conv2d_relu_max_pool2d": 15,
    "max_pool2d": 14,
    "linear": 12,
    "conv2d_relu": 10,
    "linear_relu": 8,
    "relu": 6,
}
KINDS = {"chain": 60, "second": 15, "tangents": 8, "shapes": 8, "gradients": 5, "batched": 4}
LAYOUTS = ("contiguous", "contiguous", "channels_last", "channels_last", "transposed", "sliced", "expanded")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # for problems that compare no values
IMPORTS = """\
import pyops
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
"""


@dataclass(frozen=True)
class Problem:
    """A problem whose `program` is the body of a test, written with the functions of derivations.py."""

    seed: int
    name: str
    program: tuple[str, ...]

    def check(self) -> None:
        """Raises an AssertionError if pyops is wrong."""
        code = compile("\n".join(self.program), f"<problem {self.seed}>", "exec")
        exec(code, vars(derivations) | {"pyops": pyops, "torch": torch})

    def as_test(self) -> str:
        text = "\n".join(self.program)
        used = [text]
        functions = [value for value in vars(derivations).values() if inspect.isfunction(value)]
        helpers: dict[str, str] = {}
        while used:
            source = used.pop()
            for function in functions:
                if function.__name__ + "(" in source and function.__name__ not in helpers:
                    helpers[function.__name__] = inspect.getsource(function)
                    used.append(helpers[function.__name__])
        constants = f"LIMITS_OF_STOCK = {derivations.LIMITS_OF_STOCK}\n"
        body = "\n".join(f"    {line}" for line in self.program)
        test = f"def test_{self.name}_{self.seed}():\n{body}\n"
        return "\n\n".join([IMPORTS + "\n" + constants, *helpers.values(), test])


@dataclass
class Call:
    """An op and the shapes of its tensors for one sample: the part of a problem that has been drawn so far."""

    op: str
    shapes: list[tuple[int, ...]]
    options: dict[str, Any]
    pool: dict[str, Any]
    output: tuple[int, ...]
    with_indices: bool = False  # whether indices, if there are any, are returned

    def ours(self) -> str:
        name = "conv2d_relu_max_pool2d" if self.pool else self.op
        options = self.options | {n if n == "ceil_mode" else f"pool_{n}": v for n, v in self.pool.items()}
        return f"lambda *t: {self.results(f'pyops.functional.{name}', '*t', options)}"

    def stock(self) -> str:
        first, *others = self.op.split("_relu")
        value = self.results(f"torch.nn.functional.{first}", "*t", self.options)
        if not others:
            return f"lambda *t: {value}"
        value = f"torch.nn.functional.relu({value[1:-2]})"
        if self.pool:
            value = f"torch.nn.functional.max_pool2d({value}, {arguments(self.pool)})"
        return f"lambda *t: ({value},)"

    def results(self, function: str, tensors: str, options: dict[str, Any]) -> str:
        """The source of a call, as a tuple of its results."""
        if options.get("inplace"):
            tensors = "t[0] * 1"
        call = f"{function}({', '.join(filter(None, [tensors, arguments(options)]))})"
        if options.get("return_indices"):
            return call if self.with_indices else f"({call}[0],)"
        return f"({call},)"


def arguments(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def draw(seed: int) -> Problem:
    """The problem of a seed."""
    rng = random.Random(seed)
    op = rng.choices(list(OPS), list(OPS.values()))[0]
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    most_products = rng.choices((300, 3000, 20_000), (4, 4, 1))[0]
    call = draw_call(rng, op, most_products)
    program = {"chain": draw_chain, "shapes": draw_shapes}.get(kind, draw_of_autograd)(rng, seed, call, kind)
    return Problem(seed, f"{kind}_{op}", tuple(program))


# ---- the op ----


def draw_call(rng: random.Random, op: str, most_products: int) -> Call:
    if op.startswith("linear"):
        return draw_linear(rng, op, most_products)
    if op.startswith("conv2d"):
        convolution = geometry.draw_convolution(rng, most_products)
        shapes = [convolution.input, convolution.weight]
        shapes += [convolution.weight[:1]] if rng.random() < 0.6 else []
        size, pool = convolution.output, {}
        if op == "conv2d_relu_max_pool2d":
            pooling, _ = geometry.draw_pooling(rng, size)
            size, pool = pooling.output, pooling.options
        output = (*convolution.input[:-3], convolution.weight[0], *size)
        return Call(op, shapes, convolution.options, pool, output)
    while True:
        batch = () if rng.random() < 0.1 else (rng.choice(geometry.BATCHES),)
        channels = rng.choice(geometry.CHANNELS)
        pooling, size = geometry.draw_pooling(rng)
        if math.prod((*batch, channels, *size)) <= most_products // 5:
            break
    shape = (*batch, channels, *size)
    if op == "relu":
        shape = shape[rng.randint(0, len(shape)) :]
        return Call(op, [shape], {"inplace": True} if rng.random() < 0.2 else {}, {}, shape)
    options = pooling.options | ({"return_indices": True} if rng.random() < 0.2 else {})
    return Call(op, [shape], options, {}, (*batch, channels, *pooling.output))


def draw_linear(rng: random.Random, op: str, most_products: int) -> Call:
    while True:
        leading = tuple(rng.choice(geometry.BATCHES[:16]) for _ in range(rng.choice((0, 1, 1, 1, 2, 3))))
        inputs, outputs = (rng.choice(geometry.FEATURES[1:14]) for _ in range(2))
        if math.prod(leading) * inputs * outputs <= most_products:
            break
    kind = rng.random()
    if kind < 0.05:
        return Call(op, [(*leading, inputs), (inputs,)], {}, {}, leading)
    shapes = [(*leading, inputs), (outputs, inputs)]
    shapes += [] if kind < 0.35 else [(1,)] if kind < 0.45 else [(outputs,)]
    return Call(op, shapes, {}, {}, (*leading, outputs))


# ---- the kinds of problems ----


def some(rng: random.Random, count: int) -> tuple[int, ...]:
    """A random choice of at least one of the numbers below `count`."""
    return tuple(sorted(rng.sample(range(count), rng.randint(1, count))))


def flags(rng: random.Random, count: int) -> tuple[bool, ...]:
    """Random flags, of which at least one is set."""
    chosen = some(rng, count)
    return tuple(i in chosen for i in range(count))


def draw_tensors(rng: random.Random, seed: int, call: Call, more: str = "", usual: bool = True) -> list[str]:
    """The lines that make the tensors. If `usual`, they are mostly contiguous, and no two elements share their memory,
    because torch has no tangents for such tensors."""
    lines = [f"tensors = normal({', '.join(map(repr, (seed, *call.shapes)))}{more})"]
    layouts = [draw_layout(rng, shape) for shape in call.shapes]
    if usual:
        layouts = ["sliced" if layout == "expanded" else layout for layout in layouts]
    if not usual or rng.random() < 0.3:
        lines.append(f"tensors = [laid(t, how) for t, how in zip(tensors, {layouts}, strict=True)]")
    return lines


def draw_layout(rng: random.Random, shape: tuple[int, ...]) -> str:
    """A layout that a tensor of this shape can have."""
    return rng.choice([n for n in LAYOUTS if len(shape) >= {"channels_last": 3, "contiguous": 0}.get(n, 2)])


def draw_chain(rng: random.Random, seed: int, call: Call, _: str) -> list[str]:
    """A program that applies transforms in turn, the innermost first."""
    chain = Chain(rng, call)
    for _ in range(rng.choices((1, 2, 3, 4), (25, 40, 28, 7))[0]):
        chain.add(rng.choices(list(chain.STEPS), [weight for weight, _ in chain.STEPS.values()])[0])
    call.with_indices = chain.only_vmap()
    last = "return f(*tensors)"
    if rng.random() < 0.2 and not call.with_indices:
        last = f"return gradients_of_all(f, tensors, {flags(rng, len(call.shapes))})"
    return [
        *draw_tensors(rng, seed, call),
        "def derive(f):",
        *(f"    f = {step}" for step in chain.steps),
        f"    {last}",
        f"compare(derive, {call.ours()}, {call.stock()})",
    ]


class Chain:
    """Transforms, and the shapes of arguments and results after them. The shapes of the call are replaced by those of
    the arguments of the whole chain."""

    def __init__(self, rng: random.Random, call: Call):
        self.rng, self.shapes = rng, call.shapes
        self.results = [call.output]
        self.steps: list[str] = []

    def add(self, name: str) -> None:
        self.STEPS[name][1](self)

    def only_vmap(self) -> bool:
        return all(step.startswith("torch.func.vmap") for step in self.steps)

    def vmap(self, chunks: bool = True) -> None:
        rng = self.rng
        samples, batched = rng.choice((1, 2, 2, 3, 3, 5, 8)), some(rng, len(self.shapes))
        if samples * sum(math.prod(s) for s in (*self.shapes, *self.results)) > 20_000:
            samples = 1
        in_dims: list[int | None] = [None] * len(self.shapes)
        for i in batched:
            shape = self.shapes[i]
            at = rng.choice((0, rng.randint(0, len(shape))))
            in_dims[i] = rng.choice((at, at - len(shape) - 1))
            self.shapes[i] = (*shape[:at], samples, *shape[at:])
        rank = min(len(shape) for shape in self.results)
        out_dim = rng.choice((0, 0, rng.randint(-rank - 1, rank)))
        if not self.only_vmap():  # torch fails or crashes if a result does not depend on the batched arguments
            out_dim = 0
        self.results = [(samples, *shape) for shape in self.results]  # the position of `samples` does not matter
        options = f", out_dims={out_dim}" if out_dim else ""
        options += f", chunk_size={rng.randint(1, samples)}" if chunks and rng.random() < 0.08 else ""
        self.steps.append(f"torch.func.vmap(f, {tuple(in_dims)}{options})")

    def pull(self) -> None:
        argnums = some(self.rng, len(self.shapes))
        self.results = [self.shapes[i] for i in argnums]
        self.steps.append(f"pull(f, {argnums}, curved={self.rng.random() < 0.5})")

    def vjp(self) -> None:
        argnums = some(self.rng, len(self.shapes))
        self.results += [self.shapes[i] for i in argnums]
        self.steps.append(f"vjp(f, {argnums})")

    def push(self) -> None:
        argnums = some(self.rng, len(self.shapes))
        self.steps.append(f"push(f, {argnums}, curved={self.rng.random() < 0.5})")

    def jacobian(self) -> None:
        rng = self.rng
        argnum = rng.randrange(len(self.shapes))
        size = math.prod(self.shapes[argnum])
        if size * sum(map(math.prod, self.results)) > 5000:
            return self.push() if size % 2 else self.pull()
        mode = rng.choice(("forward", "reverse"))
        chunk = rng.randint(1, 4) if mode == "reverse" and rng.random() < 0.1 else None
        self.results = [(*shape, *self.shapes[argnum]) for shape in self.results]
        self.steps.append(f"jacobian(f, {mode!r}, {argnum}, chunk_size={chunk})")
        return None

    def functionalize(self) -> None:
        step = "torch.func.functionalize(f)"
        if step not in self.steps:  # torch fails if it is nested
            self.steps.append(step)

    STEPS: ClassVar = {
        "vmap": (40, vmap),
        "pull": (25, pull),
        "push": (20, push),
        "vjp": (8, vjp),
        "jacobian": (10, jacobian),
        "functionalize": (1, functionalize),
    }


def draw_of_autograd(rng: random.Random, seed: int, call: Call, kind: str) -> list[str]:
    return [
        *draw_tensors(rng, seed, call),
        f"derive = lambda f: {kind}(f, tensors, {draw_options(rng, call, kind)})",
        f"compare(derive, {call.ours()}, {call.stock()})",
    ]


def draw_options(rng: random.Random, call: Call, kind: str, linear: bool = False) -> str:
    """The arguments of a function of derivations.py besides the function and its tensors. If `linear`, they are chosen
    so that it applies no further operation to the results of the op."""
    count = len(call.shapes)
    needs = flags(rng, count)
    match kind:
        case "second":
            of = tuple(i for i in range(count) if needs[i] and rng.random() < 0.7) or (needs.index(True),)
            return f"{needs}, of={of}, grad_needs={rng.random() < 0.4}, curved={not linear and rng.random() < 0.5}"
        case "tangents":
            needs = (False,) * count if linear else rng.choice((needs, (False,) * count))
            return f"with_tangent={flags(rng, count)}, {needs=}"
        case "batched":
            return f"{needs}, count={rng.randint(1, 4)}"
        case "gradients":
            return f"{needs}, layout={draw_layout(rng, call.output)!r}"
    raise ValueError(kind)


def draw_shapes(rng: random.Random, seed: int, call: Call, _: str) -> list[str]:
    """A program for tensors of any layout and dtype, which compares shapes and strides. It uses no operator of torch
    whose fake kernel predicts these wrongly."""
    fake = rng.random() < 0.5
    if rng.random() < 0.3:
        chain = Chain(rng, call)
        chain.vmap(chunks=False)
        derive, fake = f"{chain.steps[0]}(*tensors)", False
    else:
        kind = rng.choice(("gradients", "gradients", "second", "tangents"))
        options = draw_options(rng, call, kind, linear=True)
        derive = f"{kind}(f, tensors, {options})"
    usual, exact = "tangents" in derive, derive.startswith("gradients")
    return [
        *draw_tensors(rng, seed, call, f", dtype={rng.choice(DTYPES)}", usual),
        f"f = {call.ours()}",
        f"derive = lambda tensors: {derive}",
        f"compare_with_fakes(derive, tensors, fake={fake}, exact={exact})",
    ]
