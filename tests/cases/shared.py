"""Mixtures of experts, and biases of relative positions, which a layer has once for all examples.

In every way in which models multiply with a stack of matrices, and attention is given a bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.case import Case, Function, parameter, tokens

EXPERTS, CHOSEN, WIDTH, INNER = 4, 2, 6, 5


def looped(m: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(hidden)
    for expert in index.unique():
        token, place = (index == expert).nonzero(as_tuple=True)
        inner = F.linear(hidden[token], m.up[expert]).tanh()
        own = inner @ m.down[int(expert)].T + m.shift[expert.expand(len(token))]
        out = out.index_add(0, token, own * weights[token, place, None])
    return out


def copied(m: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """A copy of a matrix for every row."""
    rows, expert = hidden.repeat_interleave(CHOSEN, 0), index.reshape(-1)
    inner = torch.bmm(m.up[expert], rows.unsqueeze(-1)).squeeze(-1).tanh()
    own = torch.bmm(inner.unsqueeze(1), m.down[expert].transpose(1, 2)).squeeze(1)
    own = own + m.shift[expert]
    return (own * weights.reshape(-1, 1)).view(len(hidden), CHOSEN, -1).sum(1)


def whole(m: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Every expert on every token."""
    inner = torch.bmm(hidden.expand(EXPERTS, -1, -1), m.up.mT).tanh()
    own = torch.matmul(inner, m.down.transpose(-1, -2))
    return (
        own * torch.zeros(len(hidden), EXPERTS).to(own).scatter(1, index, weights).T[..., None]
    ).sum(0)


def mixture(experts) -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        hidden = m.words(x)
        flat = hidden.reshape(-1, WIDTH)
        weights, index = m.router(flat).softmax(-1).topk(CHOSEN, -1)
        return m.head((flat + experts(m, flat, index, weights)).view_as(hidden).tanh())

    shift = {} if experts is whole else {"shift": parameter(EXPERTS, WIDTH)}
    return Function(
        run,
        words=nn.Embedding(9, WIDTH),
        router=nn.Linear(WIDTH, EXPERTS),
        up=parameter(EXPERTS, INNER, WIDTH),
        down=parameter(EXPERTS, WIDTH, INNER),
        head=nn.Linear(WIDTH, 2),
        **shift,
    )


HEADS, LENGTH = 2, 4


def attended(query: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, query, query, attn_mask=bias)


def padded(query: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    return attended(query, torch.where(mask[:, None, None], bias, -30.0))


def filled_elsewhere(query: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    low = torch.full((), -30.0, dtype=bias.dtype).expand(len(mask), HEADS, LENGTH, LENGTH)
    return attended(query, low.where(~mask[:, None, None], bias))


def causal(query: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    lower = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    return attended(query, torch.where(lower, bias, -30.0).contiguous())


def direct(query: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    return attended(query, bias)


def scaled(query: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """As transformers' T5 calls it."""
    return F.scaled_dot_product_attention(
        query, query, query, attn_mask=bias, dropout_p=0.0, scale=0.3, is_causal=False
    )


def by_position(query: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, query, query, bias, 0.0, False, scale=0.3)


def summed(query: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    low = torch.zeros(len(mask), 1, 1, LENGTH).to(query).masked_fill(~mask[:, None, None], -30.0)
    return (query @ query.mT + (bias + low)).softmax(-1) @ query


def relative(attention) -> nn.Module:
    """Two layers that share one bias, as those of T5 do."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        hidden, place = m.words(x), torch.arange(LENGTH)
        distance = (place[:, None] - place[None]).clamp(-2, 2) + 2
        bias = m.bias(distance).permute([2, 0, 1]).unsqueeze(0)
        for layer in m.layers:
            query = layer(hidden).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            hidden = attention(query, bias, x > 1).transpose(1, 2).flatten(2).tanh()
        return m.head(hidden)

    return Function(
        run,
        words=nn.Embedding(9, WIDTH),
        bias=nn.Embedding(5, HEADS),
        layers=nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)]),
        head=nn.Linear(WIDTH, 2),
    )


SHARED = [
    *(
        Case(f"experts/{way.__name__}", lambda way=way: mixture(way), tokens(9, 5))
        for way in (looped, copied, whole)
    ),
    *(
        Case(f"relative/{way.__name__}", lambda way=way: relative(way), tokens(9, LENGTH))
        for way in (padded, filled_elsewhere, causal, direct, scaled, by_position, summed)
    ),
]
