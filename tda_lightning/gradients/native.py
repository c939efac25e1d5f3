"""How each functional call with a native form is run and recorded.

One function per call, with the signature of ``torch.nn.functional``: it computes the same output
and tells the mode what per-example gradients need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tda_lightning.gradients import decompose
from tda_lightning.records.errors import EngineError

if TYPE_CHECKING:
    from tda_lightning.gradients.capture import Capture


def _linear(mode: Capture, func: Any, input: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    output = func(input, mode.constant(weight), mode.constant(bias))
    return mode.record("linear", output, mode.ref(weight), mode.ref(bias), input.detach(), (-1,))


def _convolution(
    mode: Capture,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    spatial = weight.dim() - 2

    def each(value: Any) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * spatial if len(values) == 1 else values

    stride, dilation = each(stride), each(dilation)
    if padding == "valid":
        padding = (0,) * spatial
    if padding == "same":
        # An odd total goes to the far side, as torch does it.
        pads: list[int] = []
        for size, step in zip(reversed(weight.shape[2:]), reversed(dilation), strict=True):
            total = step * (size - 1)
            pads += [total // 2, total - total // 2]
        input, padding = F.pad(input, pads), (0,) * spatial
    padding = each(padding)
    if input.dim() == spatial + 1:
        raise EngineError(
            f"A convolution was called on an input without a batch axis {tuple(input.shape)}. "
            "Keep the batch axis: per-example gradients need it."
        )
    output = func(
        input, mode.constant(weight), mode.constant(bias), stride, padding, dilation, groups
    )
    saved = (input.detach(), tuple(weight.shape[2:]), stride, padding, dilation, groups)
    channel_axes = tuple(range(1, spatial + 2))
    return mode.record("convolution", output, mode.ref(weight), mode.ref(bias), saved, channel_axes)


def _embedding(
    mode: Capture,
    func: Any,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    ref = mode.ref(weight)
    if ref is not None and (max_norm is not None or scale_grad_by_freq):
        raise EngineError(
            f"Parameter {ref.name}: an embedding with max_norm or scale_grad_by_freq has no "
            "per-example gradient (the one rewrites the table in the forward pass, the other "
            "depends on the whole batch). Train without it, or freeze the embedding."
        )
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    output = func(input, mode.constant(weight), padding_idx)
    return mode.record("embedding", output, ref, None, (input, padding_idx), (-1,))


def _layer_norm(
    mode: Capture,
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    output = func(input, normalized_shape, mode.constant(weight), mode.constant(bias), eps)
    return _scaled_norm(
        mode, output, lambda: F.layer_norm(input, normalized_shape, eps=eps), weight, bias, None
    )


def _rms_norm(
    mode: Capture,
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    output = func(input, normalized_shape, mode.constant(weight), eps)
    return _scaled_norm(
        mode, output, lambda: F.rms_norm(input, normalized_shape, eps=eps), weight, None, None
    )


def _group_norm(
    mode: Capture,
    func: Any,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    output = func(input, num_groups, mode.constant(weight), mode.constant(bias), eps)
    return _scaled_norm(
        mode, output, lambda: F.group_norm(input, num_groups, eps=eps), weight, bias, 1
    )


def _batch_norm(
    mode: Capture,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    scale, shift = mode.constant(weight), mode.constant(bias)
    output = func(input, running_mean, running_var, scale, shift, training, momentum, eps)
    # The statistics of a batch in training come from the batch: a second call must not count.
    kept = (None, None) if training else (running_mean, running_var)
    return _scaled_norm(
        mode,
        output,
        lambda: F.batch_norm(input, *kept, None, None, training, 0.0, eps),
        weight,
        bias,
        1,
    )


def _instance_norm(
    mode: Capture,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    scale, shift = mode.constant(weight), mode.constant(bias)
    output = func(input, running_mean, running_var, scale, shift, use_input_stats, momentum, eps)
    kept = (None, None) if use_input_stats else (running_mean, running_var)
    return _scaled_norm(
        mode,
        output,
        lambda: F.instance_norm(input, *kept, None, None, use_input_stats, 0.0, eps),
        weight,
        bias,
        1,
    )


def _scaled_norm(
    mode: Capture,
    output: Tensor,
    normalized: Callable[[], Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    channel: int | None,
) -> Tensor:
    """normal * weight + bias; the parameters lie on axis ``channel``, or on the last axes.

    The output is the layer's own, bit for bit: another rounding would send values near zero to
    the other side of a ReLU.
    """
    parameter = weight if weight is not None else bias
    if parameter is None or (mode.ref(weight) is None and mode.ref(bias) is None):
        return output
    with torch.no_grad():
        normal = output if mode.ref(weight) is None else normalized()
    trailing = 0 if channel is None else output.dim() - channel - 1
    first = output.dim() - parameter.dim() - trailing
    axes = tuple(range(first, first + parameter.dim()))
    saved = (normal.detach(), tuple(parameter.shape), axes)
    return mode.record("norm", output, mode.ref(weight), mode.ref(bias), saved, axes)


def elementwise(mode: Capture, func: Any, left: Any, right: Any, **options: Any) -> Any:
    """Sum or product of a bare parameter and an activation, broadcast against each other."""
    operands = (left, right)
    trained = [isinstance(x, Tensor) and id(x) in mode.trained for x in operands]
    other = operands[trained.index(False)] if False in trained else None
    if sum(trained) != 1 or options or not isinstance(other, Tensor) or mode.dummy is None:
        mode.mark_generic(operands)
        return func(left, right, **options)
    parameter = operands[trained.index(True)]
    output = func(
        *(mode.constant(x) if own else x for x, own in zip(operands, trained, strict=True))
    )
    offset = output.dim() - parameter.dim()
    if offset < 0 or (offset == 0 and parameter.shape[:1] != (1,)):
        # No axis is left for the examples.
        mode.mark_generic((parameter,))
        return output
    axes = tuple(offset + axis for axis, size in enumerate(parameter.shape) if size > 1)
    factor = other.detach().expand(output.shape)
    saved = (factor, tuple(parameter.shape), axes)
    scales = func.__name__ in ("mul", "__mul__", "__rmul__")
    ref = mode.ref(parameter)
    return mode.record(
        "elementwise", output, ref if scales else None, None if scales else ref, saved, axes
    )


FUSED: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: decompose.attention,
    torch.lstm: decompose.recurrent,
    torch.gru: decompose.recurrent,
    torch.rnn_tanh: decompose.recurrent,
    torch.rnn_relu: decompose.recurrent,
    torch.lstm_cell: decompose.cell,
    torch.gru_cell: decompose.cell,
    torch.rnn_tanh_cell: decompose.cell,
    torch.rnn_relu_cell: decompose.cell,
}
HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    **dict.fromkeys(
        (
            torch.add,
            torch.mul,
            Tensor.add,
            Tensor.mul,
            Tensor.__add__,
            Tensor.__radd__,
            Tensor.__mul__,
            Tensor.__rmul__,
        ),
        elementwise,
    ),
    **FUSED,
}
