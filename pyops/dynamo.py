"""The backend of ``torch.compile(model, backend="pyops")``: any stock model, on pyops' kernels.

Dynamo hands over what it traced as a graph of calls of torch's functions, in which layers and methods are already
resolved. Calls that pyops has a kernel for become calls of ours, and sequences of them become one fused call. The graph
then runs eagerly, under autograd, so that training, hooks and autocast behave as they do without compilation.

torch finds the backend through an entry point, so ``import pyops`` is not needed.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from pyops import functional
from pyops._replacements import relu_, replacement

__all__ = ["backend"]

# Sequences of calls, each the only user of the result before it, and the function that computes them in one call.
_PATTERNS: list[tuple[tuple[Callable[..., Any], ...], Callable[..., Any]]] = [
    ((functional.linear, functional.relu), functional.linear_relu),
    ((functional.conv2d, functional.relu, functional.max_pool2d), functional.conv2d_relu_max_pool2d),
    ((functional.conv2d, functional.max_pool2d, functional.relu), functional.conv2d_relu_max_pool2d),
    ((functional.conv2d, functional.relu), functional.conv2d_relu),
]
_POOL_OPTIONS = {"kernel_size": "pool_kernel_size", "stride": "pool_stride", "padding": "pool_padding"}
_POOL_OPTIONS |= {"dilation": "pool_dilation", "ceil_mode": "ceil_mode"}


def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile one graph; ``torch.compile`` calls this once for each graph that it traced.

    Calls of relu, linear, conv2d and max_pool2d, as layers, functions or methods, run on pyops' kernels if these
    support the device and the dtype. A relu after linear or conv2d, and after conv2d also a max_pool2d before or after
    that relu, become part of one fused call if nothing else uses the results between them. Everything else is called as
    in the model.

    Args:
        graph_module: the traced graph; its nodes carry example values.
        example_inputs: not used.

    Returns:
        a callable that computes what `graph_module` did.

    >>> import torch
    >>> net = torch.compile(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()), backend="pyops")
    >>> net(torch.ones(2, 4)).grad_fn.name()
    'pyops::linear_relu_backward'
    """
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):  # graph_module itself, and the bodies of checkpoints and the like
            for node in module.graph.nodes:
                _replace(node)
            for node in module.graph.nodes:
                _fuse(node)
            module.recompile()
    return graph_module.forward


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _replace(node: fx.Node) -> None:
    """Turns a call of one of torch's functions into a call of ours, if we have that function."""
    if node.op not in ("call_function", "call_method"):
        return
    stock = getattr(torch.Tensor, node.target, None) if node.op == "call_method" else node.target
    examples = [_example(each) for each in node.all_input_nodes]
    if not any(example is None for example in examples) and (ours := replacement(stock, examples)):
        node.op, node.target = "call_function", ours


# ---- fusing ----


def _fuse(first: fx.Node) -> None:
    """Replaces the sequence of calls that begins with `first` by one fused call, if it matches one of the patterns."""
    for functions, fused in _PATTERNS:
        nodes = _sequence(first, functions)
        if nodes is None:
            continue
        options = dict(first.kwargs)
        for node in nodes[1:]:
            if node.target is functional.max_pool2d:
                given = _arguments(node)
                options |= {ours: given[name] for name, ours in _POOL_OPTIONS.items() if name in given}
        first.target, first.kwargs = fused, options
        first.meta["example_value"] = _example(nodes[-1])
        nodes[-1].replace_all_uses_with(first)
        for node in reversed(nodes[1:]):
            node.graph.erase_node(node)
        return


def _sequence(first: fx.Node, functions: Sequence[Callable[..., Any]]) -> list[fx.Node] | None:
    """The calls of `functions` in turn, each the only user of the one before, or None if they cannot be fused."""
    if first.target is not functions[0]:
        return None
    nodes = [first]
    for function in functions[1:]:
        user = next(iter(nodes[-1].users), None)
        if user is None or len(nodes[-1].users) > 1 or _out_of_place(user.target) is not function:
            return None
        # The options must be known where the first function is called, and a pooling must not return indices.
        if user.all_input_nodes != nodes[-1:] or _arguments(user).get("return_indices"):
            return None
        between = nodes[-1].next
        while between is not user:
            if _example(between) is None:  # a call without a value may change a mode of autograd or of autocast
                return None
            between = between.next
        nodes.append(user)
    return nodes


def _out_of_place(target: Any) -> Any:
    return functional.relu if target is relu_ else target


def _arguments(node: fx.Node) -> dict[str, Any]:
    return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
