"""Maxima over windows of images on a CPU, in the layout that torch is fast in.

Over channels that lie next to each other in memory torch takes maxima several at a time, and one by
one otherwise, which takes four times as long and longer than the convolutions around it. The same
numbers come out, and the same one of equal entries gets the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_FEWEST = 16  # channels that are worth the copy
_AS_IT_IS: Any = F.max_pool2d


def max_pool2d(
    images: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """``F.max_pool2d``."""
    settings = kernel_size, stride, padding, dilation, ceil_mode
    if return_indices or not _slow(images):
        return _AS_IT_IS(images, *settings, return_indices)
    sizes = (_pair([] if own is None else own) for own in settings[:4])
    return _MaxPool.apply(images, *sizes, ceil_mode)  # type: ignore[no-untyped-call]


_CALLS: tuple[Any, ...] = (F.max_pool2d, torch.max_pool2d)


def faster(func: Callable[..., Any]) -> Callable[..., Any]:
    """What computes the same as a call of torch, in less time."""
    return max_pool2d if func in _CALLS else func


def _slow(images: Tensor) -> bool:
    return (
        images.dim() == 4
        and images.device.type == "cpu"
        and images.dtype in (torch.float32, torch.float64)
        and images.shape[1] >= _FEWEST
        and images.is_contiguous()
        and images.numel() > 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(images)
    )


def _pair(size: Any) -> list[int]:
    """A number for both axes as a pair, as torch's operators take it."""
    return [size, size] if isinstance(size, int) else list(size)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, *settings: Any) -> Tensor:
        last = images.contiguous(memory_format=torch.channels_last)
        pooled, places = torch.ops.aten.max_pool2d_with_indices(last, *settings)
        ctx.settings = settings
        # Gradients arrive, and are carried on, with images in a row.
        ctx.save_for_backward(images, places.contiguous())
        result: Tensor = pooled.contiguous()
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        images, places = ctx.saved_tensors
        carried = torch.ops.aten.max_pool2d_with_indices_backward(
            gradients[0], images, *ctx.settings, places
        )
        return carried, None, None, None, None, None
