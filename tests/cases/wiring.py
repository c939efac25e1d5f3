"""Modules and parameters used more than once, adapters, unusual axis orders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.cases.case import Case, Function, frozen, normal, parameter, tokens


def _tied_language_model() -> nn.Module:
    embedding, head = nn.Embedding(6, 4), nn.Linear(4, 6)
    head.weight = embedding.weight
    return nn.Sequential(embedding, nn.Tanh(), head)


def _two_linears_one_weight() -> nn.Module:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


def _two_norms_one_weight() -> nn.Module:
    first, second = nn.LayerNorm(3), nn.LayerNorm(3)
    second.weight = first.weight
    return nn.Sequential(first, nn.Linear(3, 3), nn.Tanh(), second)


def _shared_block() -> nn.Module:
    block = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    return nn.Sequential(block, nn.Linear(3, 3), block, block)


SHARED = [
    Case(
        "shared/called_three_times",
        lambda: Function(lambda m, x: m.f(m.f(m.f(x).tanh()).tanh()), f=nn.Linear(3, 3)),
        normal(3),
    ),
    Case(
        "shared/called_at_two_lengths",
        lambda: Function(
            lambda m, x: torch.cat([m.f(x[:, :1]), m.f(x[:, 1:]).tanh()], 1), f=nn.Linear(3, 2)
        ),
        normal(4, 3),
    ),
    Case(
        "shared/called_at_two_ranks",
        lambda: Function(lambda m, x: m.f(x).tanh() * m.f(x[:, 0])[:, None], f=nn.Linear(3, 2)),
        normal(4, 3),
    ),
    Case(
        "shared/convolution_at_two_sizes",
        lambda: Function(
            lambda m, x: m.f(x).flatten(1).sum(1, True) + m.f(F.avg_pool2d(x, 2)).tanh().flatten(1),
            f=nn.Conv2d(2, 3, 2),
        ),
        normal(2, 6, 6),
    ),
    Case(
        "shared/siamese",
        lambda: Function(lambda m, x: m.f(x[:, 0]).tanh() - m.f(x[:, 1]).tanh(), f=nn.Linear(3, 2)),
        normal(2, 3),
    ),
    Case(
        "shared/siamese_joined",
        lambda: Function(
            lambda m, x: torch.stack(m.f(torch.cat([x[:, 0], x[:, 1]])).tanh().chunk(2), 1),
            f=nn.Linear(3, 2),
        ),
        normal(2, 3),
    ),
    Case("shared/blocks", _shared_block, normal(3)),
    Case(
        "shared/norm_twice",
        lambda: Function(lambda m, x: m.n(m.n(x).tanh()), n=nn.LayerNorm(3)),
        normal(4, 3),
    ),
    Case(
        "shared/embedding_twice",
        lambda: Function(
            lambda m, x: m.e(x[:, :2]).mean(1) * m.e(x[:, 2:]).sum(1), e=nn.Embedding(6, 3)
        ),
        tokens(6, 5),
    ),
    Case("tied/embedding_and_head", _tied_language_model, tokens(6, 4), "classification"),
    Case("tied/two_linears", _two_linears_one_weight, normal(4, 3)),
    Case("tied/two_norms", _two_norms_one_weight, normal(4, 3)),
    Case(
        "tied/autoencoder",
        lambda: Function(
            lambda m, x: F.linear(m.encoder(x).tanh(), m.encoder.weight.t()),
            encoder=nn.Linear(4, 2),
        ),
        normal(4),
    ),
    Case(
        "tied/head_read_from_embedding",
        lambda: Function(
            lambda m, x: m.embed(x).tanh() @ m.embed.weight.T, embed=nn.Embedding(5, 3)
        ),
        tokens(5, 4),
        "classification",
    ),
]


class _LowRank(nn.Module):
    """A frozen Linear with a trained low-rank addition (Hu et al. 2021, 2106.09685)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = frozen(nn.Linear(4, 3))
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + 0.5 * self.up(self.down(inputs))


