"""The backend of ``torch.compile(model, backend="pyops")``: any stock model, on pyops' kernels.

Dynamo hands over what it traced as a graph of calls of torch's functions, into which layers and methods are resolved
already. Those that pyops has become ours, sequences of them one fused call, and the graph runs as it is: eagerly, by
autograd, so that training, hooks and autocast are what they are without compilation.

torch finds the backend by an entry point, so that ``import pyops`` is not needed.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from pyops import functional
from pyops._replacements import relu_, replacement

__all__ = ["backend"]

# Calls of which each is the only one to use the result of the one before, and the function that does them at once.
_PATTERNS: list[tuple[tuple[Callable[..., Any], ...], Callable[..., Any]]] = [
    ((functional.linear, functional.relu), functional.linear_relu),
    ((functional.conv2d, functional.relu, functional.max_pool2d), functional.conv2d_relu_max_pool2d),
    ((functional.conv2d, functional.max_pool2d, functional.relu), functional.conv2d_relu_max_pool2d),
    ((functional.conv2d, functional.relu), functional.conv2d_relu),
]
_POOL_OPTIONS = {"kernel_size": "pool_kernel_size", "stride": "pool_stride", "padding": "pool_padding"}
_POOL_OPTIONS |= {"dilation": "pool_dilation", "ceil_mode": "ceil_mode"}


def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """What ``torch.compile`` calls, once for each graph that it traced.

    Calls of relu, linear, conv2d and max_pool2d, as layers, functions or methods, are made on pyops' kernels where
    these have the device and the dtype; relu after linear or conv2d, and max_pool2d before or after it, in the same
    call as these, where nothing else uses what lies between. Everything else is called as in the model.

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
        if isinstance(module, fx.GraphModule):  # itself, and the bodies of checkpoints and the like
            for node in module.graph.nodes:
                _replace(node)
            for node in module.graph.nodes:
                _fuse(node)
            module.recompile()
    return graph_module.forward


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _replace(node: fx.Node) -> None:
    """Makes a call of one of torch's functions a call of ours, if it is one that we have."""
    if node.op not in ("call_function", "call_method"):
        return
    stock = getattr(torch.Tensor, node.target, None) if node.op == "call_method" else node.target
    examples = [_example(each) for each in node.all_input_nodes]
    if not any(example is None for example in examples) and (ours := replacement(stock, examples)):
        node.op, node.target = "call_function", ours


# ---- fusing ----


def _fuse(first: fx.Node) -> None:
    """Makes the sequence of calls that begins with a node, if it is one of the patterns, one call in its place."""
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
    """The calls of `functions`, each the only user of the one before, if they can as well be made one after another."""
    if first.target is not functions[0]:
        return None
    nodes = [first]
    for function in functions[1:]:
        user = next(iter(nodes[-1].users), None)
        if user is None or len(nodes[-1].users) > 1 or _out_of_place(user.target) is not function:
            return None
        # Options must be known where the first is called, and of a pooling only the values be wanted.
        if user.all_input_nodes != nodes[-1:] or _arguments(user).get("return_indices"):
            return None
        between = nodes[-1].next
        while between is not user:
            if _example(between) is None:  # a call without a value: it may change a mode, of autograd or of autocast
                return None
            between = between.next
        nodes.append(user)
    return nodes


def _out_of_place(target: Any) -> Any:
    return functional.relu if target is relu_ else target


def _arguments(node: fx.Node) -> dict[str, Any]:
    return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
