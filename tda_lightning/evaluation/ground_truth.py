"""What retraining gave: measured once, kept, and shared by all scores that are judged by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tda_lightning.records.errors import TrajectoryMismatchError
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.digests import digest
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.store.fingerprint import fingerprint
from tda_lightning.tasks import AttributionTask, as_task

# single_run: the recorded run replayed, examples left out at weight 0, the denominators of batches
# kept. algorithm: trained anew on a smaller training set, with fresh weights and a fresh order.
# pbrf: no retraining, but the proximal Bregman response to giving up one example.
Protocol = Literal["single_run", "algorithm", "pbrf"]
PROTOCOLS: tuple[Protocol, ...] = ("single_run", "algorithm", "pbrf")
RECORDED_SEED = -1


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Measurements of every query after retraining on subsets, as far as there are any yet.

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
        made_by: command and versions of packages; told, not compared.
        classes: what each retrained model predicts of each query, int64 [subset, seed, query],
            0 where ``done`` is False; None where nobody asked.
    """

    protocol: Protocol
    subsets: Tensor
    seeds: Tensor
    outcomes: Tensor
    done: Tensor
    seconds: Tensor
    baseline: Tensor
    configuration: Mapping[str, Any]
    made_by: Mapping[str, Any] = field(default_factory=dict)
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
    def asked(
        protocol: Protocol,
        subsets: Tensor,
        seeds: Tensor,
        baseline: Tensor,
        configuration: Mapping[str, Any],
        made_by: Mapping[str, Any] | None = None,
        classes: bool = False,
    ) -> GroundTruth:
        """A ground truth of which nothing is known yet, not even, if asked for, ``classes``."""
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
        """Of the training examples that the first subset keeps."""
        return float(self.subsets[0].double().mean())

    def known(
        self,
        subset: int,
        seed: int,
        outcome: Tensor,
        seconds: float,
        classes: Tensor | None = None,
    ) -> GroundTruth:
        """With one more retraining."""
        taken = torch.tensor(seconds, dtype=torch.float64)
        return self._with(([subset], [seed]), outcome, taken, classes)

    def _with(
        self, pairs: Any, outcomes: Tensor, seconds: Tensor, classes: Tensor | None
    ) -> GroundTruth:
        """With the retrainings ``pairs``, an index of [subset, seed]."""
        known = {"outcomes": outcomes, "done": torch.tensor(True), "seconds": seconds}
        if self.classes is not None:
            if classes is None:
                raise ValueError("This ground truth keeps classes, and got a retraining without.")
            known["classes"] = classes
        changed = {}
        for name, values in known.items():
            changed[name] = getattr(self, name).clone()
            changed[name][pairs] = values.detach().to(changed[name])
        return replace(self, **changed)

    def noting(self, **facts: Any) -> GroundTruth:
        """With more to tell of how it was made."""
        return replace(self, made_by={**self.made_by, **facts})

    def taking(self, found: GroundTruth) -> GroundTruth:
        """What is asked for here, with what ``found`` knows of it.

        Subsets and seeds are drawn one after the other, so more of them go on where fewer ended;
        ``found`` must not have more.

        Raises:
            TrajectoryMismatchError: ``found`` is the ground truth of another configuration, or of
                other subsets.
        """
        self.require_same_question(found)
        rows, columns = found.seeds.shape
        if not torch.equal(self.subsets[:rows], found.subsets) or not torch.equal(
            self.seeds[:rows, :columns], found.seeds
        ):
            raise TrajectoryMismatchError(
                "The subsets or seeds of this ground truth are not those asked for: expected to "
                f"keep {self.fraction:.4g} of the training examples, got {found.fraction:.4g}; or "
                "they were drawn from another seed. Choose another file."
            )
        if not torch.allclose(self.baseline, found.baseline, rtol=1e-3, atol=1e-4):
            raise TrajectoryMismatchError(
                "The measurements of the recorded run's end are not those of this ground truth: "
                "expected the same queries and weights. Choose another file."
            )
        return self._told(found, *found.done.nonzero(as_tuple=True), *found.done.nonzero().T)

    def knowing(self, found: GroundTruth) -> GroundTruth:
        """What is asked for here, with what ``found`` knows of the same subsets and seeds, wherever
        they stand in it.

        Raises:
            TrajectoryMismatchError: ``found`` is the ground truth of another configuration.
        """
        self.require_same_question(found)
        places = {
            (mask.numpy().tobytes(), int(seed)): (row, column)
            for row, mask in enumerate(self.subsets)
            for column, seed in enumerate(self.seeds[row])
        }
        pairs = []
        for row, column in found.done.nonzero().tolist():
            key = (found.subsets[row].numpy().tobytes(), int(found.seeds[row, column]))
            if key in places:
                pairs.append([*places[key], row, column])
        return self._told(found, *torch.tensor(pairs, dtype=torch.int64).reshape(-1, 4).T)

    def _told(
        self, found: GroundTruth, row: Tensor, column: Tensor, its_row: Tensor, its_column: Tensor
    ) -> GroundTruth:
        """With retrainings of ``found``, from its places to ours."""
        theirs = (its_row, its_column)
        classes = None if found.classes is None else found.classes[theirs]
        merged = self._with((row, column), found.outcomes[theirs], found.seconds[theirs], classes)
        return replace(merged, made_by={**self.made_by, **found.made_by})

    def rows(self, index: Tensor | slice) -> GroundTruth:
        """Only these subsets, in this order; an index may be given twice."""
        names = ("subsets", "seeds", "outcomes", "done", "seconds", "classes")
        given = {name: getattr(self, name) for name in names}
        kept = {name: tensor[index] for name, tensor in given.items() if tensor is not None}
        return replace(self, **kept)

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

    def require_same_question(self, found: GroundTruth) -> None:
        """Check that ``found`` measures what is asked for here.

        Raises:
            TrajectoryMismatchError: it names what differs.
        """
        train, other = self.subsets.shape[1], found.subsets.shape[1]
        if train != other:
            raise TrajectoryMismatchError(
                f"The subsets of this ground truth are of another training set: expected "
                f"{train} examples, got {other}."
            )
        mine = {"protocol": self.protocol, **self.configuration}
        theirs = {"protocol": found.protocol, **found.configuration}
        differing = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
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


