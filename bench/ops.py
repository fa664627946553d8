"""Each op of pyops, forward and each gradient, against the stock op: `python bench/ops.py --help`.

`GROUPS` is the table of all cases that are measured and of how much faster than stock they have to be. All calls go
through the public Python functions, so the time of a gradient includes that of torch.autograd.grad itself.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from harness import FLOOR, Group, Work, main

import pyops

NCHW, NHWC = torch.contiguous_format, torch.channels_last


def function(functional: ModuleType, op: str) -> Callable[..., torch.Tensor]:
    """The op of a library; stock has no fused ops, so there they are the single ops in turn."""
    pooling = {"pool_kernel_size": 2} if op == "conv2d_relu_max_pool2d" else {}
    if hasattr(functional, op):
        return partial(getattr(functional, op), **pooling)
    first = getattr(functional, op.split("_relu")[0])
    if pooling:
        return lambda *arguments, **options: functional.max_pool2d(functional.relu(first(*arguments, **options)), 2)
    return lambda *arguments, **options: functional.relu(first(*arguments, **options))


@dataclass(frozen=True)
class Case:
    """One function of `functional` on one shape, and the part of it that is timed."""

    op: str
    input: tuple[int, ...]
    weight: tuple[int, ...] | None = None
    options: tuple[int | tuple[int, ...], ...] = ()  # the arguments after the tensors
    timed: str = "forward"  # or "forward with grad", "grad_input", "grad_weight" (with the bias's, if there is a bias)
    bias: bool = True
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = NCHW
    gate: float = FLOOR
    limit_gate: float = 0

    @property
    def name(self) -> str:
        def text(sizes: int | tuple[int, ...]) -> str:
            return str(sizes) if isinstance(sizes, int) else "x".join(map(str, sizes))

        sizes = [text(size) for size in (self.input, self.weight) if size]
        options = [",".join(map(text, self.options))] if self.options else []
        layout = ["channels_last"] if self.layout == NHWC else []
        dtype = [str(self.dtype).removeprefix("torch.")] if self.dtype != torch.float32 else []
        return " ".join([self.op, *sizes, *options, *layout, *dtype, self.timed])

    def prepare(self) -> Work:
        torch.manual_seed(0)
        operands: list[torch.Tensor | None] = [self._random(self.input)]
        if self.weight:
            weight = self._random(self.weight).mul_(math.prod(self.weight[1:]) ** -0.5)  # makes outputs of about 1
            operands += [weight, self._random(self.weight[:1]) if self.bias else None]
        arguments = (*operands, *self.options)
        output = function(torch.nn.functional, self.op)(*arguments)
        grad_output = torch.randn_like(output)
        wanted = {
            "forward": [],
            "forward with grad": operands,
            "grad_input": operands[:1],
            "grad_weight": operands[1:],
        }[self.timed]
        wanted = [operand.requires_grad_() for operand in wanted if operand is not None]

        def call(functional: ModuleType) -> Callable[[], Any]:
            forward = partial(function(functional, self.op), *arguments)
            if self.timed.startswith("forward"):
                return forward
            return partial(torch.autograd.grad, forward(), wanted, grad_output, retain_graph=True)

        # conv2d and linear read two of input, weight and output in each pass, and write the third.
        arrays = [*operands[:2], output]
        if self.op == "relu" and self.timed == "grad_input":
            arrays.append(grad_output)
        return Work(
            stock=call(torch.nn.functional),
            ours=call(pyops.functional),
            flops=2 * output.numel() * math.prod(self.weight[1:]) if self.weight else 0,
            bytes=sum(array.nbytes for array in arrays),
        )

    def _random(self, size: tuple[int, ...]) -> torch.Tensor:
        tensor = torch.randn(size, dtype=self.dtype)
        return tensor.contiguous(memory_format=self.layout) if len(size) == 4 else tensor


def cases(op: str, shapes: Iterable[tuple[Any, ...]], *timed: str, **rest: Any) -> list[Case]:
    """A case for each shape (input, weight and options, as far as the op has them) and each part to time."""
    return [Case(op, *shape, timed=what, **rest) for shape in shapes for what in timed]


BATCHES = (1, 64, 1024)
PASSES = ("forward", "grad_input", "grad_weight")

LENET_POOLS = {n: [((n, 6, 28, 28), None, (2,)), ((n, 16, 10, 10), None, (2,))] for n in BATCHES}
POOLS = [
    *(LENET_POOLS[64] + LENET_POOLS[1024]),
    ((8, 64, 56, 56), None, (2,)),
    ((8, 64, 112, 112), None, (3, 2, 1)),  # kernel_size, stride, padding
]

OTHER_POOLS = [((8, 64, 55, 55), None, (3, 2)), ((8, 192, 28, 28), None, (3, 1, 1))]  # AlexNet's, GoogLeNet's

LENET_CONVS = {  # 5x5 and 3x3
    n: [
        *[((n, 1, 32, 32), (6, 1, 5, 5)), ((n, 6, 14, 14), (16, 6, 5, 5))],
        *[((n, 1, 32, 32), (6, 1, 3, 3)), ((n, 6, 15, 15), (16, 6, 3, 3))],
    ]
    for n in BATCHES
}
LARGE_CONVS = [  # the planes of residual networks; the options are stride and padding
    ((8, channels, side, side), *weight_and_options)
    for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7))
    for stride in (1, 2)
    for weight_and_options in (
        ((channels, channels, 3, 3), (stride, 1)),
        ((4 * channels, channels, 1, 1), (stride, 0)),
    )
]
NARROW_CONVS = [((8, 16, 32, 32), (16, 16, 3, 3), (1, 1))]  # from residual networks for CIFAR
SMALL_CONVS = [  # from networks for MNIST and CIFAR: with padding, without, and in place of a linear layer
    *[((64, 1, 28, 28), (32, 1, 3, 3), (1, 1)), ((64, 1, 28, 28), (32, 1, 5, 5), (1, 2))],
    *[((64, 32, 14, 14), (64, 32, 3, 3), (1, 1)), ((64, 32, 12, 12), (64, 32, 5, 5))],
    *[((64, 3, 32, 32), (32, 3, 3, 3), (1, 1)), ((16, 64, 7, 7), (128, 64, 7, 7))],
]
SPECIAL_CONVS = [  # the options are stride, padding, dilation, groups
    ((8, 3, 224, 224), (64, 3, 7, 7), (2, 3)),
    ((8, 64, 28, 28), (64, 1, 3, 3), (1, 1, 1, 64)),
    ((8, 128, 28, 28), (128, 4, 3, 3), (1, 1, 1, 32)),
]

LENET_LINEARS = {n: [((n, 400), (120, 400)), ((n, 120), (84, 120)), ((n, 84), (10, 84))] for n in BATCHES}
TWO_LAYER_NET = [((64, 1000), (100, 1000)), ((64, 100), (10, 100))]
LARGE_LINEARS = [((n, 4096), (4096, 4096)) for n in (1, 16, 1024)]

EIGHT_ELEMENTS = {
    "relu": ((8,),),
    "linear": ((1, 8), (8, 8)),
    "conv2d": ((1, 1, 2, 4), (1, 1, 2, 2)),
    "max_pool2d": ((1, 1, 2, 4), None, (2,)),
}

GROUPS = [
    Group("max_pool2d forward", cases("max_pool2d", POOLS, "forward", gate=10)),
    Group("max_pool2d backward", cases("max_pool2d", POOLS, "grad_input", gate=1.5)),
    Group(
        "max_pool2d, batch 1 and channels_last",
        cases("max_pool2d", LENET_POOLS[1], "forward", "grad_input")
        + cases("max_pool2d", POOLS, "forward", "grad_input", layout=NHWC),
    ),
    Group(
        "max_pool2d, other windows",
        [case for layout in (NCHW, NHWC) for case in cases("max_pool2d", OTHER_POOLS, *PASSES[:2], layout=layout)],
    ),
    Group(
        "conv2d, LeNet",
        [case for n in BATCHES for case in cases("conv2d", LENET_CONVS[n], *PASSES, gate=1)],
        mean_gate=2,
    ),
    Group(
        "conv2d 3x3 and 1x1, 64 to 512 channels",
        [
            case
            for layout in (NCHW, NHWC)
            for case in cases("conv2d", LARGE_CONVS, *PASSES, layout=layout, bias=False, gate=0.95)
        ],
        mean_gate=1.05,
    ),
    Group(
        "conv2d 3x3, 16 channels",
        [case for layout in (NCHW, NHWC) for case in cases("conv2d", NARROW_CONVS, *PASSES, layout=layout, bias=False)],
    ),
    Group("conv2d, small networks", cases("conv2d", SMALL_CONVS, *PASSES)),
    Group(
        "conv2d 7x7, depthwise, grouped",
        [
            case
            for layout in (NCHW, NHWC)
            for case in cases("conv2d", SPECIAL_CONVS, *PASSES, layout=layout, bias=False, gate=1)
        ],
        mean_gate=1.5,
    ),
    Group(
        "conv2d in float64",
        cases("conv2d", [*LENET_CONVS[64], LARGE_CONVS[0]], *PASSES, dtype=torch.float64, gate=1.5),
    ),
    Group(
        "linear",
        cases(
            "linear",
            [*(LENET_LINEARS[1] + LENET_LINEARS[64] + LENET_LINEARS[1024]), *TWO_LAYER_NET, *LARGE_LINEARS],
            *PASSES,
            gate=1,
        ),
        mean_gate=1.15,
    ),
    Group("GEMM", cases("linear", [((2048, 2048), (2048, 2048))], "forward", bias=False, limit_gate=0.85)),
    Group(
        "bfloat16, LeNet",
        cases("linear", LENET_LINEARS[64], *PASSES, dtype=torch.bfloat16, gate=1)
        + cases("conv2d", LENET_CONVS[64], *PASSES, dtype=torch.bfloat16, gate=1),
    ),
    Group(
        "bfloat16, large",
        cases("linear", LARGE_LINEARS, *PASSES, dtype=torch.bfloat16, gate=0.5)
        + [
            case
            for layout in (NCHW, NHWC)
            for case in cases(
                "conv2d", LARGE_CONVS[:2], *PASSES, layout=layout, dtype=torch.bfloat16, bias=False, gate=0.5
            )
        ],
    ),
    Group(
        "fused",  # against the single ops of stock
        [
            case
            for n in BATCHES
            for case in (
                *cases("linear_relu", LENET_LINEARS[n][:2], *PASSES, gate=1),
                *cases("conv2d_relu", LENET_CONVS[n][:2], *PASSES, gate=1),
                *cases("conv2d_relu_max_pool2d", LENET_CONVS[n][:2], *PASSES, gate=1),
            )
        ],
    ),
    Group(
        "relu",
        cases("relu", [((1_000,),), ((10_000,),)], "forward", "grad_input")
        + cases("relu", [((size,),) for size in (10**5, 10**6, 10**7, 3 * 10**7)], "forward", "grad_input", gate=1),
    ),
    Group(
        "call overhead",
        [case for op, shape in EIGHT_ELEMENTS.items() for case in cases(op, [shape], "forward", "forward with grad")],
    ),
]

if __name__ == "__main__":
    main("Time every op of pyops against stock torch's.", GROUPS)
