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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from experiments.fastif.recorded import Run
from tda_lightning import AttributionModule
from tda_lightning.cli.trainers import silent_trainer
from tda_lightning.gradients import ExampleGradients
from tda_lightning.records.provenance import Provenance
from tda_lightning.session.session import Session

_BATCH = 250


@dataclass
class Look:
    """An estimator that scores nothing: it calls ``work`` with what estimators are given, the last
    weights being in place."""

    work: Callable[[Session], None]

    def segment_count(self, context: Session) -> int | None:
        return None

    def score(self, session: Session) -> Provenance:
        session.load(session.trajectory.last_step)
        self.work(session)
        return {"notes": []}


def look(run: Run, queries: Dataset, work: Callable[[Session], None]) -> None:
    """Call ``work`` with the context of an attribution of ``run``."""
    attribution = AttributionModule(run.module, run.trajectory, Look(work), run.task)
    attribution.attribute(run.train, queries, trainer=silent_trainer(), self_influence=False)


def rows_of(context: Session, found: ExampleGradients) -> Tensor:
    """Gradients over all parameters, [batch, parameters], in the order of ``context.blocks``."""
    parts = []
    for block in context.blocks:
        gradient = found.blocks[block.name]
        parts.append(gradient.rotated(slice(0, gradient.batch), None, None).flatten(1))
    return torch.cat(parts, dim=1)


def query_rows(context: Session) -> Tensor:
    """Measurement gradients of all queries, [query, parameters]."""
    return torch.cat(
        [
            rows_of(context, context.measurement_gradients(batch, examples))
            for batch, examples in context.queries(0, context.num_query)
        ]
    )


Words = list[tuple[Tensor, Tensor]]


