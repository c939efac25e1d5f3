"""Attention and recurrent layers written as the linear maps they consist of.

The fused kernels hide their inner activations. Here every product with a parameter goes through
``mode.linear``, which records it; the rest is the layer's own arithmetic. The same decomposition
gives ``vmap`` something it can batch (the fused recurrent kernels have no rule).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from tda_lightning.gradients.capture import Capture

_ATTENTION_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def attention(mode: Capture, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``F.multi_head_attention_forward`` with its projections recorded.

    The projections are applied here and torch's own function is called with identity
    projections in their place, so masks, ``add_bias_kv``, ``add_zero_attn`` and returned weights
    are torch's own arithmetic, bit for bit.
    """
    bound = _ATTENTION_SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    call = dict(bound.arguments)
    query, key, value = call["query"], call["key"], call["value"]
    mode.mark_generic((query, key, value, call["bias_k"], call["bias_v"]))
    width = call["embed_dim_to_check"]
    bias = call["in_proj_bias"]
    parts = [slice(0, width), slice(width, 2 * width), slice(2 * width, 3 * width)]
    if call["use_separate_proj_weight"]:
        weights = [call["q_proj_weight"], call["k_proj_weight"], call["v_proj_weight"]]
        projected = [
            mode.linear(inputs, weight, bias, bias_rows=None if bias is None else rows)
            for inputs, weight, rows in zip((query, key, value), weights, parts, strict=True)
        ]
    elif query is key and key is value:
        projected = list(mode.linear(query, call["in_proj_weight"], bias).chunk(3, dim=-1))
    else:
        weight = call["in_proj_weight"]
        projected = [
            mode.linear(inputs, weight, bias, rows=rows)
            for inputs, rows in zip((query, key, value), parts, strict=True)
        ]
    identity = torch.eye(width, dtype=query.dtype, device=query.device)
    call |= {
        "query": projected[0],
        "key": projected[1],
        "value": projected[2],
        "in_proj_weight": None,
        "in_proj_bias": None,
        "use_separate_proj_weight": True,
        "q_proj_weight": identity,
        "k_proj_weight": identity,
        "v_proj_weight": identity,
        "out_proj_weight": identity,
        "out_proj_bias": None,
    }
    attended, weights = func(**call)
    arguments = bound.arguments
    return (
        mode.linear(attended, arguments["out_proj_weight"], arguments["out_proj_bias"]),
        weights,
    )


def _lstm_step(
    gates_in: Tensor, gates_hidden: Tensor, hidden: Tensor, cell_state: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    i, f, g, o = (gates_in + gates_hidden).chunk(4, dim=-1)
    assert cell_state is not None
    cell_state = f.sigmoid() * cell_state + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell_state.tanh(), cell_state


def _gru_step(
    gates_in: Tensor, gates_hidden: Tensor, hidden: Tensor, cell_state: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    reset_in, update_in, new_in = gates_in.chunk(3, dim=-1)
    reset_hidden, update_hidden, new_hidden = gates_hidden.chunk(3, dim=-1)
    reset = (reset_in + reset_hidden).sigmoid()
    update = (update_in + update_hidden).sigmoid()
    new = (new_in + reset * new_hidden).tanh()
    return (1 - update) * new + update * hidden, None


def _tanh_step(
    gates_in: Tensor, gates_hidden: Tensor, hidden: Tensor, cell_state: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    return (gates_in + gates_hidden).tanh(), None


def _relu_step(
    gates_in: Tensor, gates_hidden: Tensor, hidden: Tensor, cell_state: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    return (gates_in + gates_hidden).relu(), None


_STEPS = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": _tanh_step,
    "rnn_relu": _relu_step,
}


def recurrent(mode: Capture, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh`` and ``torch.rnn_relu``, layer by layer.

    A packed sequence orders its rows by length and forgets which example each belongs to; its
    parameters are left to the general path.
    """
    packed = not isinstance(args[3], bool)
    if packed:
        mode.mark_generic(args[3])
        detached = [mode.constant(parameter) for parameter in args[3]]
        return func(*args[:3], detached, *args[4:], **kwargs)
    inputs, state, parameters, biases, layers, dropout, training, bidirectional, batch_first = args
    step = _STEPS[func.__name__]
    is_lstm = func.__name__ == "lstm"
    hidden_states, cell_states = state if is_lstm else (state, None)
    directions = 2 if bidirectional else 1
    per_direction = len(parameters) // (layers * directions)
    final_hidden, final_cell = [], []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            own = parameters[index * per_direction : (index + 1) * per_direction]
            weight_in, weight_hidden = own[0], own[1]
            bias_in, bias_hidden = (own[2], own[3]) if biases else (None, None)
            projection = own[-1] if per_direction in (3, 5) else None
            gates = mode.linear(inputs, weight_in, bias_in)
            hidden = hidden_states[index]
            cell_state = None if cell_states is None else cell_states[index]
            time_axis = 1 if batch_first else 0
            sequence = list(gates.unbind(time_axis))
            steps = []
            for gates_in in reversed(sequence) if direction else sequence:
                gates_hidden = mode.linear(hidden, weight_hidden, bias_hidden)
                hidden, cell_state = step(gates_in, gates_hidden, hidden, cell_state)
                if projection is not None:
                    hidden = mode.linear(hidden, projection)
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
        return (
            inputs,
            torch.stack(final_hidden),
            torch.stack([c for c in final_cell if c is not None]),
        )
    return inputs, torch.stack(final_hidden)


def cell(
    mode: Capture,
    func: Callable[..., Any],
    inputs: Tensor,
    state: Any,
    weight_in: Tensor,
    weight_hidden: Tensor,
    bias_in: Tensor | None = None,
    bias_hidden: Tensor | None = None,
) -> Any:
    """``torch.lstm_cell``, ``torch.gru_cell``, ``torch.rnn_tanh_cell``, ``torch.rnn_relu_cell``."""
    name = func.__name__.removesuffix("_cell")
    hidden, cell_state = state if name == "lstm" else (state, None)
    gates_in = mode.linear(inputs, weight_in, bias_in)
    gates_hidden = mode.linear(hidden, weight_hidden, bias_hidden)
    hidden, cell_state = _STEPS[name](gates_in, gates_hidden, hidden, cell_state)
    return (hidden, cell_state) if name == "lstm" else hidden
