"""Training steps composed of parts, and what each example contributes to them, written down again.

A step is one or two losses of a small network, each a choice of terms, of the way that they are
reduced over the batch, and of a factor, with a penalty on the weights. What is right is computed
from single examples by formulas that know nothing of the step: numerators and masses of example n.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = POSITIONS = 3
CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 1.7], dtype=torch.float64)

# name: network of inputs [batch, position, 3] and mask [batch, position]


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.net(x)


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(3, 4, 2, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.conv(x.movedim(-1, 1))[..., :POSITIONS].tanh().movedim(1, -1))


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.cell(x.transpose(0, 1))[0]).transpose(0, 1)


class Sorting(Tokens):
    """Sorted by length inside, and put back."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        order = mask.sum(1).sort(descending=True, stable=True).indices
        return self.net(x[order])[order.argsort()]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.scale = nn.LayerNorm(3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.scale(self.attention(x, x, x, need_weights=False)[0] + x)


class Bare(nn.Module):
    """Parameters outside of layers, and positions that belong to no example."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3) / 2)
        self.position = nn.Embedding(POSITIONS, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (x + self.position(torch.arange(POSITIONS))).tanh() @ self.weight


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tokens": Tokens,
    "convolved": Convolved,
    "time first": TimeFirst,
    "sorting": Sorting,
    "attending": Attending,
    "bare": Bare,
}


def _gaussian(o: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return 0.5 * (o[..., 1] + (o[..., 0] - t[..., 0]) ** 2 / o[..., 1].exp())


def _cross_entropy(o: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(o.movedim(-1, 1), y, reduction="none")


def _focal(o: Tensor, y: Tensor, t: Tensor) -> Tensor:
    own = _cross_entropy(o, y, t)
    return (1 - torch.exp(-own)) ** 2 * own


# Terms [batch, position] of outputs [batch, position, 3], labels and targets.
TERMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cross entropy": _cross_entropy,
    "gather": lambda o, y, t: -o.log_softmax(-1).gather(-1, y[..., None])[..., 0],
    "focal": _focal,
    "square": lambda o, y, t: ((o - t) ** 2).mean(-1),
    "mse": lambda o, y, t: F.mse_loss(o, t, reduction="none").mean(-1),
    "l1": lambda o, y, t: F.l1_loss(o, t, reduction="none").sum(-1),
    "huber": lambda o, y, t: F.huber_loss(o, t, reduction="none", delta=0.7).mean(-1),
    "gaussian": _gaussian,
    "kl": lambda o, y, t: F.kl_div(o.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1),
    "bce": lambda o, y, t: F.binary_cross_entropy_with_logits(
        o, t.sigmoid(), reduction="none"
    ).mean(-1),
    "probability": lambda o, y, t: F.binary_cross_entropy(
        o.sigmoid(), (t > 0).to(o), reduction="none"
    ).mean(-1),
    "z": lambda o, y, t: 0.1 * o.logsumexp(-1) ** 2,
    "cosine": lambda o, y, t: 1 - F.cosine_similarity(o, t, dim=-1),
    "dice": lambda o, y, t: (
        1 - (2 * (o.sigmoid() * t.sigmoid()).sum(-1) + 1) / (o.sigmoid() + t.sigmoid()).sum(-1)
    ),
}


@dataclass(frozen=True)
class Own:
    """Of one example: the numerator, the mass, and how many terms the mass counts."""

    numerator: Tensor
    mass: Tensor | float | None  # None: summed over the batch
    terms: float = 1.0


@dataclass(frozen=True)
class Reduction:
    batch: Callable[..., Tensor]  # of terms [batch, position], mask, weights [batch]
    single: Callable[..., Own]  # of one example's [position], mask and weight


def _looped(e: Tensor, m: Tensor, v: Tensor) -> Tensor:
    total = torch.zeros((), dtype=e.dtype)
    for row in e:
        total = total + row.mean()
    return total / len(e)


REDUCTIONS: dict[str, Reduction] = {
    "mean": Reduction(lambda e, m, v: e.mean(), lambda e, m, v: Own(e.sum(), len(e), len(e))),
    "mean of means": Reduction(
        lambda e, m, v: e.mean(0).mean(), lambda e, m, v: Own(e.mean(), 1.0)
    ),
    "rows": Reduction(lambda e, m, v: e.sum(1).mean(), lambda e, m, v: Own(e.sum(), 1.0)),
    "divided": Reduction(lambda e, m, v: e.sum() / len(e), lambda e, m, v: Own(e.sum(), 1.0)),
    "scaled": Reduction(lambda e, m, v: e.sum() * (1 / len(e)), lambda e, m, v: Own(e.sum(), 1.0)),
    "masked": Reduction(
        lambda e, m, v: (e * m).sum() / m.sum(),
        lambda e, m, v: Own((e * m).sum(), m.sum(), float(m.sum())),
    ),
    "picked": Reduction(
        lambda e, m, v: e[m].mean(),
        lambda e, m, v: Own((e * m).sum(), m.sum(), float(m.sum())),
    ),
    "own masks": Reduction(
        lambda e, m, v: ((e * m).sum(1) / m.sum(1)).mean(),
        lambda e, m, v: Own((e * m).sum() / m.sum(), 1.0),
    ),
    "weighted": Reduction(
        lambda e, m, v: (e.mean(1) * v).mean(), lambda e, m, v: Own(e.mean() * v, 1.0)
    ),
    "weighted mean": Reduction(
        lambda e, m, v: (e.mean(1) * v).sum() / v.sum(), lambda e, m, v: Own(e.mean() * v, v)
    ),
    "product": Reduction(
        lambda e, m, v: torch.dot(e.mean(1), v) / len(v), lambda e, m, v: Own(e.mean() * v, 1.0)
    ),
    "loop": Reduction(_looped, lambda e, m, v: Own(e.mean(), 1.0)),
    "stack": Reduction(
        lambda e, m, v: torch.stack([row.mean() for row in e]).mean(),
        lambda e, m, v: Own(e.mean(), 1.0),
    ),
    "time first": Reduction(
        lambda e, m, v: e.T.reshape(-1).mean(), lambda e, m, v: Own(e.sum(), len(e), len(e))
    ),
    "sum": Reduction(lambda e, m, v: e.sum(), lambda e, m, v: Own(e.sum(), None)),
}


@dataclass(frozen=True)
class Library:
    """A loss that torch.nn.functional reduces itself: of outputs, labels, targets and mask."""

    batch: Callable[..., Tensor]
    single: Callable[..., Own]


def _weighted_classes(o: Tensor, y: Tensor, t: Tensor, m: Tensor) -> Own:
    weights = CLASS_WEIGHTS[y]
    own = F.cross_entropy(o, y, reduction="none")
    return Own((weights * own).sum(), weights.sum(), POSITIONS)


LIBRARY: dict[str, Library] = {
    "F.cross_entropy": Library(
        lambda o, y, t, m: F.cross_entropy(o.reshape(-1, CLASSES), y.reshape(-1)),
        lambda o, y, t, m: Own(F.cross_entropy(o, y, reduction="sum"), len(y), len(y)),
    ),
    "ignored": Library(
        lambda o, y, t, m: F.cross_entropy(o.movedim(-1, 1), y.where(m, -100)),
        lambda o, y, t, m: Own(F.cross_entropy(o[m], y[m], reduction="sum"), m.sum(), m.sum()),
    ),
    "class weights": Library(
        lambda o, y, t, m: F.cross_entropy(o.movedim(-1, 1), y, CLASS_WEIGHTS), _weighted_classes
    ),
    "real tokens": Library(
        lambda o, y, t, m: F.cross_entropy(o[m], y[m]),
        lambda o, y, t, m: Own(F.cross_entropy(o[m], y[m], reduction="sum"), m.sum(), m.sum()),
    ),
    "F.smooth_l1_loss": Library(
        lambda o, y, t, m: F.smooth_l1_loss(o, t),
        lambda o, y, t, m: Own(F.smooth_l1_loss(o, t, reduction="mean"), 1.0),
    ),
    "F.kl_div": Library(
        lambda o, y, t, m: F.kl_div(o.log_softmax(-1), t.softmax(-1), reduction="batchmean"),
        lambda o, y, t, m: Own(F.kl_div(o.log_softmax(-1), t.softmax(-1), reduction="sum"), 1.0),
    ),
}

FACTORS: dict[str, Callable[[Tensor], Tensor | float]] = {
    "one": lambda s: 1.0,
    "number": lambda s: 0.3,
    "learned": lambda s: torch.exp(-s),
    "sigmoid": lambda s: s.sigmoid(),
}
PENALTIES: dict[str, Callable[[nn.Module], Tensor | float]] = {
    "none": lambda m: 0.0,
    "weights": lambda m: 0.05 * sum(p.square().sum() for p in m.net.parameters()),
    "learned": lambda m: m.learned,
}
STRUCTURES: dict[str, Callable[[tuple[Tensor, ...]], Any]] = {
    "tuple": lambda b: b,
    "list": list,
    "dict": lambda b: dict(zip("xytmv", b, strict=True)),
    "user dict": lambda b: UserDict(zip("xytmv", b, strict=True)),
    "nested": lambda b: {"inputs": {"x": b[0], "m": b[3]}, "rest": [b[1], b[2], {"v": b[4]}]},
}


def opened(batch: Any) -> tuple[Tensor, ...]:
    """x, y, t, m and v of a batch of any of the structures."""
    if isinstance(batch, (tuple, list)):
        return tuple(batch)
    if "x" in batch:
        return tuple(batch[name] for name in "xytmv")
    y, t, rest = batch["rest"]
    return batch["inputs"]["x"], y, t, batch["inputs"]["m"], rest["v"]


@dataclass(frozen=True)
class Composition:
    """A training step as a choice of parts: ``losses`` are (terms, reduction, factor), or (name in
    ``LIBRARY``, "", factor)."""

    network: str
    losses: tuple[tuple[str, str, str], ...]
    penalty: str
    structure: str


class Composed(nn.Module):
    """A module with the step of a composition."""

    def __init__(self, composition: Composition) -> None:
        super().__init__()
        self.composition = composition
        self.net = NETWORKS[composition.network]().double()
        self.learned = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, t, m, v = opened(batch)
        outputs = self.net(x, m)
        total = torch.as_tensor(PENALTIES[self.composition.penalty](self))
        for terms, reduction, factor in self.composition.losses:
            if not reduction:
                loss = LIBRARY[terms].batch(outputs, y, t, m)
            else:
                loss = REDUCTIONS[reduction].batch(TERMS[terms](outputs, y, t), m, v)
            total = total + FACTORS[factor](self.learned) * loss
        return total

    def own(self, example: tuple[Tensor, ...]) -> list[tuple[Tensor | float, Own]]:
        """Factor, numerator and mass of one example [1, ...] in each of the losses."""
        x, y, t, m, v = example
        outputs = self.net(x, m)
        found = []
        for terms, reduction, factor in self.composition.losses:
            if not reduction:
                own = LIBRARY[terms].single(outputs[0], y[0], t[0], m[0])
            else:
                own = REDUCTIONS[reduction].single(TERMS[terms](outputs, y, t)[0], m[0], v[0])
            found.append((FACTORS[factor](self.learned), own))
        return found


def dataset(count: int) -> tuple[Tensor, ...]:
    """Inputs, labels, targets, masks and weights."""
    x = torch.randn(count, POSITIONS, 3, dtype=torch.float64)
    y = torch.randint(CLASSES, (count, POSITIONS))
    t = torch.randn(count, POSITIONS, 3, dtype=torch.float64)
    lengths = torch.randint(1, POSITIONS + 1, (count,))
    m = torch.arange(POSITIONS) < lengths[:, None]
    return x, y, t, m, torch.rand(count, dtype=torch.float64) + 0.5
