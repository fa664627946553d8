"""Shapes of images [N, C, H, W] or [C, H, W], as the fake kernels of conv2d and max_pool2d need them."""

from collections.abc import Sequence

import torch
from torch._prims_common import suggest_memory_format
from torch.fx.experimental.symbolic_shapes import statically_known_true


def channels_last(tensor: torch.Tensor) -> bool:
    """Whether images are stored as (N) H W C, by the rule that csrc/checks.h uses too."""
    if tensor.dim() == 3:
        tensor = tensor.unsqueeze(0)
    return tensor.dim() == 4 and suggest_memory_format(tensor) == torch.channels_last


def empty_images(like: torch.Tensor, size: Sequence[int], last: bool, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised batch of images on the device of `like`, stored as N H W C if `last`."""
    batch = size if len(size) == 4 else (1, *size)
    memory_format = torch.channels_last if last else torch.contiguous_format
    images = torch.empty(batch, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format)
    return images if len(size) == 4 else images.squeeze(0)


def dense(images: torch.Tensor, last: bool) -> torch.Tensor:
    """The results [B, N, C, H, W] or [B, C, H, W] of a batching rule, stored sample by sample as C H W or, if `last`,
    as H W C. A tangent needs the layout of its result, because torch copies it otherwise, by a functional copy that has
    no derivative under `functionalize`."""
    if not last:
        return images.contiguous()
    return images.movedim(-3, -1).contiguous().movedim(-1, -3)


def is_empty(size: Sequence[int]) -> bool:
    """Whether a batch is known to hold no images; conv2d's result is then not channels-last, as in stock torch."""
    return len(size) == 4 and statically_known_true(size[0] == 0)


def pair(values: Sequence[int] | int) -> tuple[int, int]:
    """The values for H and W; a single value stands for both."""
    if isinstance(values, Sequence):
        return values[0], values[-1]
    return values, values