ADAPTED = [
    Case(
        "adapted/low_rank",
        lambda: nn.Sequential(_LowRank(), nn.Tanh(), frozen(nn.Linear(3, 2))),
        normal(5, 4),
    ),
    Case(
        "adapted/low_rank_merged",
        lambda: Function(
            lambda m, x: F.linear(x, m.base + m.up @ m.down).tanh(),
            base=torch.randn(3, 4),
            up=parameter(3, 2),
            down=parameter(2, 4),
        ),
        normal(5, 4),
    ),
    Case(
        "adapted/weight_norm",
        lambda: nn.Sequential(weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)),
        normal(4),
    ),
    Case(
        "adapted/weight_norm_convolution",
        lambda: nn.Sequential(weight_norm(nn.Conv2d(2, 3, 3)), nn.Tanh()),
        normal(2, 4, 4),
    ),
    Case(
        "adapted/frozen_backbone",
        lambda: nn.Sequential(
            frozen(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh())), nn.Linear(5, 3)
        ),
        normal(4),
        "classification",
    ),
    Case(
        "adapted/frozen_head",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), frozen(nn.Linear(5, 3))),
        normal(4),
        "classification",
    ),
    Case(
        "adapted/norms_only",
        lambda: nn.Sequential(
            frozen(nn.Linear(4, 4)), nn.LayerNorm(4), nn.Tanh(), frozen(nn.Linear(4, 2))
        ),
        normal(3, 4),
    ),
    Case(
        "adapted/bilinear",
        lambda: Function(lambda m, x: m.f(x[..., :2], x[..., 2:]).tanh(), f=nn.Bilinear(2, 3, 2)),
        normal(5),
    ),
]


def _merge(module: nn.Module, inputs: Tensor) -> Tensor:
    """Batch and time merged into one axis before the layers, and taken apart after them."""
    hidden = module.first(inputs.reshape(-1, inputs.shape[-1])).tanh()
    return module.second(hidden).view(*inputs.shape[:2], -1)


def _merge_time_major(module: nn.Module, inputs: Tensor) -> Tensor:
    moved = inputs.transpose(0, 1)
    hidden = module.first(moved.reshape(-1, inputs.shape[-1])).tanh()
    return module.second(hidden).view(*moved.shape[:2], -1).transpose(0, 1)


def _two_layers(function) -> nn.Module:
    return Function(function, first=nn.Linear(3, 4), second=nn.Linear(4, 2))


AXES = [
    Case(
        "axes/time_major",
        lambda: _two_layers(
            lambda m, x: m.second(m.first(x.transpose(0, 1)).tanh()).transpose(0, 1)
        ),
        normal(5, 3),
    ),
    Case(
        "axes/time_major_batch_is_time",
        lambda: _two_layers(
            lambda m, x: m.second(m.first(x.transpose(0, 1)).tanh()).transpose(0, 1)
        ),
        normal(4, 3),
        size=4,
    ),
    Case(
        "axes/last",
        lambda: Function(lambda m, x: (m.weight @ x.T).tanh().T, weight=parameter(2, 3)),
        normal(3),
        size=4,
    ),
    Case("axes/merged", lambda: _two_layers(_merge), normal(5, 3)),
    Case("axes/merged_one_position", lambda: _two_layers(_merge), normal(1, 3)),
    Case("axes/merged_batch_is_width", lambda: _two_layers(_merge), normal(5, 3), size=4),
    Case("axes/merged_time_major", lambda: _two_layers(_merge_time_major), normal(5, 3)),
    Case(
        "axes/merged_time_major_batch_is_time",
        lambda: _two_layers(_merge_time_major),
        normal(3, 3),
        size=3,
    ),
    Case(
        "axes/merged_frames",
        lambda: Function(
            lambda m, x: m.head(m.f(x.flatten(0, 1)).tanh().mean((2, 3)).view(len(x), -1, 2)),
            f=nn.Conv2d(1, 2, 2),
            head=nn.Linear(2, 2),
        ),
        normal(3, 1, 4, 4),
    ),
    Case(
        "axes/merged_norms",
        lambda: Function(
            lambda m, x: m.g(m.n(x.reshape(-1, 4)).tanh()[..., None]).view(len(x), -1),
            n=nn.LayerNorm(4),
            g=nn.GroupNorm(2, 4),
        ),
        normal(3, 4),
    ),
    Case(
        "axes/merged_embedding",
        lambda: Function(
            lambda m, x: m.e(x.reshape(-1)).view(*x.shape, -1).tanh(), e=nn.Embedding(5, 3)
        ),
        tokens(5, 4),
    ),
    Case(
        "axes/batch_is_features",
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)),
        normal(4, 4),
        size=4,
    ),
    Case(
        "axes/batch_is_channels",
        lambda: nn.Sequential(nn.Conv1d(3, 3, 3, padding=1), nn.Tanh()),
        normal(3, 3),
        size=3,
    ),
    Case(
        "axes/one_example", lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh()), normal(4, 3), size=1
    ),
    Case(
        "axes/scalar_output",
        lambda: Function(lambda m, x: m.f(x).squeeze(-1), f=nn.Linear(3, 1)),
        normal(3),
    ),
]

WIRING = [*SHARED, *ADAPTED, *AXES]
