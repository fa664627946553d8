"""Runs code that calls torch's functions, and cannot be changed, on our kernels."""

from typing import Any

from torch.overrides import TorchFunctionMode

from pyops._replacements import replacement

__all__ = ["patch"]


class _Patch(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        ours = replacement(func, (*args, *kwargs.values()))
        return (ours or func)(*args, **kwargs)


def patch() -> TorchFunctionMode:
    """A context in which all calls of torch's relu, linear, conv2d and max_pool2d run on pyops' kernels.

    The functions are ``torch.nn.functional.relu``, ``relu_``, ``linear``, ``conv2d``, ``max_pool2d`` and
    ``max_pool2d_with_indices``, ``torch.relu``, ``relu_``, ``conv2d`` and ``max_pool2d``, and the methods
    ``Tensor.relu`` and ``relu_``; the layers of ``torch.nn`` call these. The context is a
    :class:`torch.overrides.TorchFunctionMode`: it applies to the calling thread, ends with its block or with an
    exception, and may be nested. Stock torch still computes what pyops has no kernels for: tensors of other devices,
    dtypes (complex, quantized, boolean) or layouts (sparse, nested), subclasses of :class:`torch.Tensor`, code that
    runs without Python, such as scripted modules, and calls inside of another function of torch, such as
    ``torch.nn.functional.multi_head_attention_forward``.

    Inside the context, every call of any torch function takes some microseconds longer. :func:`pyops.convert` and
    ``torch.compile(backend="pyops")`` have no such cost.

    Returns:
        the context manager, which can be entered any number of times, also by several threads at once.

    >>> import torch
    >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
    >>> with patch():
    ...     y = torch.nn.functional.relu(x)
    >>> y.grad_fn.name()
    'pyops::relu_mask_backward'
    """
    return _Patch()
