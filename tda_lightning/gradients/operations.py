"""Which functional calls have a native form, and what each does with its parameters.

One function for each call, with the signature of ``torch.nn.functional`` after ``ref``, which
names a trained parameter (None for any other tensor). It describes the call and does not make it;
None means that these arguments have no native form.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from tda_lightning.gradients.uses import (
    Convolution,
    Embedding,
    Linear,
    Norm,
    Product,
    Ref,
    ScaleAndShift,
    Use,
)
from tda_lightning.records.errors import EngineError

Refs: TypeAlias = Callable[[Tensor | None], Ref | None]
Sizes: TypeAlias = int | Sequence[int]


def _linear(ref: Refs, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use:
    return Linear(ref(weight), ref(bias), input.detach())


def _product_with(
    ref: Refs, input: object, other: object, bias: Tensor | None = None
) -> Use | None:
    """input @ other + bias with a trained matrix ``other``."""
    if not isinstance(input, Tensor) or not isinstance(other, Tensor) or ref(input) is not None:
        return None
    trained = ref(other)
    if trained is None or other.dim() != 2 or input.dim() < 2 or other.is_complex():
        return None
    rows = other.shape[1]  # of the weight's gradient, one for each output
    return Product(Ref(trained.name, 0, rows, rows), ref(bias), input.detach())


def _addmm(
    ref: Refs, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Use | None:
    if beta != 1 or alpha != 1 or input.dim() != 1:
        return None
    return _product_with(ref, mat1, mat2, input)


def _convolution(
    ref: Refs,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Use:
    kernel = tuple(weight.shape[2:])
    spatial = len(kernel)
    if input.dim() == spatial + 1:
        raise EngineError(
            f"A convolution was called on an input without a batch axis {tuple(input.shape)}. "
            "Keep the batch axis: per-example gradients need it."
        )

    def each(value: Sizes) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * spatial if len(values) == 1 else values

    if padding == "same":
        # An odd total goes to the far side, as torch does it.
        totals = [step * (size - 1) for size, step in zip(kernel, each(dilation), strict=True)]
        input = F.pad(input, [n for t in reversed(totals) for n in (t // 2, t - t // 2)])
    padding = 0 if isinstance(padding, str) else padding
    return Convolution(
        ref(weight), ref(bias), input.detach(), kernel, each(stride), each(padding), each(dilation),
        groups,
    )  # fmt: skip


def _embedding(
    ref: Refs,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Use:
    trained = ref(weight)
    if trained is not None and (max_norm is not None or scale_grad_by_freq):
        raise EngineError(
            f"Parameter {trained.name}: an embedding with max_norm or scale_grad_by_freq has no "
            "per-example gradient (the first rewrites the table in the forward pass, the second "
            "depends on the whole batch). Train without it, or freeze the embedding."
        )
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return Embedding(trained, None, input, padding_idx)


def _lookup(ref: Refs, input: Tensor, index: object) -> Use | None:
    """Rows of a trained matrix by a tensor of their numbers: an embedding without a layer."""
    if ref(input) is None or input.dim() != 2 or not isinstance(index, Tensor):
        return None
    if index.dtype != torch.int64 or index.dim() == 0:
        return None
    return Embedding(ref(input), None, index % len(input), None)


def _norm(func: Callable[..., Tensor]) -> Callable[..., Use | None]:
    """normalized * weight + bias of the layer ``func``.

    What the weight multiplies is computed apart. The output stays the layer's own, bit for bit:
    another rounding would send values near zero to the other side of a ReLU.
    """
    signature = inspect.signature(func)

    def describe(ref: Refs, *args: object, **kwargs: object) -> Use | None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        weight, bias = given["weight"], given.get("bias")
        parameter = weight if weight is not None else bias
        if parameter is None:
            return None
        scale, factor = ref(weight), None
        if scale is not None:
            changed = dict.fromkeys({"weight", "bias"} & given.keys())
            if given.get("training") or given.get("use_input_stats"):
                # These statistics come from the batch: a second call must not count.
                changed |= {"running_mean": None, "running_var": None}
            factor = func(**{**given, **changed})
        last = len(given["normalized_shape"]) if "normalized_shape" in given else None
        first = 1 if last is None else given["input"].dim() - last
        axes = tuple(range(first, first + parameter.dim()))
        return Norm(scale, ref(bias), factor, tuple(parameter.shape), axes)

    return describe


def _sum(ref: Refs, input: object, other: object, **options: object) -> Use | None:
    return None if options else elementwise(ref, input, other, scales=False)


def _product(ref: Refs, input: object, other: object, **options: object) -> Use | None:
    return None if options else elementwise(ref, input, other, scales=True)


def elementwise(ref: Refs, input: object, other: object, scales: bool) -> ScaleAndShift | None:
    """A bare parameter and an activation, broadcast against each other."""
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return None
    if input.is_complex() or other.is_complex():
        return None  # the gradient of a real parameter is a real part
    trained, others = ref(input), ref(other)
    if trained is not None and others is not None:
        return None
    parameter, activation = (input, other) if trained is not None else (other, input)
    name = ref(parameter)
    _, factor = torch.broadcast_tensors(parameter, activation.detach())
    offset = factor.dim() - parameter.dim()
    if offset == 0 and parameter.shape[:1] != (1,):
        return None  # no axis is left for the examples
    axes = tuple(offset + axis for axis, size in enumerate(parameter.shape) if size > 1)
    weight, bias = (name, None) if scales else (None, name)
    return ScaleAndShift(weight, bias, factor, tuple(parameter.shape), axes)


def _expansion(func: Callable[..., Tensor]) -> Callable[..., Use | None]:
    """A bare parameter repeated for every example by ``func``: a class token, learned queries."""

    def describe(ref: Refs, input: Tensor, *sizes: object, **options: object) -> Use | None:
        expanded = func(input.detach(), *sizes, **options)
        offset = expanded.dim() - input.dim()
        if input.is_complex() or (offset == 0 and input.shape[:1] != (1,)):
            return None
        if expanded.shape[offset + 1 :] != input.shape[1:]:
            return None  # repeated along other axes than that of the examples
        axes = tuple(offset + axis for axis, size in enumerate(input.shape) if size > 1)
        return ScaleAndShift(None, ref(input), None, tuple(input.shape), axes)

    return describe


OPERATIONS: dict[object, Callable[..., Use | None]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    **dict.fromkeys(
        (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _product_with
    ),
    **dict.fromkeys(
        (torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d), _convolution
    ),
    F.embedding: _embedding,
    Tensor.__getitem__: _lookup,
    **{
        func: _expansion(func)
        for func in (Tensor.expand, torch.broadcast_to, Tensor.broadcast_to, Tensor.repeat)
    },
    **{
        norm: _norm(norm)
        for norm in (F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm, F.instance_norm)
    },
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _sum),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _product),
}
