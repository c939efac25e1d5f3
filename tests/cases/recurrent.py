"""RNN, LSTM and GRU in all their options, cells, packed sequences, given hidden states."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.cases.case import Case, Function, normal, parameter, tokens


def _states(hidden: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """Final states [layers, batch, width] as [batch, layers * width]."""
    hidden = hidden if isinstance(hidden, tuple) else (hidden,)
    return [state.transpose(0, 1).flatten(1) for state in hidden]


def _run(module: nn.Module, inputs: Tensor) -> Tensor:
    """Outputs and final states both reach the loss."""
    time_major = not module.layer.batch_first
    out, hidden = module.layer(inputs.transpose(0, 1) if time_major else inputs)
    out = out.transpose(0, 1) if time_major else out
    return torch.cat([out.flatten(1), *_states(hidden)], 1)


def _recurrent(kind: type[nn.Module], **options) -> nn.Module:
    return Function(_run, layer=kind(3, 4, **options))


def _last(module: nn.Module, numbers: Tensor) -> Tensor:
    return module.head(module.layer(module.embed(numbers))[0][:, -1])


def _given(module: nn.Module, inputs: Tensor) -> Tensor:
    """The first position makes the hidden state, by a layer of its own."""
    start = module.start(inputs[:, 0]).tanh()[None]
    hidden = (start, -start) if isinstance(module.layer, nn.LSTM) else start
    out, last = module.layer(inputs[:, 1:], hidden)
    return torch.cat([out.flatten(1), *_states(last)], 1)


def _learned_state(module: nn.Module, inputs: Tensor) -> Tensor:
    hidden = module.start.expand(-1, len(inputs), -1).contiguous()
    return module.layer(inputs, hidden)[0]


def _packed(module: nn.Module, numbers: Tensor) -> Tensor:
    """Lengths from the data: the first entry of every row, of 1 to 4 positions."""
    lengths = 1 + numbers[:, 0] % 4
    packed = pack_padded_sequence(
        module.embed(numbers[:, 1:]), lengths, batch_first=True, enforce_sorted=False
    )
    out, hidden = module.layer(packed)
    out = pad_packed_sequence(out, batch_first=True, total_length=4)[0]
    return torch.cat([out.flatten(1), *_states(hidden)], 1)


def _cells(module: nn.Module, inputs: Tensor) -> Tensor:
    hidden, outputs = None, []
    for step in inputs.unbind(1):
        hidden = module.cell(step, hidden)
        outputs.append(hidden[0] if isinstance(hidden, tuple) else hidden)
    return torch.stack(outputs, 1)


def _chain(module: nn.Module, inputs: Tensor) -> Tensor:
    """The same layer over two halves, its state handed on."""
    first, hidden = module.layer(inputs[:, :2])
    second, _ = module.layer(inputs[:, 2:], hidden)
    return torch.cat([first, second], 1)


def _named(kind: type[nn.Module]) -> str:
    return kind.__name__.lower()


RECURRENT = [
    *(
        Case(
            f"{_named(kind)}/{name}",
            lambda k=kind, o=options: _recurrent(k, **o),
            normal(5, 3),
            size=2,
        )
        for kind in (nn.RNN, nn.LSTM, nn.GRU)
        for name, options in (
            ("time_major", {}),
            ("batch_first", {"batch_first": True}),
            ("no_bias", {"batch_first": True, "bias": False}),
            ("bidirectional", {"batch_first": True, "bidirectional": True}),
            ("two_layers", {"batch_first": True, "num_layers": 2, "dropout": 0.5}),
            ("two_layers_bidirectional_time_major", {"num_layers": 2, "bidirectional": True}),
        )
    ),
    Case(
        "rnn/relu",
        lambda: _recurrent(nn.RNN, nonlinearity="relu", batch_first=True, num_layers=2),
        normal(5, 3),
    ),
    Case(
        "lstm/projection", lambda: _recurrent(nn.LSTM, proj_size=2, batch_first=True), normal(5, 3)
    ),
    Case(
        "lstm/projection_all",
        lambda: _recurrent(nn.LSTM, proj_size=2, num_layers=2, bidirectional=True),
        normal(5, 3),
        size=2,
    ),
    *(
        Case(
            f"{_named(kind)}/given_state",
            lambda k=kind: Function(_given, start=nn.Linear(3, 4), layer=k(3, 4, batch_first=True)),
            normal(4, 3),
        )
        for kind in (nn.RNN, nn.LSTM, nn.GRU)
    ),
    Case(
        "gru/learned_state",
        lambda: Function(
            _learned_state, start=parameter(1, 1, 4), layer=nn.GRU(3, 4, batch_first=True)
        ),
        normal(4, 3),
    ),
    *(
        Case(
            f"{_named(kind)}/packed",
            lambda k=kind: Function(
                _packed, embed=nn.Embedding(8, 3), layer=k(3, 4, batch_first=True)
            ),
            tokens(8, 5),
            size=5,
            may_refuse=True,
        )
        for kind in (nn.RNN, nn.LSTM, nn.GRU)
    ),
    Case(
        "lstm/classifier",
        lambda: Function(
            _last,
            embed=nn.Embedding(6, 3, padding_idx=0),
            layer=nn.LSTM(3, 4, batch_first=True),
            head=nn.Linear(4, 3),
        ),
        tokens(6, 5),
        "classification",
        size=4,
    ),
    Case(
        "gru/state_handed_on",
        lambda: Function(_chain, layer=nn.GRU(3, 4, batch_first=True)),
        normal(4, 3),
    ),
    *(
        Case(f"{_named(kind)}/loop", lambda k=kind: Function(_cells, cell=k(3, 4)), normal(4, 3))
        for kind in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
    ),
    Case("gru/batch_is_time", lambda: _recurrent(nn.GRU), normal(4, 3), size=4),
    Case(
        "lstm/batch_is_width", lambda: _recurrent(nn.LSTM, batch_first=True), normal(3, 3), size=3
    ),
]