@dataclass
class Exact:
    """Gradients, and influence functions from their inner products.

    A pair has gradients for the embeddings of its own words alone: of those parameters, the
    largest part, only these are held.

    Attributes:
        others: of the training losses, of all parameters but the words' embeddings, float32
            [train, parameters].
        words: of the embeddings, for each word: which pairs have it, int64 [pair], and their
            gradients, float32 [pair, width].
        queries: of the measurements, of all parameters, float32 [query, parameters].
        weights: w_n, float64 [train].
        decay: the recorded weight decay, one number for all parameters.
        place: where the words' embeddings are among the parameters, word after word.
    """

    others: Tensor
    words: Words
    queries: Tensor
    weights: Tensor
    decay: float
    place: slice
    _inner: Tensor | None = None
    _asked: Tensor | None = None

    def inner(self) -> Tensor:
        """Of the training gradients, float64 [train, train]."""
        if self._inner is None:
            count = len(self.others)
            found = torch.zeros(count, count)
            for pairs, part in self.words:
                found[pairs[:, None], pairs] += part @ part.T
            for start in range(0, count, _BATCH):
                rows, columns = slice(start, None), slice(start, start + _BATCH)
                found[rows, columns] += self.others[rows] @ self.others[columns].T
            # Only below the blocks of the diagonal: the rest by symmetry.
            for start in range(0, count, _BATCH):
                above, columns = slice(0, start), slice(start, start + _BATCH)
                found[above, columns] = found[columns, above].T
            self._inner = found.double()
        return self._inner

    def products(self, vectors: Tensor) -> Tensor:
        """Inner products with all training gradients, float32 [vector, train]."""
        embedded, others = self._parts(vectors)
        found = others @ self.others.T
        for word, (pairs, part) in enumerate(self.words):
            found[:, pairs] += embedded[:, word] @ part.T
        return found

    def combined(self, shares: Tensor) -> Tensor:
        """Sums of training gradients by ``shares`` [vector, train]: [vector, parameters]."""
        found = torch.zeros(len(shares), self.queries.shape[1])
        embedded, _ = self._parts(found)
        for word, (pairs, part) in enumerate(self.words):
            embedded[:, word] = shares[:, pairs] @ part
        others = shares @ self.others
        found[:, : self.place.start] = others[:, : self.place.start]
        found[:, self.place.stop :] = others[:, self.place.start :]
        return found

    def _parts(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Of the words' embeddings, a view [vector, word, width], and of the other parameters."""
        before, after = vectors[:, : self.place.start], vectors[:, self.place.stop :]
        embedded = vectors[:, self.place].unflatten(1, (len(self.words), -1))
        return embedded, torch.cat([before, after], dim=1)

    def asked(self) -> Tensor:
        """Inner products of queries' and training gradients, float64 [query, train]."""
        if self._asked is None:
            self._asked = self.products(self.queries).double()
        return self._asked

    def scores(self, damping: float) -> Tensor:
        """Influence functions with d = decay + damping, float64 [query, train]."""
        count, added = len(self.others), self.decay + damping
        sides = (self.weights / count).sqrt()
        between = self.inner()
        # In place: each of these matrices is most of a gigabyte.
        system = between * sides[:, None]
        system *= sides
        system.diagonal().add_(added)
        torch.linalg.cholesky(system, out=system)
        asked = self.asked()
        solved = torch.cholesky_solve((asked * sides).T.contiguous(), system).T
        return (asked - (solved * sides) @ between) / (added * count)

    def residuals(self, damping: float, solution: Tensor, vectors: Tensor) -> Tensor:
        """Relative length of (C + d) h - v, float64 [query]."""
        product = self.curved(solution, slice(None))
        rest = (product + (self.decay + damping) * solution - vectors).double()
        return rest.norm(dim=1) / vectors.double().norm(dim=1)

    def curved(self, vectors: Tensor, examples: slice) -> Tensor:
        """C v, with the mean over ``examples``: [query, parameters]."""
        shares, chosen = torch.zeros(len(self.weights)), self.weights[examples]
        shares[examples] = chosen.float() / len(chosen)
        return self.combined(self.products(vectors) * shares)


def occurring(part: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is not 0 of the embeddings' gradients [pair, word, width], pairs counted from
    ``first``: words, pairs, and the gradients."""
    pairs, words = part.any(2).nonzero(as_tuple=True)
    return words, pairs + first, part[pairs, words]


def by_word(parts: Sequence[tuple[Tensor, Tensor, Tensor]], count: int) -> Words:
    """For each word, the pairs that have it and their gradients."""
    words, pairs, gradients = (torch.cat(one) for one in zip(*parts, strict=True))
    order, sizes = words.argsort(stable=True), words.bincount(minlength=count).tolist()
    split = pairs[order].split(sizes), gradients[order].split(sizes)
    return list(zip(*split, strict=True))


def gather(run: Run) -> Exact:
    """The gradients of all training pairs and queries, at the last weights."""
    found: dict[str, Any] = {}

    def work(context: Session) -> None:
        sizes = {block.name: block.size for block in context.blocks}
        first = sum(list(sizes.values())[: list(sizes).index("network.tokens")])
        place = slice(first, first + sizes["network.tokens"])
        width = context.blocks[list(sizes).index("network.tokens")].shape[2]
        order = torch.arange(context.num_train).split(_BATCH)
        others = torch.zeros(context.num_train, sum(sizes.values()) - sizes["network.tokens"])
        embedded, losses = [], []
        for batch, examples in context.batches([part.tolist() for part in order]):
            rows = rows_of(context, context.train_gradients(batch, examples))
            others[examples] = torch.cat([rows[:, : place.start], rows[:, place.stop :]], dim=1)
            part = rows[:, place].unflatten(1, (-1, width))
            embedded.append(occurring(part, int(examples[0])))
            with torch.no_grad():
                losses.append(context.train_loss(context.module, batch, examples).double())
        wrong = -torch.expm1(-torch.cat(losses))
        found["others"], found["place"] = others, place
        found["words"] = by_word(embedded, sizes["network.tokens"] // width)
        found["weights"] = (1 - wrong) / wrong.clamp_min(1e-12)
        found["queries"] = query_rows(context)

    look(run, run.queries, work)
    return Exact(decay=decay_of(run), **found)


def decay_of(run: Run) -> float:
    """The weight decay of the last step, the same for all parameters."""
    groups = run.trajectory.steps.hyperparameters["weight_decay"][run.trajectory.last_step - 1]
    (decay,) = {float(value) for value in groups}
    return decay
