"""How large the statistics of an interval will be, told from the modules that hold parameters.

Only a batch shows how each parameter is used. Before it, a parameter counts as used in the way of
the module that holds it; one that is used in another way may take another number of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from tda_lightning.curvature.sides import limits, side_form
from tda_lightning.gradients.moments import FULL
from tda_lightning.recording.curvature_statistics import OnlineCurvature

NOTE = (
    "The size of curvature statistics is told from the kinds of modules. Before the first batch "
    "nothing is known of parameters that are used elsewhere too (an embedding's weights as a "
    "head), nor of the activations of a watched step."
)
# Measured on files of 1 to 40 blocks: an empty file, and what every block adds.
_FILE, _BLOCK = 400, 2_100
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class PlannedBlock:
    """One block of parameters.

    Attributes:
        groups, rows, columns: its shape.
        one_hot: its row side is kept as a diagonal.
        factored: its gradient is a product of inputs and output gradients.
    """

    groups: int
    rows: int
    columns: int
    one_hot: bool = False
    factored: bool = True

    def numbers(self, dense_side: int | None, *, packed: bool) -> int:
        """Numbers of its sums; ``packed``: of a symmetric matrix the triangle."""
        factored, unfactored, rank = limits(dense_side)
        limit = factored if self.factored else unfactored
        total = self.groups + 4  # count; trace, examples and samples
        for width, diagonal in ((self.rows, self.one_hot), (self.columns, False)):
            if diagonal:
                size = width
            elif side_form(width, limit, rank) != FULL:
                size = width * (rank + 1)
            else:
                size = width * (width + 1) // 2 if packed else width * width
            total += self.groups * size
        return total


class StatisticsSize(NamedTuple):
    """Bytes of the statistics of one interval, on disk and as sums in memory."""

    file: int
    sums: int


def statistics_size(
    settings: OnlineCurvature, module: nn.Module, trained: Mapping[str, Tensor]
) -> StatisticsSize:
    """The size of what is gathered of the parameters ``trained``."""
    blocks = list(planned_blocks(module, trained))
    width = torch.finfo(settings.dtype).bits // 8
    packed, whole = (
        width * sum(block.numbers(settings.dense_side, packed=packed) for block in blocks)
        for packed in (True, False)
    )
    return StatisticsSize(_FILE + _BLOCK * len(blocks) + packed, whole)


def planned_blocks(module: nn.Module, trained: Mapping[str, Tensor]) -> Iterator[PlannedBlock]:
    """The blocks of parameters used as the modules that hold them use them."""
    named = dict(module.named_parameters())
    waiting = {id(named[name]): tuple(trained[name].shape) for name in trained}
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append((part, name))
    for places in holders.values():
        part, name = places[0]
        parameter = getattr(part, name)
        if id(parameter) not in waiting or _is_partner(part, name, waiting, holders):
            continue
        shape = waiting[id(parameter)]
        bias = _partner(part, name)
        joined = bias is not None and id(bias) in waiting and len(holders[id(bias)]) == 1
        yield _block(part, shape, math.prod(bias.shape) if joined else 0, tied=len(places) > 1)  # type: ignore[union-attr]


def _partner(part: nn.Module, name: str) -> nn.Parameter | None:
    """The bias that belongs to weight ``name``: weight and bias, weight_ih_l0 and bias_ih_l0."""
    if "weight" not in name:
        return None
    return getattr(part, name.replace("weight", "bias"), None)


def _is_partner(
    part: nn.Module,
    name: str,
    waiting: Mapping[int, object],
    holders: Mapping[int, list[tuple[nn.Module, str]]],
) -> bool:
    """Whether parameter ``name`` is the bias of a weight that is trained, and of no other."""
    weight = getattr(part, name.replace("bias", "weight"), None) if "bias" in name else None
    return (
        weight is not None and id(weight) in waiting and len(holders[id(getattr(part, name))]) == 1
    )


def _block(part: nn.Module, shape: tuple[int, ...], bias: int, tied: bool) -> PlannedBlock:
    if len(shape) < 2 or isinstance(part, _NORMS):
        return PlannedBlock(1, 1, math.prod(shape) + bias, factored=False)
    groups = part.groups if isinstance(part, _ConvNd) else 1
    rows, columns = shape[0] // groups, math.prod(shape[1:]) + bool(bias)
    embedding = isinstance(part, (nn.Embedding, nn.EmbeddingBag))
    # Used in two ways, it has no factors: unless both are alike, such as a layer held twice.
    layer = isinstance(part, (nn.Linear, _ConvNd, nn.MultiheadAttention, nn.RNNBase))
    factored = layer or (embedding and not tied)
    return PlannedBlock(groups, rows, columns, embedding and not tied, factored)
