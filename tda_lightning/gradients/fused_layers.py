"""Attention and recurrent layers written as the linear maps they consist of.

The fused kernels hide their inner activations. Here every product with a parameter goes through
``linear``, which notes it; the rest is the layer's own arithmetic. The same decomposition gives
``vmap`` something it can batch (the fused recurrent kernels have no rule).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

_ATTENTION_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


# Called with (inputs, weight, bias, rows of the weight, rows of the bias): see Capture.linear.
LinearMap: TypeAlias = Callable[..., Tensor]


def attention(
    linear: LinearMap,
    func: Callable[..., tuple[Tensor, Tensor | None]],
    *args: object,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward`` with its projections taken out.

    The projections are applied here and torch's own function is called with identity
    projections in their place, so masks, ``add_bias_kv``, ``add_zero_attn`` and returned weights
    are torch's own arithmetic, bit for bit.
    """
    bound = _ATTENTION_SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    inputs = query, key, value = given["query"], given["key"], given["value"]
    width = given["embed_dim_to_check"]
    weight, bias = given["in_proj_weight"], given["in_proj_bias"]
    parts = [slice(start, start + width) for start in (0, width, 2 * width)]
    if given["use_separate_proj_weight"]:
        projected = [
            linear(x, given[name], bias, bias_rows=rows)
            for x, name, rows in zip(
                inputs, ("q_proj_weight", "k_proj_weight", "v_proj_weight"), parts, strict=True
            )
        ]
    elif query is key and key is value:
        projected = list(linear(query, weight, bias).chunk(3, dim=-1))
    else:
        projected = [linear(x, weight, bias, rows) for x, rows in zip(inputs, parts, strict=True)]
    identity = torch.eye(width, dtype=query.dtype, device=query.device)
    call = dict(given)
    call.update(zip(("query", "key", "value"), projected, strict=True))
    call.update(in_proj_weight=None, in_proj_bias=None, use_separate_proj_weight=True)
    call.update(q_proj_weight=identity, k_proj_weight=identity, v_proj_weight=identity)
    call.update(out_proj_weight=identity, out_proj_bias=None)
    attended, weights = func(**call)
    return linear(attended, given["out_proj_weight"], given["out_proj_bias"]), weights


def _lstm_step(
    gates_in: Tensor, gates_hidden: Tensor, hidden: Tensor, cell_state: Tensor
) -> tuple[Tensor, Tensor]:
    i, f, g, o = (gates_in + gates_hidden).chunk(4, dim=-1)
    cell_state = f.sigmoid() * cell_state + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell_state.tanh(), cell_state


def _gru_step(
    gates_in: Tensor, gates_hidden: Tensor, hidden: Tensor, cell_state: None
) -> tuple[Tensor, None]:
    reset_in, update_in, new_in = gates_in.chunk(3, dim=-1)
    reset_hidden, update_hidden, new_hidden = gates_hidden.chunk(3, dim=-1)
    reset = (reset_in + reset_hidden).sigmoid()
    update = (update_in + update_hidden).sigmoid()
    new = (new_in + reset * new_hidden).tanh()
    return (1 - update) * new + update * hidden, None


def _elman_step(activation: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, None]]:
    def step(
        gates_in: Tensor, gates_hidden: Tensor, hidden: Tensor, cell_state: None
    ) -> tuple[Tensor, None]:
        return activation(gates_in + gates_hidden), None

    return step


_STEPS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": _elman_step(torch.tanh),
    "rnn_relu": _elman_step(torch.relu),
}


def recurrent(
    linear: LinearMap, func: Callable[..., object], *args: Any, **kwargs: object
) -> object:
    """``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh`` and ``torch.rnn_relu``, layer by layer.

    A packed sequence orders its rows by length and forgets which example each belongs to: it stays
    fused, and its parameters are left to the general path.
    """
    if not isinstance(args[3], bool):  # packed
        return func(*args, **kwargs)
    inputs, state, parameters, biases, layers, dropout, training, bidirectional, batch_first = args
    step = _STEPS[func.__name__]
    is_lstm = func.__name__ == "lstm"
    hidden_states, cell_states = state if is_lstm else (state, [])
    directions = 2 if bidirectional else 1
    per_direction = len(parameters) // (layers * directions)
    time_axis = 1 if batch_first else 0
    final_hidden: list[Tensor] = []
    final_cell: list[Any] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            own = parameters[index * per_direction : (index + 1) * per_direction]
            weight_in, weight_hidden = own[:2]
            bias_in, bias_hidden = own[2:4] if biases else (None, None)
            projection = own[-1] if per_direction in (3, 5) else None
            sequence = list(linear(inputs, weight_in, bias_in).unbind(time_axis))
            hidden = hidden_states[index]
            cell_state = cell_states[index] if is_lstm else None
            steps = []
            for gates_in in reversed(sequence) if direction else sequence:
                gates_hidden = linear(hidden, weight_hidden, bias_hidden)
                hidden, cell_state = step(gates_in, gates_hidden, hidden, cell_state)
                if projection is not None:
                    hidden = linear(hidden, projection)
                steps.append(hidden)
            final_hidden.append(hidden)
            final_cell.append(cell_state)
            outputs.append(torch.stack(steps[::-1] if direction else steps, dim=time_axis))
        inputs = torch.cat(outputs, dim=-1)
        if dropout and training and layer < layers - 1:
            # The fused layer drops with time first; the same random numbers then drop the same.
            timed = inputs.transpose(0, 1).contiguous() if batch_first else inputs
            dropped = F.dropout(timed, dropout, training=True)
            inputs = dropped.transpose(0, 1) if batch_first else dropped
    if is_lstm:
        return inputs, torch.stack(final_hidden), torch.stack(final_cell)
    return inputs, torch.stack(final_hidden)


def cell(
    linear: LinearMap,
    func: Callable[..., object],
    inputs: Tensor,
    state: Any,
    weight_in: Tensor,
    weight_hidden: Tensor,
    bias_in: Tensor | None = None,
    bias_hidden: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """``torch.lstm_cell``, ``torch.gru_cell``, ``torch.rnn_tanh_cell``, ``torch.rnn_relu_cell``."""
    name = func.__name__.removesuffix("_cell")
    hidden, cell_state = state if name == "lstm" else (state, None)
    gates_in = linear(inputs, weight_in, bias_in)
    gates_hidden = linear(hidden, weight_hidden, bias_hidden)
    hidden, cell_state = _STEPS[name](gates_in, gates_hidden, hidden, cell_state)
    return (hidden, cell_state) if name == "lstm" else hidden


def weight_norm(
    linear: LinearMap, func: Callable[..., Tensor], v: Tensor, g: Tensor, dim: int = 0
) -> Tensor:
    """``torch._weight_norm`` as g v / |v|: torch's own second derivative of it leaves out how the
    norm depends on v."""
    return normalized_weight(v, g, dim)


def normalized_weight(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / |v|, the norm over all axes but ``dim`` (-1: over all)."""
    axes = [axis for axis in range(v.dim()) if dim == -1 or axis != dim % v.dim()]
    return v * (g / v.square().sum(axes, keepdim=dim != -1).sqrt())


FUSED: dict[object, Callable[..., object]] = {
    F.multi_head_attention_forward: attention,
    torch._weight_norm: weight_norm,
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), recurrent),
    **dict.fromkeys(
        (torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell), cell
    ),
}
