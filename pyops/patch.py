"""Our kernels in code that calls torch's functions and cannot be changed."""

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
    """A context in which torch's relu, linear, conv2d and max_pool2d, whoever calls them, run on pyops' kernels.

    These are ``torch.nn.functional.relu``, ``relu_``, ``linear``, ``conv2d``, ``max_pool2d`` and
    ``max_pool2d_with_indices``, ``torch.relu``, ``relu_``, ``conv2d`` and ``max_pool2d``, the methods ``Tensor.relu``
    and ``relu_``, and so the layers of ``torch.nn`` that call them. It is a :class:`torch.overrides.TorchFunctionMode`:
    it holds for the calling thread, until its end or an exception, and may be nested. Stock computes what pyops has no
    kernels for: tensors of other devices, dtypes (complex, quantized, boolean) or layouts (sparse, nested), subclasses
    of :class:`torch.Tensor`, and what runs without Python, as scripted modules do, or inside of another function of
    torch, as in ``torch.nn.functional.multi_head_attention_forward``.

    Every call of any torch function costs some microseconds more here. :func:`pyops.convert` and
    ``torch.compile(backend="pyops")`` cost nothing.

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
