"""Computes products of bfloat16 by linear and conv2d, checks them, and saves them in the file of the first argument.

PYOPS_TILES selects the tile unit (tests/ops/test_tiles.py). The results must be within the tolerance of the tests of
accuracy, and a sample's must not depend on its batch, nor any on the number of threads. Prints how many were checked.
"""

import itertools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import oracle
from tensors import random

from pyops import functional

LINEARS = [(1, 40, 33), (1, 4096, 130), (3, 288, 70), (16, 300, 17), (33, 64, 40), (64, 577, 96), (70, 31, 65)]
LINEARS += [(200, 90, 48)]
CONVS = [  # a sample, the weight, options
    ((32, 9, 10), (24, 32, 3, 3), {"padding": 1}),
    ((64, 7, 7), (40, 64, 3, 3), {"padding": 1}),
    ((16, 8, 9), (6, 16, 5, 5), {"padding": 4}),
    ((48, 6, 6), (20, 48, 3, 3), {"stride": 2, "padding": 1}),
    ((64, 5, 6), (33, 64, 1, 1), {}),
    ((40, 9, 8), (36, 20, 3, 3), {"groups": 2, "dilation": 2, "padding": 2}),
    ((6, 10, 10), (16, 6, 3, 3), {}),
    ((18, 4, 5), (34, 18, 4, 5), {}),
]
FORMATS = (torch.contiguous_format, torch.channels_last)
DTYPE = torch.bfloat16


def in_format(tensor: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    return tensor.contiguous(memory_format=layout) if tensor.dim() == 4 else tensor.contiguous()


def results(name: str, samples: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, options: dict) -> dict:
    """The output and the gradients, for the output as its own gradient."""
    function = getattr(functional, name)

    def call(*tensors):
        return function(*tensors, **options)

    output, grads = oracle.output_and_gradients(call, [samples, weight, bias], lambda output: output.detach())
    return {"output": output, **dict(zip(("input", "weight", "bias"), grads, strict=True))}


def check(name: str, samples: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, options: dict) -> dict:
    """The results, which are close to those in float64 and do not depend on threads or batch."""
    where = "channels_last" if samples.dim() == 4 and samples.is_contiguous(memory_format=FORMATS[1]) else "contiguous"
    oracle.check(name, [samples, weight, bias], options, grad=where)
    torch.set_num_threads(1)
    expected = results(name, samples, weight, bias, options)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        for part, result in results(name, samples, weight, bias, options).items():
            assert torch.equal(result, expected[part]), f"{part} differs with {threads} threads"
    for n in {1, 2, len(samples) // 2} - {0}:
        layout = FORMATS[1] if where == "channels_last" else FORMATS[0]
        alone = results(name, in_format(samples[-n:], layout), weight, bias, options)
        for part in ("output", "input"):
            assert torch.equal(alone[part], expected[part][-n:]), f"{part} of {n} samples differs"
    return expected


def main() -> None:
    torch.manual_seed(0)
    found = {}
    for M, K, N in LINEARS:
        operands = random((M, K), DTYPE), random((N, K), DTYPE), random((N,), DTYPE)
        found[f"linear {M} {K} {N}"] = check("linear", *operands, {})
    for (sample, weight, options), layout, of_weight in itertools.product(CONVS, FORMATS, FORMATS):
        operands = in_format(random((18, *sample), DTYPE), layout), in_format(random(weight, DTYPE), of_weight)
        name = f"conv2d {sample} {weight} {options} {layout} {of_weight}"
        found[name] = check("conv2d", *operands, random(weight[:1], DTYPE), options)
    torch.save({f"{name} {part}": x for name, parts in found.items() for part, x in parts.items()}, sys.argv[1])
    print(json.dumps({"checked": len(found)}))


if __name__ == "__main__":
    main()
