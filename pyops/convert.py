"""Switches the layers of a model between torch's classes and ours.

Our layers differ from torch's in ``forward`` alone, so a layer is switched by assigning its ``__class__``. The object,
its parameters, buffers, hooks, flags, name and place (or places) in the model stay what they are. Nothing is copied, so
nothing can be forgotten, and optimizers and tied weights keep working.

Fusing works in the same manner: a convolution followed by a ReLU and a max-pool becomes a fused layer in its own place,
under its own name, and the ReLU and the pool become layers that return their input.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.nn.utils.parametrize import is_parametrized

from pyops import nn
from pyops.lenet import LeNet, StockLeNet

__all__ = ["convert", "revert"]

Module = TypeVar("Module", bound=torch.nn.Module)

_TO_PYOPS: dict[type, type] = {
    torch.nn.ReLU: nn.ReLU,
    torch.nn.Linear: nn.Linear,
    torch.nn.Conv2d: nn.Conv2d,
    torch.nn.MaxPool2d: nn.MaxPool2d,
    StockLeNet: LeNet,
}
_TO_STOCK = {ours: stock for stock, ours in _TO_PYOPS.items()}


class _FusedReLU(nn.ReLU):
    """A ReLU that the layer before it computes."""

    def forward(self, input: Tensor) -> Tensor:
        return input


class _FusedMaxPool2d(nn.MaxPool2d):
    """A max-pool that the layer before it computes."""

    def forward(self, input: Tensor) -> Tensor:
        return input


_UNFUSED: dict[type, type] = {_FusedReLU: nn.ReLU, _FusedMaxPool2d: nn.MaxPool2d}
_UNFUSED_LAYER: dict[type, type] = {
    nn.LinearReLU: nn.Linear,
    nn.ConvReLU2d: nn.Conv2d,
    nn.ConvReLUMaxPool2d: nn.Conv2d,
}
_FUSED_FLAG = "_fused_by_convert"  # marks a layer that was not built as a fused one


def convert(module: Module, fuse: bool = False) -> Module:
    """Turn the stock layers of ``module`` that pyops has kernels for into pyops layers, in place.

    ``torch.nn.ReLU``, ``Linear``, ``Conv2d`` and ``MaxPool2d`` become their :mod:`pyops.nn` namesakes, ``module``
    itself included. Only these exact classes are switched: a subclass stays, because it may rely on a ``forward`` of
    its own, and so do functional calls in a ``forward`` method and scripted modules. Parameters, buffers, hooks,
    parametrizations and the training flag are kept. For a converted copy write ``convert(copy.deepcopy(module))``.

    With ``fuse``, a Linear followed by a ReLU, and a Conv2d followed by a ReLU and perhaps a MaxPool2d, in either
    order, become one layer: :class:`pyops.nn.LinearReLU`, :class:`~pyops.nn.ConvReLU2d` or
    :class:`~pyops.nn.ConvReLUMaxPool2d`. It takes the place of the first layer; the others stay where they are and
    return their input, so the ``state_dict`` keys remain. Results are the same. Layers are fused only if nothing else
    uses the results between them. To find out, ``module.forward`` is traced with :mod:`torch.fx`, in training and in
    evaluation mode; if it cannot be traced, each :class:`torch.nn.Sequential` is taken to be called as a whole, and
    layers are fused inside of it. Functional calls are left alone, and so is a layer that is called or registered
    twice, whose result is used elsewhere too, or that has hooks or parametrizations. :class:`pyops.LeNet` is fused as
    a whole.

    Args:
        module: the model; converting it twice has the effect of converting it once.
        fuse: also replace sequences of layers by fused layers.

    Returns:
        ``module``, the same object.

    Raises:
        TypeError: ``module`` is not a :class:`torch.nn.Module`.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh())
    >>> [type(layer).__module__ for layer in convert(net)]
    ['pyops.nn', 'torch.nn.modules.activation']
    """
    _switch(module, _TO_PYOPS, "convert")
    if fuse:
        for layers in _sequences(module):
            _fuse(layers)
        for layer in module.modules():
            if type(layer) is LeNet:
                _fuse_lenet(layer)
    return module


def revert(module: Module) -> Module:
    """Turn every pyops layer of ``module`` into its torch namesake, in place. This is the inverse of :func:`convert`.

    Argument, return value and errors are :func:`convert`'s. Layers that were built as pyops layers are switched too,
    so the model no longer uses pyops.

    >>> type(revert(nn.Linear(4, 3)))
    <class 'torch.nn.modules.linear.Linear'>
    """
    if isinstance(module, torch.nn.Module):
        for layer in module.modules():
            _unfuse(layer)
    return _switch(module, _TO_STOCK, "revert")


def _switch(module: Module, classes: Mapping[type, type], caller: str) -> Module:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"{caller}: module must be a torch.nn.Module, got {type(module).__name__}")
    for layer in module.modules():
        _switch_layer(layer, classes)
    return module


def _switch_layer(layer: torch.nn.Module, classes: Mapping[type, type]) -> None:
    cls = type(layer)
    if cls in classes:
        layer.__class__ = classes[cls]
    elif is_parametrized(layer) and (base := cls.__bases__[0]) in classes:
        # torch gave this layer a class of its own, which holds the parametrized tensors as properties. Copies of the
        # layer share that class, so it is not changed: a new one is made over the other base.
        layer.__class__ = type(f"Parametrized{classes[base].__name__}", (classes[base],), dict(vars(cls)))


# ---- fusing ----


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: torch.nn.Module, name: str) -> bool:
        return type(module).__module__ in (nn.__name__, __name__) or super().is_leaf_module(module, name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        # The graph records calls, but not the contexts in which they are made.
        node.meta["grad_modes"] = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return node


def _sequences(root: torch.nn.Module) -> Iterator[list[torch.nn.Module]]:
    """Runs of two or three layers that are called in turn, each once, and whose results only the next layer sees."""
    names = [id(layer) for _, layer in root.named_modules(remove_duplicate=False)]
    once = {identity for identity in names if names.count(identity) == 1}
    try:
        training, evaluation = (_traced(root, mode) for mode in (True, False))
        chains = [chain for chain in training if chain in evaluation]
    except Exception:  # a forward that fx cannot follow may raise anything
        chains = [list(layer) for layer in root.modules() if type(layer) is torch.nn.Sequential]
    hooked = [set(module.modules()) for module in root.modules() if not _is_plain(module)]
    for chain in chains:
        for i in range(len(chain)):
            for length in (3, 2):
                layers = chain[i : i + length]
                # The hooks of a module that contains all of the layers see no value that passes between them.
                seen = any(module & {*layers} and not module >= {*layers} for module in hooked)
                if len(layers) == length and not seen and all(id(layer) in once for layer in layers):
                    yield layers


def _traced(root: torch.nn.Module, training: bool) -> list[list[torch.nn.Module]]:
    """The longest chains of module calls in the graph of `root.forward`."""
    modes = {layer: layer.training for layer in root.modules()}
    try:
        for layer in modes:
            layer.training = training  # not by train(), which a model may have overridden
        graph = _Tracer().trace(root)
    finally:
        for layer, mode in modes.items():
            layer.training = mode
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    chains: list[list[torch.nn.Module]] = []
    ends: dict[fx.Node, list[torch.nn.Module]] = {}
    for node in graph.nodes:
        if node.op != "call_module" or calls.count(node.target) > 1:
            continue
        before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        follows = isinstance(before, fx.Node) and len(before.users) == 1
        follows = follows and before.meta["grad_modes"] == node.meta["grad_modes"]
        chain = ends.pop(before, None) if follows else None
        if chain is None:
            chains.append(chain := [])
        chain.append(root.get_submodule(node.target))
        ends[node] = chain
    return chains


def _is_plain(layer: torch.nn.Module) -> bool:
    """Whether a layer has no hooks, which would notice if it were not called or if its input were another tensor."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(getattr(layer, name) for name in hooks)


