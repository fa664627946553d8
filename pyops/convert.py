"""Switch the layers of a model between torch's classes and ours.

Our layers differ from torch's in ``forward`` alone, so switching one is assigning its ``__class__``: the object, its
parameters, buffers, hooks, flags, name and place in the model (or several places) stay what they are. Nothing is
copied, so nothing can be forgotten, and optimizers and tied weights keep working.
"""

from collections.abc import Mapping
from typing import TypeVar

import torch
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


def convert(module: Module) -> Module:
    """Make every stock layer of ``module`` that pyops has a pyops layer, in place.

    ``torch.nn.ReLU``, ``Linear``, ``Conv2d`` and ``MaxPool2d`` become their :mod:`pyops.nn` namesakes, ``module``
    itself included. Only these exact classes: a subclass may rely on a ``forward`` of its own, and stays; so do
    functional calls in a ``forward`` method and scripted modules. Parameters, buffers, hooks, parametrizations and
    the training flag are kept. For a converted copy write ``convert(copy.deepcopy(module))``.

    Args:
        module: the model; converting it twice is the same as once.

    Returns:
        ``module``, the same object.

    Raises:
        TypeError: ``module`` is not a :class:`torch.nn.Module`.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh())
    >>> [type(layer).__module__ for layer in convert(net)]
    ['pyops.nn', 'torch.nn.modules.activation']
    """
    return _switch(module, _TO_PYOPS, "convert")


def revert(module: Module) -> Module:
    """Make every pyops layer of ``module`` its torch namesake, in place: the inverse of :func:`convert`.

    Arguments, return value and errors are :func:`convert`'s. Layers that were built as pyops layers are switched too,
    so a model without pyops is what remains.

    >>> type(revert(nn.Linear(4, 3)))
    <class 'torch.nn.modules.linear.Linear'>
    """
    return _switch(module, _TO_STOCK, "revert")


def _switch(module: Module, classes: Mapping[type, type], caller: str) -> Module:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"{caller}: module must be a torch.nn.Module, got {type(module).__name__}")
    for layer in module.modules():
        cls = type(layer)
        if cls in classes:
            layer.__class__ = classes[cls]
        elif is_parametrized(layer) and (base := cls.__bases__[0]) in classes:
            # torch gave this layer a class of its own, holding the parametrized tensors as properties. Copies of the
            # layer share that class, so it is made anew over the other base instead of being changed.
            layer.__class__ = type(cls.__name__, (classes[base],), dict(vars(cls)))
    return module
