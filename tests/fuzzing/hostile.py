"""Nonsensical calls of every operator of `torch.ops.pyops` and every function of `pyops.functional`.

Most calls are valid ones in which one or two arguments were changed (`fuzzing.hostile_calls`). Whatever the arguments
are, a call returns a result, or it raises the exception that torch's own functions raise for bad arguments and has
written nothing. It never crashes, and it never fails an internal assertion or raises an exception of Python's own. If
the call is made on meta tensors or fake tensors, with or without symbols for sizes, it has results of equal shapes,
dtypes and strides, or raises an exception of equal type. vmap refuses a call that is refused for each sample.
"""

import random
import re
import textwrap
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from oracle import assert_same_strides
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_leaves

from fuzzing import hostile_calls
from fuzzing.hostile_calls import Argument, Placed, contiguous, mutated, with_values
from pyops import functional

# ---- outcomes ----

Outcome = list[Any] | Exception  # the results, or the exception that refused the call

# Messages that no refusal may have, because they report a fault of an implementation instead of a rule and the value
# that broke it. torch's own conversion of a tensor into a list of integers fails an internal assertion if sizes may be
# symbolic.
FAULTY = re.compile(
    r"(?<!isIntegral\( false\) )INTERNAL ASSERT(?!.*Expected IntList but got GenericList)"
    r"|ArrayRef: invalid|vector::|basic_string|std::"
    r"|zip\(\) argument|unsupported operand|not supported between|' object |has no len|cannot unpack|values to unpack"
    r"|index out of range|missing .* required"
)
# Messages of refusals by torch itself, before or after the operator runs, which depend on the device. The outcomes are
# not compared then.
TORCHS_OWN = re.compile(
    "There were no tensor arguments"
    "|but instead found type '(Fake)?Tensor'"  # a tensor of one value converts to a number if it has a value
    "|must be Tensor, not None"  # in inference mode the kernel reports an undefined tensor instead
    "|Expected IntList but got GenericList|_local_scalar_dense|storage of (BatchedTensorImpl|TensorWrapper)"  # likewise
    "|isIntegral\\( false\\)"  # a tensor of booleans is no list of numbers, which torch asserts
    "|autocast::prioritize"  # the message of a refusal shows a tensor of 8-bit floats, which fails under autocast
    "|cannot be represented as a SymInt"  # a huge number is checked if it is a plain integer
    "|a function that has non-empty output"  # jvp refuses a backward op of which no gradient is asked for
    "|can't allocate memory"  # tensors without values need none
    "|more than one element of the written-to tensor"  # in forward mode a tangent gets the strides of its primal
)
LARGEST = 1 << 24  # bytes; calls with larger results are not made


def outcome(function: str, call: Callable[[], Any]) -> Outcome:
    """The outcome of a call. Raises an AssertionError for an exception that is no refusal."""
    try:
        return tree_leaves(call())
    except Exception as error:
        # torch's error may come from its attempt to show an argument. Then it keeps a guard in one of its frames, which
        # sets the state of the thread, autocast included, back to what it was there.
        traceback.clear_frames(error.__traceback__)
        torch.set_autocast_enabled("cpu", False)
        message = str(error).partition("\n")[0]  # torch adds a schema or a trace after it
        faulty = FAULTY.search(message)
        allowed = isinstance(error, RuntimeError | TypeError | ValueError) and not isinstance(error, RecursionError)
        allowed |= isinstance(error, IndexError) and "Dimension" in message
        assert allowed and not faulty, f"{function} raised {described(error)}"
        return error


def described(result: Outcome) -> str:
    return f"{type(result).__name__}: {result}" if isinstance(result, Exception) else "a result"


def tensors_of(results: list[Any]) -> list[torch.Tensor]:
    return [each for each in results if isinstance(each, torch.Tensor)]


def known(size: Any) -> tuple[int, ...]:
    return tuple(n.node.hint if isinstance(n, torch.SymInt) else n for n in size)