def _fuse(layers: list[torch.nn.Module]) -> None:
    """Fuses the layers if they match one of the patterns."""
    kinds = tuple(type(layer) for layer in layers)
    first = layers[0]
    if kinds == (nn.Linear, nn.ReLU):
        first.__class__ = nn.LinearReLU
    elif kinds == (nn.Conv2d, nn.ReLU):
        first.__class__ = nn.ConvReLU2d
    elif kinds in ((nn.Conv2d, nn.ReLU, nn.MaxPool2d), (nn.Conv2d, nn.MaxPool2d, nn.ReLU)):
        pool: Any = layers[kinds.index(nn.MaxPool2d)]
        if pool.return_indices:
            return
        first.__class__ = nn.ConvReLUMaxPool2d
        first.pool_kernel_size, first.pool_stride = pool.kernel_size, pool.stride
        first.pool_padding, first.pool_dilation, first.ceil_mode = pool.padding, pool.dilation, pool.ceil_mode
    else:
        return
    setattr(first, _FUSED_FLAG, True)
    for layer in layers[1:]:
        layer.__class__ = _FusedReLU if isinstance(layer, nn.ReLU) else _FusedMaxPool2d


def _fuse_lenet(net: LeNet) -> None:
    layers = [net.conv1, net.conv2, net.fc1, net.fc2]
    if net.fused or not all(type(layer) in (nn.Conv2d, nn.Linear) and _is_plain(layer) for layer in layers):
        return
    for conv in layers[:2]:
        _fuse([conv, nn.ReLU(), nn.MaxPool2d(2)])
    for linear in layers[2:]:
        _fuse([linear, nn.ReLU()])
    net.fused = True
    setattr(net, _FUSED_FLAG, True)


def _unfuse(layer: torch.nn.Module) -> None:
    _switch_layer(layer, _UNFUSED)
    if not vars(layer).pop(_FUSED_FLAG, False):
        return
    if isinstance(layer, LeNet):
        layer.fused = False
        return
    _switch_layer(layer, _UNFUSED_LAYER)
    for name in ("pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation", "ceil_mode"):
        vars(layer).pop(name, None)