def what_determines(
    trajectory: Trajectory,
    module: nn.Module,
    task: AttributionTask | None,
    queries: Any,
    training: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Digests of all that decides what a retraining will give: ``GroundTruth.configuration``.

    Args:
        trajectory: the recorded run, by whose data, steps and weights it is known.
        module: of which class and shape matter.
        task: whose measurement is taken.
        queries: a data set or a loader over it.
        training: settings of training afresh; None for a replay.
    """
    facts, steps = trajectory.facts, trajectory.steps
    ends = [trajectory.checkpoints[step].parameters for step in (0, trajectory.last_step)]
    shapes = {name: list(tensor.shape) for name, tensor in module.named_parameters()}
    found: dict[str, Any] = {
        "run": digest([facts.settings.get("run_id"), steps.examples, steps.learning_rate, *ends]),
        "data": digest([facts.num_examples, facts.fingerprint]),
        "model": digest([type(module).__name__, shapes]),
        "task": as_task(task).settings(),
        "queries": digest(fingerprint(ExampleSource.of(queries, 1, "query").dataset)),
    }
    return found if training is None else {**found, "training": digest(training)}


def draw_seeds(subsets: int, seeds: int, seed: int = 0) -> Tensor:
    """A seed of its own for every retraining, int64 [subset, seed], alike whatever is asked for
    besides it.

    Example:
        >>> bool((draw_seeds(2, 2)[:, :1] == draw_seeds(2, 1)).all())
        True
    """
    found = [
        [
            int(np.random.SeedSequence([seed, row, column]).generate_state(1)[0] >> 1)
            for column in range(seeds)
        ]
        for row in range(subsets)
    ]
    return torch.tensor(found, dtype=torch.int64).reshape(subsets, seeds)
