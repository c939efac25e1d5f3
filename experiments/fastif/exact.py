"""Influence functions with the Gauss-Newton matrix itself, no approximation: what solvers aim at.

For a classifier of two classes the matrix has one direction for each training example, that of the
gradient of its loss:

.. math::
    C = \\frac1N \\sum_n w_n g_n g_n^\\top, \\qquad w_n = p_n / (1 - p_n)

with p the probability of the right class: g is (1 - p) times the gradient of the logits' difference
and the curvature of the loss in that difference is p (1 - p). So (C + d)^-1 is found from the N x N
inner products of the gradients (Woodbury's identity), for every damping d and query.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from experiments.fastif.recorded import Run
from tda_lightning import AttributionModule
from tda_lightning.cli.trust import quiet_trainer
from tda_lightning.gradients import ExampleGradients
from tda_lightning.passes import Context, Pass, Plan

_BATCH = 250


@dataclass
class Look:
    """An estimator that scores nothing: it calls ``work`` with what estimators are given, the last
    weights being in place."""

    work: Callable[[Context], None]

    def segment_count(self, context: Context) -> int | None:
        return None

    def plan(self, context: Context) -> Plan:
        step = context.trajectory.last_step
        begin = lambda: self.work(context)  # noqa: E731
        return Plan([Pass("look", step, lambda *_: None, begin, rows=range(1))])


def look(run: Run, queries: Dataset, work: Callable[[Context], None]) -> None:
    """Call ``work`` with the context of an attribution of ``run``."""
    attribution = AttributionModule(run.module, run.trajectory, Look(work), run.task)
    attribution.attribute(run.train, queries, trainer=quiet_trainer(), self_influence=False)


def rows_of(context: Context, found: ExampleGradients) -> Tensor:
    """Gradients over all parameters, [batch, parameters], in the order of ``context.blocks``."""
    parts = []
    for block in context.blocks:
        gradient = found.blocks[block.name]
        parts.append(gradient.rotated(slice(0, gradient.batch), None, None).flatten(1))
    return torch.cat(parts, dim=1)


def query_rows(context: Context) -> Tensor:
    """Measurement gradients of all queries, [query, parameters]."""
    return torch.cat(
        [
            rows_of(context, context.measurement_gradients(batch, examples))
            for batch, examples in context.queries(0, context.num_query)
        ]
    )


@dataclass
class Exact:
    """Gradients, and influence functions from their inner products.

    Attributes:
        gradients: of the training losses, float32 [train, parameters].
        queries: of the measurements, float32 [query, parameters].
        weights: w_n, float64 [train].
        decay: the recorded weight decay, one number for all parameters.
        words: the parameters of the token embedding, of which a pair has gradients for its own
            words alone.
        width: of the embedding, parameters for each word.
    """

    gradients: Tensor
    queries: Tensor
    weights: Tensor
    decay: float
    words: slice
    width: int
    _inner: Tensor | None = None
    _asked: Tensor | None = None

    def inner(self) -> Tensor:
        """Of the training gradients, float64 [train, train]."""
        if self._inner is None:
            count = len(self.gradients)
            found = torch.zeros(count, count)
            words = self.gradients[:, self.words]
            for part in words.split(self.width, dim=1):  # one word, which few pairs have
                rows = part.any(1).nonzero().squeeze(1)
                some = part[rows]
                found[rows[:, None], rows] += some @ some.T
            for rest in (slice(0, self.words.start), slice(self.words.stop, None)):
                others = self.gradients[:, rest]
                for start in range(0, count, _BATCH):
                    rows, columns = slice(start, None), slice(start, start + _BATCH)
                    found[rows, columns] += others[rows] @ others[columns].T
            # Only below the blocks of the diagonal: the rest by symmetry.
            for start in range(0, count, _BATCH):
                above, columns = slice(0, start), slice(start, start + _BATCH)
                found[above, columns] = found[columns, above].T
            self._inner = found.double()
        return self._inner

    def asked(self) -> Tensor:
        """Inner products of queries' and training gradients, float64 [query, train]."""
        if self._asked is None:
            self._asked = (self.queries @ self.gradients.T).double()
        return self._asked

    def scores(self, damping: float) -> Tensor:
        """Influence functions with d = decay + damping, float64 [query, train]."""
        count, added = len(self.gradients), self.decay + damping
        sides = (self.weights / count).sqrt()
        between = self.inner()
        system = between * sides[:, None] * sides + added * torch.eye(count, dtype=torch.float64)
        asked = self.asked()
        solved = torch.cholesky_solve(
            (asked * sides).T.contiguous(), torch.linalg.cholesky(system)
        ).T
        return (asked - (solved * sides) @ between) / (added * count)

    def residuals(self, damping: float, solution: Tensor, vectors: Tensor) -> Tensor:
        """Relative length of (C + d) h - v, float64 [query]."""
        product = self.curved(solution, slice(None))
        rest = (product + (self.decay + damping) * solution - vectors).double()
        return rest.norm(dim=1) / vectors.double().norm(dim=1)

    def curved(self, vectors: Tensor, examples: slice) -> Tensor:
        """C v, with the mean over ``examples``: [query, parameters]."""
        rows, weights = self.gradients[examples], self.weights[examples].float()
        return (vectors @ rows.T * (weights / len(rows))) @ rows


def gather(run: Run) -> Exact:
    """The gradients of all training pairs and queries, at the last weights."""
    found: dict[str, Any] = {}

    def work(context: Context) -> None:
        order = torch.arange(context.num_train).split(_BATCH)
        rows, losses = [], []
        for batch, examples in context.batches([part.tolist() for part in order]):
            rows.append(rows_of(context, context.train_gradients(batch, examples)))
            with torch.no_grad():
                losses.append(context.train_loss(context.module, batch, examples).double())
        wrong = -torch.expm1(-torch.cat(losses))
        found["gradients"] = torch.cat(rows)
        found["weights"] = (1 - wrong) / wrong.clamp_min(1e-12)
        found["queries"] = query_rows(context)
        sizes = {block.name: block.size for block in context.blocks}
        first = sum(list(sizes.values())[: list(sizes).index("network.tokens")])
        found["words"] = slice(first, first + sizes["network.tokens"])
        found["width"] = context.blocks[list(sizes).index("network.tokens")].shape[2]

    look(run, run.queries, work)
    return Exact(decay=decay_of(run), **found)


def decay_of(run: Run) -> float:
    """The weight decay of the last step, the same for all parameters."""
    groups = run.trajectory.steps.hyperparameters["weight_decay"][run.trajectory.last_step - 1]
    (decay,) = {float(value) for value in groups}
    return decay
