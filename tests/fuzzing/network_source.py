"""Random networks as source text: classes of layers and functions of torch. Tests contain the text as it was run."""

import random
from collections.abc import Callable
from math import prod
from typing import NamedTuple

from fuzzing.network_layers import (
    ACTIVATION_LAYERS,
    MOST_ELEMENTS,
    RELU_CALLS,
    RELU_CALLS_IN_PLACE,
    RELU_LAYERS,
    Layer,
    Shape,
    arguments,
    average_layer,
    convolution,
    convolution_layer,
    norm_layer,
    pair,
    pooling,
    view,
)

FEATURES = (1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33)


class Value(NamedTuple):
    """The value that is computed so far: a variable, its shape, and whether it may be overwritten. It may if neither
    the value nor a tensor that it is a view of is needed by an earlier step's backward or by an earlier branch."""

    name: str
    shape: Shape
    fresh: bool


class Body:
    """The constructor and the ``forward`` of one class, while it is drawn."""

    def __init__(
        self,
        rng: random.Random,
        classes: list[str],
        value: Value,
        batch: int | None,
        depth: int = 0,
        calls: bool = True,
    ) -> None:
        """`batch` is None for a single sample without that dimension. Without `calls`, only layers are used."""
        self.rng, self.classes, self.value, self.depth, self.calls = rng, classes, value, depth, calls
        self.batched, self.batch = batch is not None, batch or 1
        self.layers: list[str] = []
        self.lines: list[str] = []
        self.names: list[str] = []  # the names of the values so far
        self.counts: dict[str, int] = {}

    # ---- writing ----

    def new_name(self, stem: str) -> str:
        number = self.counts[stem] = self.counts.get(stem, 0) + 1
        return f"{stem}{number}"

    def assign(self, expression: str, shape: Shape, fresh: bool) -> None:
        name = self.new_name("x")
        self.lines.append(f"{name} = {expression}")
        self.names.append(name)
        self.value = Value(name, shape, fresh)

    def register(self, stem: str, constructor: str) -> str:
        name = f"self.{self.new_name(stem)}"
        self.layers.append(f"{name} = {constructor}")
        return name

    def layer(self, stem: str, constructor: str, shape: Shape, fresh: bool) -> None:
        """Registers a layer and calls it."""
        named = "input=" if stem in ("conv", "linear", "relu", "pool") and self.rng.random() < 0.05 else ""
        self.assign(f"{self.register(stem, constructor)}({named}{self.value.name})", shape, fresh)

    def shared(self, constructor: str) -> str:
        """The name of a layer that all calls in this class share."""
        name = "self.shared_" + "".join(c for c in constructor.removeprefix("nn.") if c.isalnum()).lower()
        if not any(line.startswith(f"{name} =") for line in self.layers):
            self.layers.append(f"{name} = {constructor}")
        return name

    def source(self, name: str, returned: str) -> str:
        init = ["super().__init__()", *self.layers]
        forward = [line for lines in self.lines for line in lines.split("\n")] + [f"return {returned}"]
        lines = ["    def __init__(self):", *(f"        {line}" for line in init), ""]
        lines += ["    def forward(self, x):", *(f"        {line}" for line in forward)]
        return "\n".join([f"class {name}(nn.Module):", *lines])

    # ---- steps, each of which may also do nothing ----

    def conv(self, outputs: int | None = None) -> None:
        drawn = convolution_layer(self.rng, self.value.shape, self.batch, outputs)
        if drawn:
            self.layer("conv", *drawn, fresh=True)

    def linear(self) -> None:
        features = self.rng.choice(FEATURES)
        *leading, inputs = self.value.shape
        if self.batch * prod(leading) * features <= MOST_ELEMENTS:
            options = {"bias": (self.rng.random() < 0.75, True)}
            constructor = f"nn.Linear({arguments(inputs, features, **options)})"
            self.layer("linear", constructor, (*leading, features), fresh=True)

    def weighted(self) -> None:
        self.conv() if len(self.value.shape) == 3 else self.linear()

    def norm(self) -> None:
        if self.batched and self.batch * prod(self.value.shape[1:]) > 1:
            self.layer("norm", norm_layer(self.rng, self.value.shape), self.value.shape, fresh=True)

    def relu(self) -> None:
        name, shape, fresh = self.value
        way = self.rng.random()
        if way < 0.5 or not self.calls:
            constructor = self.rng.choice(RELU_LAYERS if fresh else RELU_LAYERS[:2])
            if way < 0.2:
                self.assign(f"{self.shared(constructor)}({name})", shape, fresh=False)
            else:
                self.layer("relu", constructor, shape, fresh=False)
            return
        forms = RELU_CALLS + RELU_CALLS_IN_PLACE if fresh else RELU_CALLS
        self.assign(self.rng.choice(forms).format(name), shape, fresh=False)

    def pool(self) -> None:
        drawn = pooling(self.rng, self.value.shape)
        if drawn is None:
            return
        name, way = self.value.name, self.rng.random()
        if way < 0.6 or not self.calls:
            self.layer("pool", f"nn.MaxPool2d({drawn.arguments})", drawn.shape, fresh=True)
        elif way < 0.7:
            self.assign(f"{self.shared(f'nn.MaxPool2d({drawn.arguments})')}({name})", drawn.shape, fresh=True)
        elif way < 0.8:
            self.assign(f"F.max_pool2d({name}, {drawn.arguments}, return_indices=True)[0]", drawn.shape, fresh=True)
        else:
            function = self.rng.choice(("F", "torch"))
            self.assign(f"{function}.max_pool2d({name}, {drawn.arguments})", drawn.shape, fresh=True)

    def usual(self) -> None:
        """A convolution or linear layer with the layers that usually follow, in one of the usual orders."""
        self.weighted()
        image = len(self.value.shape) == 3
        orders: tuple[tuple[Callable[[], None], ...], ...] = (
            (self.relu,),
            (self.relu, self.pool) if image else (self.relu,),
            (self.pool, self.relu) if image else (self.relu,),
            (self.norm, self.relu),
            (self.by_mode, self.relu) if self.calls and self.rng.random() < 0.2 else (self.relu,),
        )
        for step in self.rng.choice(orders):
            step()

    def average(self) -> None:
        self.layer("average", *average_layer(self.rng, self.value.shape), fresh=True)

    def activation(self) -> None:
        constructor, fresh = self.rng.choice(ACTIVATION_LAYERS)
        self.layer("activation", constructor, self.value.shape, fresh)

    def dropout(self) -> None:
        _, shape, fresh = self.value
        self.layer("dropout", self.rng.choice(("nn.Dropout(0.3)", "nn.Identity()")), shape, fresh)

    def show(self) -> None:
        name, shape, fresh = self.value
        expression, shape, overwritable = view(self.rng, shape, self.batched)
        self.assign(expression.format(name), shape, fresh and overwritable)

    def overwrite(self) -> None:
        """A ReLU in place, on all elements or some, whose result is not used."""
        name, shape, fresh = self.value
        if fresh:
            part = self.rng.choice((name, f"{name}[..., ::2]", f"{name}[..., 1:]" if shape[-1] > 1 else name))
            self.lines.append(self.rng.choice(RELU_CALLS_IN_PLACE).format(part))
            self.value = Value(name, shape, False)

    def flatten(self) -> None:
        name, shape, fresh = self.value
        features = (shape[0] * shape[1] * shape[2],)
        if not self.calls or self.rng.random() < 0.5:
            self.layer("flatten", "nn.Flatten(-3)", features, fresh)
        else:
            self.assign(self.rng.choice(("{}.flatten(-3)", "torch.flatten({}, -3)")).format(name), features, fresh)

    def reuse(self) -> None:
        """A layer with weights that is called twice, or two layers that share one weight."""
        shape = self.value.shape
        drawn: Layer | None = Layer(f"nn.Linear({shape[-1]}, {shape[-1]})", shape)
        if len(shape) == 3:
            drawn = convolution_layer(self.rng, shape, self.batch, outputs=shape[0])
        if drawn is None:
            return
        first = second = self.register("reused", drawn.constructor)
        if self.rng.random() < 0.4:
            second = self.register("tied", drawn.constructor)
            self.layers.append(f"{second}.weight = {first}.weight")
        self.assign(f"{first}({self.value.name})", shape, fresh=True)
        if self.rng.random() < 0.7:
            self.relu()
        self.assign(f"{second}({self.value.name})", shape, fresh=True)

    def functional(self) -> None:
        """A function with weights that belong to no layer."""
        name, shape, _ = self.value
        if len(shape) == 3:
            drawn = convolution(self.rng, shape, self.batch)
            if drawn is None:
                return
            size = (drawn.outputs, shape[0] // drawn.options["groups"][0], *pair(drawn.kernel))
            function, options, shape = self.rng.choice(("F.conv2d", "torch.conv2d")), drawn.options, drawn.shape
        else:
            size = (self.rng.choice(FEATURES), shape[-1])
            function, options, shape = "F.linear", {}, (size[0],)
        weight = self.register("weight", f"nn.Parameter(torch.empty{size})")
        bias = "None"
        if self.rng.random() < 0.6:
            bias = self.register("bias", f"nn.Parameter(torch.empty({size[0]}))")
        given = f", {arguments(**options)}" if arguments(**options) else ""
        self.assign(f"{function}({name}, {weight}, {bias}{given})", shape, fresh=True)

    def by_mode(self) -> None:
        """A step that differs between training and evaluation."""
        name, shape, _ = self.value
        self.assign(name, shape, fresh=False)
        self.lines.append(f"if self.training:\n    {self.value.name} = {self.value.name} + 0.25")

    def untraceable(self) -> None:
        """A step that torch.fx cannot trace, although it depends on no values."""
        self.lines.append(f"assert {self.value.name}.dim() > 0")

    # ---- steps that are made of steps ----

    def adapted(self, value: Value, shape: Shape) -> str:
        """An expression that brings a value into that shape."""
        expression = value.name
        if value.shape[1:] != shape[1:]:
            expression = f"F.adaptive_avg_pool2d({expression}, {shape[1:]})"
        if value.shape[0] != shape[0]:
            image = len(shape) == 3
            constructor = f"nn.{'Conv2d' if image else 'Linear'}({value.shape[0]}, {shape[0]}{', 1' * image})"
            expression = f"{self.register('shortcut', constructor)}({expression})"
        return expression

    def residual(self) -> None:
        start, count = self.value, len(self.lines)
        self.steps(self.rng.randint(1, 3))
        if len(self.value.shape) != len(start.shape) or len(self.lines) == count:
            return
        if self.rng.random() < 0.7:
            self.conv(start.shape[0]) if len(start.shape) == 3 else self.linear()
        shape = self.value.shape
        own = self.lines[-1].split(" = ")[-1].startswith(("self.conv", "self.linear", "self.norm"))
        shortcut = self.adapted(start, shape)
        if own and self.rng.random() < 0.4:
            self.lines.append(f"{self.value.name} += {shortcut}")
            self.value = Value(self.value.name, shape, True)
        else:
            self.assign(
                self.rng.choice(("{} + {}", "torch.add({}, {})")).format(self.value.name, shortcut), shape, True
            )

    def branches(self) -> None:
        start, ends = self.value, []
        for i in range(2):
            self.value = Value(start.name, start.shape, start.fresh and i == 0)
            self.steps(self.rng.randint(1, 2))
            ends.append(self.value)
        first, second = ends
        if len(first.shape) != len(second.shape) or self.batch * prod(first.shape) * 4 > MOST_ELEMENTS:
            return
        if self.rng.random() < 0.5:
            channels = first.shape[0] + second.shape[0]
            shortcut = self.adapted(second, (second.shape[0], *first.shape[1:]))
            dim = -len(first.shape)
            self.assign(f"torch.cat(({first.name}, {shortcut}), {dim})", (channels, *first.shape[1:]), fresh=True)
        else:
            self.assign(f"{first.name} * {self.adapted(second, first.shape)}", first.shape, fresh=True)

    def block(self) -> None:
        """A module of a class of its own, which may be called twice."""
        name, shape, fresh = self.value
        twice = self.rng.random() < 0.3
        inner = Body(self.rng, self.classes, Value("x", shape, fresh and not twice), self.batch_or_none, self.depth + 1)
        inner.steps(self.rng.randint(2, 4))
        if not inner.lines:
            return
        class_name = f"Block{len(self.classes) + 1}"
        self.classes.append(inner.source(class_name, inner.value.name))
        module = self.register("block", f"{class_name}()")
        if twice and inner.value.shape == shape:
            self.assign(f"{module}({name})", shape, fresh=False)
        self.assign(f"{module}({self.value.name})", inner.value.shape, fresh=inner.value.fresh)

    def sequence(self) -> None:
        children, value = sequential(self, self.rng.randint(2, 5))
        if children and self.rng.random() < 0.8:
            self.layer("sequence", f"nn.Sequential({', '.join(children)})", value.shape, value.fresh)
        elif children:
            layers, before = self.register("layers", f"nn.ModuleList([{', '.join(children)}])"), self.value.name
            self.assign(before, value.shape, value.fresh)
            name = self.value.name
            self.lines.append(f"for layer in {layers}:\n    {name} = layer({name})")

    @property
    def batch_or_none(self) -> int | None:
        return self.batch if self.batched else None

    def steps(self, count: int) -> None:
        """Adds `count` steps that fit the shape."""
        for _ in range(count):
            weights = IMAGE_STEPS if len(self.value.shape) == 3 else FEATURE_STEPS
            if self.depth >= 2:
                weights = {name: weight for name, weight in weights.items() if name not in NESTED_STEPS}
            self.depth += 1
            getattr(self, self.rng.choices([*weights], [*weights.values()])[0])()
            self.depth -= 1


FEATURE_STEPS = {"usual": 4, "linear": 3, "relu": 3, "norm": 2, "activation": 0.5, "dropout": 0.7, "overwrite": 0.5}
FEATURE_STEPS |= {"reuse": 1.5, "functional": 1, "by_mode": 0.2, "untraceable": 0.2}
FEATURE_STEPS |= {"residual": 1.5, "branches": 1, "block": 1, "sequence": 1.5}
IMAGE_STEPS = FEATURE_STEPS | {"usual": 6, "conv": 3, "pool": 2, "average": 0.7, "show": 1.2, "linear": 0.4}
NESTED_STEPS = ("residual", "branches", "block", "sequence")
SEQUENTIAL_STEPS = ("usual", "weighted", "norm", "relu", "pool", "average", "activation", "dropout", "reuse")


def sequential(body: Body, count: int) -> tuple[list[str], Value]:
    """The children of a torch.nn.Sequential that is called on the body's value, and the value that it gives.

    They are drawn as the lines of a class that call one layer each. A layer that is called again becomes a child again,
    by a name that is assigned at its first call.
    """
    inner = Body(body.rng, [], body.value, body.batch_or_none, calls=False)
    children: list[str] = []
    for _ in range(count):
        image = len(inner.value.shape) == 3
        names = [name for name in SEQUENTIAL_STEPS if image or name not in ("pool", "average")]
        getattr(inner, inner.rng.choice(names))()
        if image and inner.rng.random() < 0.05:
            inner.flatten()
    constructors = dict(line.split(" = ", 1) for line in inner.layers if ".weight = " not in line)
    calls = [line.split(" = ", 1)[1].partition("(")[0] for line in inner.lines if " = " in line]
    for i, call in enumerate(calls):
        if calls.count(call) == 1:
            children.append(constructors[call])
        else:
            name = f"{call.removeprefix('self.')}_{len(body.lines)}"
            children.append(f"{name} := {constructors[call]}" if calls.index(call) == i else name)
    return children, inner.value