def compare(what: str, other: Outcome, real: Outcome, strides: bool) -> None:
    """Compares the outcome on tensors without values with that on the CPU, with or without the strides."""
    if any(isinstance(each, Exception) and TORCHS_OWN.search(str(each)) for each in (other, real)):
        return
    if isinstance(real, Exception) or isinstance(other, Exception):
        assert type(other) is type(real), f"{what}: {described(other)!r}, on cpu {described(real)!r}"
        return
    ours, expected = ([t for t in each if t is not None] for each in (other, real))
    assert len(ours) == len(expected), f"{what}: {len(ours)} results instead of {len(expected)}"
    for one, like in zip(ours, expected, strict=True):
        kind, kind_on_cpu = ((known(t.shape), t.dtype, t.layout) for t in (one, like))
        assert kind == kind_on_cpu, f"{what}: {kind}, on cpu {kind_on_cpu}"
        if strides:
            placed = torch.empty_strided(known(one.shape), known(one.stride()), device="meta")
            assert_same_strides(what, placed, like)


def fake(mode: FakeTensorMode, arg: Any) -> Any:
    """A fake tensor of that mode for a tensor."""
    if not isinstance(arg, torch.Tensor):
        return arg
    if arg.layout is not torch.strided:
        return mode.from_tensor(arg)
    if arg.is_leaf:
        like = torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device=arg.device)
        return like.requires_grad_(arg.requires_grad)
    memory = torch.empty(arg.untyped_storage().nbytes() // arg.element_size(), dtype=arg.dtype, device=arg.device)
    return memory.requires_grad_().mul(1).as_strided(arg.shape, arg.stride(), arg.storage_offset())


def with_symbols(mode: FakeTensorMode, arg: Any) -> Any:
    """A fake tensor of that mode for a tensor, with a symbol for every size."""
    if not isinstance(arg, torch.Tensor):
        return arg
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * arg.dim())
    return mode.from_tensor(arg.detach(), symbolic_context=context).requires_grad_(arg.requires_grad)


def contents(args: list[Any]) -> list[torch.Tensor]:
    """The bytes of the strided tensors among the arguments."""
    tensors = [t.detach() for t in tensors_of(args) if t.layout is torch.strided and not t.is_nested]
    dense = [t.clone(memory_format=torch.contiguous_format) for t in tensors if not (t.is_quantized or t.is_meta)]
    return [t.reshape(-1).view(torch.uint8) for t in dense]


# ---- problems ----

# The code that runs with `call`, the arguments `args`, and the positions `chosen` of some tensors among them.
CONTEXTS = {
    "plain": "return call(*args)",
    "no_grad": "with torch.no_grad():\n    return call(*args)",
    "inference_mode": "with torch.inference_mode():\n    return call(*args)",
    "autocast": "with torch.autocast('cpu', torch.bfloat16):\n    return call(*args)",
    "backward": """
        results = present(call(*args))
        wanted = [t for t in results if t.requires_grad]
        if wanted:
            torch.autograd.backward(wanted, [torch.ones_like(t) for t in wanted])
        return results""",
    "double backward": """
        results = present(call(*args))
        leaves = [t for t in args if isinstance(t, torch.Tensor) and t.requires_grad]
        if any(t.requires_grad for t in results):
            sums = sum(t.sum() for t in results if t.requires_grad)
            grads = present(torch.autograd.grad(sums, leaves, create_graph=True, allow_unused=True))
            if any(g.requires_grad for g in grads):
                sum(g.square().sum() for g in grads).backward()
        return results""",
    "vmap": "return torch.func.vmap(function, in_dims)(*(args[i] for i in chosen))",
    "grad": """
        def total(*tensors):
            return sum((t.sum() for t in function(*tensors) if t.is_floating_point()), torch.zeros(()))
        return torch.func.grad(total, tuple(range(len(chosen))))(*(args[i] for i in chosen))""",
    "jvp": """
        tensors = tuple(args[i] for i in chosen)
        return torch.func.jvp(function, tensors, tuple(map(torch.ones_like, tensors)))""",
}
TRANSFORMS = ("vmap", "grad", "jvp")

SOURCE = """
def arguments(device):
    return [
{arguments}
    ]


def present(results):
    return tuple(t for t in (results if isinstance(results, tuple) else (results,)) if t is not None)


def run(args):
    call, chosen, in_dims = {function}, {chosen}, {in_dims}

    def function(*tensors):
        return present(call(*(tensors[chosen.index(i)] if i in chosen else a for i, a in enumerate(args))))

{body}
"""

