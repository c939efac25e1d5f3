"""Watch a forward pass and keep, at every use of a trained parameter, the layer's input.

A ``TorchFunctionMode`` sees the functional calls that modules end in (``F.linear``,
``F.conv2d``, ...), so a parameter is known by identity, whoever uses it and however often: tied
weights, a layer called several times and ``F.linear(x, other.weight)`` need no special case.
Parameters are detached in the call: the backward pass yields the gradients of the layers' outputs
and never spends time on weight gradients that would be thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tda_lightning.errors import EngineError
from tda_lightning.gradients import decompose
from tda_lightning.gradients.layout import Layout

# Reading these of a parameter does not make a result depend on its values.
_METADATA = frozenset(
    "__get__ __len__ __repr__ __hash__ size dim ndimension numel stride storage_offset "  # noqa: SIM905
    "is_floating_point is_complex is_contiguous data_ptr element_size get_device detach".split()
)
# ... but these attributes are views of the values.
_VALUE_GETTERS = frozenset(
    getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")
)


@dataclass(frozen=True)
class Ref:
    """A trained parameter, or the rows ``start`` to ``stop`` of one."""

    name: str
    start: int
    stop: int
    height: int  # rows of the whole parameter


@dataclass
class Use:
    """One use of trained parameters by one functional call.

    ``kind`` says how ``saved`` and the output's gradient make per-example gradients (see
    ``assemble.py``); ``channel_axes`` are the axes of the output that hold no examples.
    """

    kind: str
    weight: Ref | None
    bias: Ref | None
    saved: Any
    channel_axes: tuple[int, ...]
    output_shape: torch.Size
    gradient: Tensor | None = None
    layout: Layout | None = None

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Uses with the same key have the same layout."""
        names = [ref.name if ref else "" for ref in (self.weight, self.bias)]
        return (self.kind, names[0], names[1], len(self.output_shape))


class Capture(TorchFunctionMode):
    """Records every :class:`Use` of the trained parameters while active.

    ``dummy`` is a zero scalar leaf that requires a gradient; without it nothing is recorded and
    the mode only decomposes fused layers.

    Attributes:
        uses: in order of the calls.
        generic: names of parameters that were used in some way without a native form.
    """

    def __init__(self, trained: dict[int, str], dummy: Tensor | None = None):
        super().__init__()
        self.trained = trained
        self.dummy = dummy
        self.uses: list[Use] = []
        self.generic: set[str] = set()

    def __torch_function__(  # type: ignore[override]
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            if handler is not _elementwise:
                # A parameter fed in as an *input* (learned queries) has no native form.
                self.mark_generic(args[:1] or (kwargs.get("input"),))
            return handler(self, func, *args, **kwargs)
        if func.__name__ not in _METADATA or func in _VALUE_GETTERS:
            self.mark_generic((*args, *kwargs.values()))
        return func(*args, **kwargs)

    def mark_generic(self, values: Iterable[Any]) -> None:
        """Remember the trained parameters among ``values`` as having no native form."""
        for value in values:
            if isinstance(value, Tensor):
                name = self.trained.get(id(value))
                if name is not None:
                    self.generic.add(name)
            elif isinstance(value, (list, tuple)):
                self.mark_generic(value)

    def ref(self, tensor: Tensor | None, rows: slice | None = None) -> Ref | None:
        if tensor is None or (name := self.trained.get(id(tensor))) is None:
            return None
        height = tensor.shape[0] if tensor.dim() else 1
        start, stop, _ = (rows or slice(None)).indices(height)
        return Ref(name, start, stop, height)

    def record(
        self,
        kind: str,
        output: Tensor,
        weight: Ref | None,
        bias: Ref | None,
        saved: Any,
        channel_axes: tuple[int, ...],
    ) -> Tensor:
        """Register a use and make its output's gradient reach it."""
        if self.dummy is None or (weight is None and bias is None):
            return output
        if not output.requires_grad:
            # Nothing upstream needs a gradient: a zero leaf gives the output a history without
            # making it a leaf itself (in-place activations may follow).
            output = output + self.dummy.to(output.dtype)
        use = Use(kind, weight, bias, saved, channel_axes, output.shape)
        self.uses.append(use)

        def keep(gradient: Tensor) -> None:
            use.gradient = gradient

        output.register_hook(keep)
        return output

    def constant(self, tensor: Any) -> Any:
        """The parameter as the call uses it: without its own gradient while recording."""
        return tensor if tensor is None or self.dummy is None else tensor.detach()

    def linear(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        rows: slice | None = None,
        bias_rows: slice | None = None,
    ) -> Tensor:
        """``F.linear`` with the given rows of weight and bias, recorded."""
        used, used_bias = self.constant(weight), self.constant(bias)
        if rows is not None:
            used = used[rows]
        if used_bias is not None and (bias_rows or rows) is not None:
            used_bias = used_bias[bias_rows or rows]
        return self.record(
            "linear",
            F.linear(inputs, used, used_bias),
            self.ref(weight, rows),
            self.ref(bias, bias_rows or rows),
            inputs.detach(),
            (-1,),
        )


def _linear(mode: Capture, func: Any, input: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    return mode.linear(input, weight, bias)


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
    output = F.embedding(input, mode.constant(weight), padding_idx)
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
    def norm(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)

    return _scaled_norm(mode, norm, weight, bias, None)


def _rms_norm(
    mode: Capture,
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    def norm(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.rms_norm(input, normalized_shape, weight, eps)

    return _scaled_norm(mode, norm, weight, None, None)


def _group_norm(
    mode: Capture,
    func: Any,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    def norm(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.group_norm(input, num_groups, weight, bias, eps)

    return _scaled_norm(mode, norm, weight, bias, 1)


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
    def norm(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)

    return _scaled_norm(mode, norm, weight, bias, 1)


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
    def norm(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )

    return _scaled_norm(mode, norm, weight, bias, 1)


def _scaled_norm(
    mode: Capture,
    norm: Callable[[Tensor | None, Tensor | None], Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    channel: int | None,
) -> Tensor:
    """normal * weight + bias; the parameters lie on axis ``channel``, or on the last axes.

    The output is the layer's own, bit for bit: another rounding would send values near zero to
    the other side of a ReLU.
    """
    output = norm(mode.constant(weight), mode.constant(bias))
    parameter = weight if weight is not None else bias
    if parameter is None or (mode.ref(weight) is None and mode.ref(bias) is None):
        return output
    with torch.no_grad():
        normal = output if mode.ref(weight) is None else norm(None, None)
    trailing = 0 if channel is None else output.dim() - channel - 1
    first = output.dim() - parameter.dim() - trailing
    axes = tuple(range(first, first + parameter.dim()))
    saved = (normal.detach(), tuple(parameter.shape), axes)
    return mode.record("norm", output, mode.ref(weight), mode.ref(bias), saved, axes)


def _elementwise(mode: Capture, func: Any, left: Any, right: Any, **options: Any) -> Any:
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


_HANDLERS: dict[Any, Callable[..., Any]] = {
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
    F.multi_head_attention_forward: decompose.attention,
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
        _elementwise,
    ),
    torch.lstm: decompose.recurrent,
    torch.gru: decompose.recurrent,
    torch.rnn_tanh: decompose.recurrent,
    torch.rnn_relu: decompose.recurrent,
    torch.lstm_cell: decompose.cell,
    torch.gru_cell: decompose.cell,
    torch.rnn_tanh_cell: decompose.cell,
    torch.rnn_relu_cell: decompose.cell,
}
