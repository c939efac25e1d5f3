"""What retraining gave: measured once, saved, and shared by all scores that are judged by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from tda_lightning.records.errors import TrajectoryMismatchError

# single_run: the recorded run replayed, with weight 0 for the examples that are left out.
# algorithm: trained again on a smaller training set, with fresh weights and a fresh order.
# pbrf: no retraining, but the proximal Bregman response to removing one example.
Protocol = Literal["single_run", "algorithm", "pbrf"]
PROTOCOLS: tuple[Protocol, ...] = ("single_run", "algorithm", "pbrf")
RECORDED_SEED = -1

# Rows and columns of [subset, seed].
_Pairs = tuple[Sequence[int] | Tensor, Sequence[int] | Tensor]


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Measurements of every query after retraining on subsets, as far as they have been made.

    Attributes:
        protocol: which question the numbers answer.
        subsets: which examples each subset keeps, bool [subset, train].
        seeds: of each retraining, int64 [subset, seed]; -1 for the recorded one.
        outcomes: measurements, float64 [subset, seed, query]; 0 where ``done`` is False.
        done: which retrainings have been made, bool [subset, seed].
        seconds: what each took, float64 [subset, seed].
        baseline: measurements of the recorded run's last checkpoint, float64 [query].
        configuration: whatever else determines the outcomes, JSON-able: digests of the run, the
            data and the queries, the task, and for *algorithm* the settings of training.
        made_by: command and versions of packages, for information only.
        classes: what each retrained model predicts for each query, int64 [subset, seed, query],
            0 where ``done`` is False; None if not asked for.
    """

    protocol: Protocol
    subsets: Tensor
    seeds: Tensor
    outcomes: Tensor
    done: Tensor
    seconds: Tensor
    baseline: Tensor
    configuration: Mapping[str, object]
    made_by: Mapping[str, object] = field(default_factory=dict)
    classes: Tensor | None = None

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {PROTOCOLS}, got {self.protocol!r}.")
        pairs, queries = self.seeds.shape, len(self.baseline)
        fits = (
            self.subsets.dim() == 2
            and self.seeds.dim() == 2
            and len(self.subsets) == len(self.seeds)
            and self.outcomes.shape == (*pairs, queries)
            and self.done.shape == self.seconds.shape == pairs
            and (self.classes is None or self.classes.shape == self.outcomes.shape)
        )
        if not fits:
            raise ValueError(
                "Expected subsets [subset, train], seeds, done and seconds [subset, seed], "
                "outcomes [subset, seed, query] and baseline [query], got shapes "
                f"{[list(item.shape) for item in self._tensors()]}."
            )
        if not all(bool(item.isfinite().all()) for item in (self.outcomes, self.baseline)):
            raise ValueError("Measurements after retraining must be finite.")

    @staticmethod
    def unmeasured(
        protocol: Protocol,
        subsets: Tensor,
        seeds: Tensor,
        baseline: Tensor,
        configuration: Mapping[str, object],
        made_by: Mapping[str, object] | None = None,
        classes: bool = False,
    ) -> GroundTruth:
        """A ground truth without any outcome yet; ``classes`` says whether to hold classes too."""
        pairs = tuple(seeds.shape)
        shape = (*pairs, len(baseline))
        return GroundTruth(
            protocol=protocol,
            subsets=subsets,
            seeds=seeds,
            outcomes=torch.zeros(shape, dtype=torch.float64),
            done=torch.zeros(pairs, dtype=torch.bool),
            seconds=torch.zeros(pairs, dtype=torch.float64),
            baseline=baseline.double().cpu(),
            configuration=configuration,
            made_by=made_by or {},
            classes=torch.zeros(shape, dtype=torch.int64) if classes else None,
        )

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Subset and seed of every retraining that is still to be made, in order."""
        return [(int(row), int(column)) for row, column in (~self.done).nonzero()]

    @property
    def fraction(self) -> float:
        """Share of the training examples that the first subset keeps."""
        return float(self.subsets[0].double().mean())

    def with_outcome(
        self,
        subset: int,
        seed: int,
        outcome: Tensor,
        seconds: float,
        classes: Tensor | None = None,
    ) -> GroundTruth:
        """This ground truth with the outcome of one more retraining."""
        taken = torch.tensor(seconds, dtype=torch.float64)
        return self._with(([subset], [seed]), outcome, taken, classes)

    def _with(
        self, pairs: _Pairs, outcomes: Tensor, seconds: Tensor, classes: Tensor | None
    ) -> GroundTruth:
        """With the retrainings ``pairs``, an index of [subset, seed]."""
        known = {"outcomes": outcomes, "done": torch.tensor(True), "seconds": seconds}
        if self.classes is not None:
            if classes is None:
                raise ValueError(
                    "This ground truth holds classes, and got a retraining without them."
                )
            known["classes"] = classes
        changed = {}
        for name, values in known.items():
            changed[name] = getattr(self, name).clone()
            changed[name][pairs] = values.detach().to(changed[name])
        return replace(self, **changed)

    def with_notes(self, **notes: object) -> GroundTruth:
        """This ground truth with more notes on how it was made."""
        return replace(self, made_by={**self.made_by, **notes})

    def continuing(self, other: GroundTruth) -> GroundTruth:
        """This ground truth with the outcomes of ``other``, which has the first of its subsets and
        seeds, or all of them.

        Subsets and seeds are drawn one after another, so asking for more continues earlier work.

        Raises:
            TrajectoryMismatchError: ``other`` is the ground truth of another configuration, or of
                other subsets.
        """
        self.require_same_question(other)
        rows, columns = other.seeds.shape
        if not torch.equal(self.subsets[:rows], other.subsets) or not torch.equal(
            self.seeds[:rows, :columns], other.seeds
        ):
            raise TrajectoryMismatchError(
                "The subsets or seeds of this ground truth are not those asked for: expected to "
                f"keep {self.fraction:.4g} of the training examples, got {other.fraction:.4g}; or "
                "they were drawn from another seed. Choose another file."
            )
        if not torch.allclose(self.baseline, other.baseline, rtol=1e-3, atol=1e-4):
            raise TrajectoryMismatchError(
                "The measurements of the recorded run's end are not those of this ground truth: "
                "expected the same queries and weights. Choose another file."
            )
        return self._copying(other, *other.done.nonzero(as_tuple=True), *other.done.nonzero().T)

    def with_outcomes_of(self, other: GroundTruth) -> GroundTruth:
        """This ground truth with the outcomes that ``other`` has of the same subsets and seeds, in
        whatever order.

        Raises:
            TrajectoryMismatchError: ``other`` is the ground truth of another configuration.
        """
        self.require_same_question(other)
        places = {
            (mask.numpy().tobytes(), int(seed)): (row, column)
            for row, mask in enumerate(self.subsets)
            for column, seed in enumerate(self.seeds[row])
        }
        pairs = []
        for row, column in other.done.nonzero().tolist():
            key = (other.subsets[row].numpy().tobytes(), int(other.seeds[row, column]))
            if key in places:
                pairs.append([*places[key], row, column])
        return self._copying(other, *torch.tensor(pairs, dtype=torch.int64).reshape(-1, 4).T)

    def _copying(
        self, other: GroundTruth, row: Tensor, column: Tensor, its_row: Tensor, its_column: Tensor
    ) -> GroundTruth:
        """With outcomes of ``other``, copied from its rows and columns to those here."""
        theirs = (its_row, its_column)
        classes = None if other.classes is None else other.classes[theirs]
        merged = self._with((row, column), other.outcomes[theirs], other.seconds[theirs], classes)
        return replace(merged, made_by={**self.made_by, **other.made_by})

    def rows(self, index: Tensor | slice) -> GroundTruth:
        """Only these subsets, in this order; an index may be given twice."""
        names = ("subsets", "seeds", "outcomes", "done", "seconds", "classes")
        given = {name: getattr(self, name) for name in names}
        chosen = {name: tensor[index] for name, tensor in given.items() if tensor is not None}
        return replace(self, **chosen)

    def first(self, subsets: int, seeds: int) -> GroundTruth:
        """Only the first so many subsets and seeds of each."""
        part = (slice(subsets), slice(seeds))
        return replace(
            self,
            subsets=self.subsets[:subsets],
            seeds=self.seeds[part],
            outcomes=self.outcomes[part],
            done=self.done[part],
            seconds=self.seconds[part],
            classes=None if self.classes is None else self.classes[part],
        )

    def finished(self) -> GroundTruth:
        """Only the subsets whose retrainings have all been made."""
        return self.rows(self.done.all(1))

    def require_same_question(self, other: GroundTruth) -> None:
        """Check that ``other`` measures the same as this ground truth.

        Raises:
            TrajectoryMismatchError: it names what differs.
        """
        mine, theirs = self.subsets.shape[1], other.subsets.shape[1]
        if mine != theirs:
            raise TrajectoryMismatchError(
                f"The subsets of this ground truth are of another training set: expected "
                f"{mine} examples, got {theirs}."
            )
        expected = {"protocol": self.protocol, **self.configuration}
        got = {"protocol": other.protocol, **other.configuration}
        differing = sorted(
            name for name in {*expected, *got} if expected.get(name) != got.get(name)
        )
        if differing:
            raise TrajectoryMismatchError(
                "This is the ground truth of another configuration: it differs in "
                f"{', '.join(differing)}. Choose another file, or make that configuration's again."
            )

    def require_scores_of(self, queries: int, train: int) -> None:
        """Check that scores are of these queries and training examples.

        Raises:
            TrajectoryMismatchError: they are not.
        """
        expected = (len(self.baseline), self.subsets.shape[1])
        if (queries, train) != expected:
            raise TrajectoryMismatchError(
                f"The ground truth holds {expected[0]} queries and subsets of {expected[1]} "
                f"training examples, the scores {queries} queries and {train} training examples. "
                "Give scores of the same queries and training set."
            )

    def _tensors(self) -> tuple[Tensor, ...]:
        return (
            self.subsets,
            self.seeds,
            self.done,
            self.seconds,
            self.outcomes,
            self.baseline,
        )