TEST = """
import functools

import torch
from torch._subclasses import FakeTensorMode

import pyops

{source}

def test_hostile_{seed}():
    outcomes = []
    for mode, device in ((torch.enable_grad, "cpu"), (torch.enable_grad, "meta"), (FakeTensorMode, "cpu")):
        try:
            with mode():
                results = run(arguments(device))
            outcomes.append([(t.shape, t.dtype) for t in torch.utils._pytree.tree_leaves(results)])
        except (RuntimeError, TypeError, ValueError) as error:
            outcomes.append(type(error))
            assert "INTERNAL ASSERT" not in str(error)
    assert outcomes[0] == outcomes[1] == outcomes[2]
"""


@dataclass(frozen=True)
class Problem:
    """A call and the context in which it is made."""

    seed: int
    function: str
    arguments: tuple[Argument, ...]
    options: tuple[tuple[str, Any], ...] = ()
    context: str = "plain"
    chosen: tuple[int, ...] = ()  # the tensors among the arguments that are transformed
    in_dims: tuple[int, ...] = ()

    def source(self, context: str) -> str:
        """The source of the functions `arguments`, which takes a device, and `run`, which takes arguments."""
        arguments = (a.source() if isinstance(a, Placed) else literal(a) for a in self.arguments)
        options = ", ".join(f"{key}={literal(value)}" for key, value in self.options)
        return SOURCE.format(
            arguments="\n".join(f"        {each}," for each in arguments),
            function=f"functools.partial({self.function}, {options})" if options else self.function,
            chosen=self.chosen,
            in_dims=self.in_dims,
            body=textwrap.indent(textwrap.dedent(CONTEXTS[context]).strip(), "    "),
        )

    def functions(self, context: str) -> tuple[Callable[[str], list[Any]], Callable[[list[Any]], Any]]:
        names: dict[str, Any] = {}
        exec("import functools\nimport torch\nimport pyops\n" + self.source(context), names)
        return names["arguments"], names["run"]

    def as_test(self) -> str:
        return TEST.format(seed=self.seed, source=self.source(self.context)).lstrip()

    def check(self) -> None:
        """Raises an AssertionError that says what is wrong."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.check_outcomes()

    def check_outcomes(self) -> None:
        arguments, run = self.functions(self.context)
        args = arguments("cpu")
        others = self.without_values(args, arguments, run)
        meta = others.get("meta")
        if isinstance(meta, list) and sum(t.nbytes for t in tensors_of(meta)) > LARGEST:
            return
        before = contents(args)
        real = outcome(self.function, lambda: run(args))
        if not self.writes() or (isinstance(real, Exception) and self.context not in TRANSFORMS):
            assert all(map(torch.equal, contents(args), before)), f"{self.function}: an argument was changed"
        for what, other in others.items():
            # Samples that vmap turns into channels may be laid out in either memory format.
            compare(f"{self.function} on {what}", other, real, strides=self.context != "vmap")
        if self.context == "vmap":
            self.check_samples(arguments("cpu"), real)
        elif not self.writes() and isinstance(real, Exception) and not TORCHS_OWN.search(str(real)):
            plain = outcome(self.function, lambda: self.plain(arguments("cpu")))
            assert isinstance(plain, Exception), (
                f"{self.function} is accepted, but {self.context} raises {described(real)}"
            )

    def without_values(
        self, args: list[Any], arguments: Callable[[str], list[Any]], run: Callable[[list[Any]], Any]
    ) -> dict[str, Outcome]:
        """The outcomes on tensors without values, as far as torch can make such tensors from the arguments."""
        tensors = [a for a in self.arguments if isinstance(a, Placed)]
        outcomes: dict[str, Outcome] = {}
        strided = not any(t.elsewhere or t.form for t in tensors)
        if strided and self.context != "autocast":  # because autocast is the CPU's
            outcomes["meta"] = outcome(self.function, lambda: run(arguments("meta")))
        if all(t.form in ("", ".to_sparse()") for t in tensors):
            mode = FakeTensorMode()
            with mode:
                fakes = [fake(mode, arg) for arg in args]
                outcomes["fake"] = outcome(self.function, lambda: run(fakes))
        # Symbolic sizes are slow.
        if strided and self.seed % 4 == 0 and self.context in ("plain", "backward") and not self.writes():
            mode = FakeTensorMode(shape_env=ShapeEnv())
            symbolic = [with_symbols(mode, arg) for arg in args]
            with mode:
                outcomes["symbolic"] = outcome(self.function, lambda: run(symbolic))
        return outcomes

    def writes(self) -> bool:
        return self.function.endswith("relu_") or bool(dict(self.options).get("inplace"))

    def plain(self, args: list[Any]) -> Any:
        return self.functions("plain")[1](args)

    def check_samples(self, args: list[Any], real: Outcome) -> None:
        """Checks that vmap refuses a call that samples are refused, and otherwise gives results of their shapes."""
        of_sample: Outcome | None = None
        for i in range(args[self.chosen[0]].shape[self.in_dims[0]]):
            own = list(args)
            for at, dim in zip(self.chosen, self.in_dims, strict=True):
                own[at] = args[at].select(dim, i)
            of_sample = outcome(self.function, lambda own=own: self.plain(own))
        if of_sample is None:
            return
        if isinstance(real, Exception) and TORCHS_OWN.search(str(real)):
            return
        same = isinstance(real, Exception) == isinstance(of_sample, Exception)
        assert same, f"{self.function}: by vmap {described(real)!r}, one sample {described(of_sample)!r}"
        if isinstance(real, list):
            shapes, expected = [t.shape[1:] for t in tensors_of(real)], [t.shape for t in tensors_of(of_sample)]
            assert shapes == expected, f"{self.function}: by vmap {shapes}, one sample {expected}"


def literal(value: Any) -> str:
    return "float('nan')" if value != value else repr(value)


# ---- drawing ----


def draw(seed: int) -> Problem:
    rng = random.Random(seed)
    options: dict[str, Any] = {}
    if rng.random() < 0.75:
        name = rng.choice(hostile_calls.operators())
        function, arguments = f"torch.ops.pyops.{name}", hostile_calls.valid_operator_call(name, rng)
    else:
        name = rng.choice(functional.__all__)
        function = f"pyops.functional.{name}"
        arguments, options = hostile_calls.valid_function_call(name, rng)
    if rng.random() < 0.04:
        arguments = [hostile_calls.any_argument(rng) for _ in arguments]
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3))):
        at = rng.randrange(len(arguments) + len(options))
        if at < len(arguments):
            arguments[at] = mutated(arguments[at], rng)
        else:
            key = list(options)[at - len(arguments)]
            options[key] = mutated(options[key], rng)
    arguments = [with_values(argument, rng) for argument in arguments]
    options = {key: None if isinstance(value, Placed) else value for key, value in options.items()}
    problem = Problem(seed, function, tuple(arguments), tuple(options.items()), rng.choice((*CONTEXTS, "plain")))
    return transformed(problem, rng) if problem.context in TRANSFORMS else problem


def transformed(problem: Problem, rng: random.Random) -> Problem:
    """The problem with tensors chosen for its transform, which get one more dimension for vmap. Without tensors, the
    problem is plain."""
    arguments = list(problem.arguments)
    usual = [i for i, a in enumerate(arguments) if isinstance(a, Placed) and not a.form]
    if problem.context != "vmap":
        usual = [i for i in usual if arguments[i].dtype.is_floating_point]
    if not usual:
        return replace(problem, context="plain")
    chosen = sorted(rng.sample(usual, rng.randint(1, len(usual))))
    in_dims = []
    size = rng.choice((0, 1, 2, 2, 3, 9))
    for i in chosen if problem.context == "vmap" else ():
        shape = list(arguments[i].shape)
        in_dims.append(rng.choice((0, 0, rng.randint(0, len(shape)))))
        shape.insert(in_dims[-1], size)
        arguments[i] = replace(arguments[i], shape=tuple(shape), strides=contiguous(shape))
    return replace(problem, arguments=tuple(arguments), chosen=tuple(chosen), in_dims=tuple(in_dims))
