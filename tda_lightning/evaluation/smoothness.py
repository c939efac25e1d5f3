r"""Is a recorded run smooth enough in its data weights for a derivative to predict removals?

A derivative of training is exact for infinitesimal changes, but a removal is finite, and in between
the run may jump: another entry wins a maximum, a step crosses the edge of stability. The derivative
itself does not show this, so the run is replayed along random directions. With a share :math:`s` of
a random set :math:`S` of examples left out,

.. math::
    z(s)_n = 1 - s\,[n \in S], \qquad \theta(s) = A(z(s)), \qquad m_q(s) = m_q(\theta(s)),

three shares per direction give three numbers:

- *metasmoothness*: do the weights keep moving in the same direction? With
  :math:`\Delta_1 = \theta(1/2) - \theta(0)`, :math:`\Delta_2 = \theta(1) - \theta(1/2)` and
  :math:`d = |\theta(1) - \theta(0)|`,

  .. math::
      \hat S = \frac{\sum_i d_i\, \mathrm{sign}(\Delta_{1i})\, \mathrm{sign}(\Delta_{2i})}
                    {\sum_i d_i} \in [-1, 1].

  This is the published definition with direction -1 on :math:`S` and step 1/2, so that the largest
  change is the removal itself.
- *halfway*: the rank correlation over queries of :math:`m_q(1/2)` with :math:`m_q(1)`, after
  subtracting each query's mean over directions. It says how linear the response is at this scale.
- *near*: the same with a small share, 1/1000. If it is low while halfway is high, the run has many
  small kinks (ReLU, max pooling): finite differences follow the kinks, exact unrolling the slope
  between them.

The verdict is based on *halfway*: if the response is not nearly linear at the size of a removal, no
derivative predicts it. In experiments/smoothness it tracks the LDS of exact unrolling, and *near*
does not.

Means over directions are subtracted because what all directions share does not tell examples apart,
and because in a rough run :math:`m_q(0)` is one draw of its jumps: differences from it agree with
one another whatever the examples.

References:
    | Optimizing ML Training with Metagradient Descent (Engstrom et al., 2025), Definition 2
    | https://arxiv.org/abs/2503.13751
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.stats import t as students
from torch import Tensor, nn

from tda_lightning.evaluation.linear_datamodeling import draw_subsets, rank_correlation
from tda_lightning.evaluation.retraining import landing_error, measure, retrain_each
from tda_lightning.records.display import fact_lines, html_facts
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.replay.run import State
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.progress import SlowProgress
from tda_lightning.runtime.random_states import unchanged_randomness
from tda_lightning.tasks import AttributionTask

# Above 0.5, exact unrolling ranked retrainings better than every other estimator; where it was
# worse, the correlation was 0.3 (experiments/smoothness/README.md).
THRESHOLD = 0.5
# Replays with equal weights that differ by more than this share of a removal's effect hide it.
_NOISE = 0.3

Verdict = Literal["smooth", "rough", "undecided"]


@dataclass(frozen=True)
class Estimate:
    """A mean over random directions with its 95% interval.

    The interval is over directions only; another training run would vary too.

    Attributes:
        per_direction: float64 [direction]; NaN where the removal changed nothing.
        value: their mean, NaN left out.
        low: lower end of the interval, at least -1.
        high: upper end, at most 1.
    """

    per_direction: Tensor
    value: float
    low: float
    high: float

    @staticmethod
    def of(per_direction: Tensor, pseudovalues: Tensor | None = None) -> Estimate:
        """The mean with Student's t interval.

        Args:
            per_direction: [direction].
            pseudovalues: of the jackknife, where the values depend on one another.

        Example:
            >>> print(Estimate.of(torch.tensor([0.8, 0.9, 0.7, 0.8])))
            0.800 [0.670, 0.930]
        """
        values = per_direction.double()
        known = values[~values.isnan()]
        spread = known if pseudovalues is None else pseudovalues.double()
        mean = float(known.mean())
        if len(spread) < 2:
            return Estimate(values, mean, math.nan, math.nan)
        error = float(spread.std()) / len(spread) ** 0.5
        margin = float(students.ppf(0.975, len(spread) - 1)) * error
        return Estimate(values, mean, max(mean - margin, -1.0), min(mean + margin, 1.0))

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, repr=False)
class Smoothness:
    """How smooth a run is in its data weights.

    Attributes:
        metasmoothness: agreement in sign of the weights' changes in both halves of the removal.
        halfway: rank correlation over queries of half the removal with the full removal.
        near: rank correlation over queries of the small share with the full removal.
        fraction: share of the training examples that each direction leaves out.
        share: the small share of ``near``.
        landing_error: of the replay with all weights 1, see
            :func:`~tda_lightning.evaluation.landing_error`; if it is not 0, all this describes a
            run close to the recorded one.
        noise: distance between two replays with all weights 1, relative to the mean distance that
            removals cause; 0 if the first landed bit for bit.
        replays: number of replays made.
        seconds: time taken.
    """

    metasmoothness: Estimate
    halfway: Estimate
    near: Estimate
    fraction: float
    share: float
    landing_error: float
    noise: float
    replays: int
    seconds: float

    def _facts(self) -> dict[str, object]:
        return {
            "metasmoothness": self.metasmoothness,
            "halfway": self.halfway,
            "near": self.near,
            "landing error": self.landing_error,
            "noise": self.noise,
            "advice": self.advice,
        }

    def __repr__(self) -> str:
        return fact_lines(f"Smoothness of a run ({self.replays} replays)", self._facts())

    def _repr_html_(self) -> str:
        return html_facts(f"Smoothness of a run ({self.replays} replays)", self._facts())

    @property
    def verdict(self) -> Verdict:
        """Whether the run is nearly linear at the size of a removal ("smooth") or not ("rough")."""
        if not self.noise <= _NOISE:
            return "undecided"
        if self.halfway.low >= THRESHOLD:
            return "smooth"
        return "rough" if self.halfway.high < THRESHOLD else "undecided"

    @property
    def advice(self) -> str:
        """The verdict in words: which estimators to trust."""
        removal = f"leaving out {100 * self.fraction:.3g}% of the training examples"
        if not self.noise <= _NOISE:
            return (
                "Undecided: replays with the same weights differ too much from one another to show "
                "the effect of removals. Make training repeatable (Trainer(deterministic=True), "
                "random numbers from torch, Python and NumPy only) and record it again."
            )
        if self.verdict == "smooth":
            kinks = ""
            if self.near.high < THRESHOLD:
                kinks = (
                    " It has many small kinks (ReLU, max pooling): finite differences with tiny "
                    "changes of the weights are misleading, the derivative between the kinks is "
                    "not."
                )
            return (
                f"Smooth: half of {removal} predicts the full removal. Trust what is closest to "
                f"the derivative of this run: Unrolled, then Source(order='recorded').{kinks}"
            )
        if math.isnan(self.halfway.low):
            return (
                f"Undecided: {removal} changed too few measurements to compare. Use more queries "
                "or a larger fraction."
            )
        if self.verdict == "undecided":
            return (
                f"Undecided: the interval of halfway contains {THRESHOLD}. Use more directions, or "
                "compare estimators by their linear datamodeling score."
            )
        return (
            f"Rough: half of {removal} does not predict the full removal, and neither does any "
            "derivative of this run. Do not trust Unrolled. Source (in either order), influence "
            "functions and TracIn average over the run's jumps and may still rank examples; check "
            "them by retraining."
        )


def smoothness(
    trajectory: Trajectory,
    module: nn.Module,
    task: AttributionTask | None,
    dataset: object,
    queries: object,
    *,
    directions: int = 8,
    fraction: float = 0.05,
    share: float = 1e-3,
    seed: int = 0,
    batch_size: int = 256,
    together: int = 1,
    training: bool = True,
) -> Smoothness:
    """Replay the recorded run with random examples partly, half and fully left out.

    Args:
        trajectory: the recorded run.
        module: built as it was trained; it is restored at the end.
        task: gives the training losses and the measurement; None for the module's own
            ``training_step``.
        dataset: the recorded training set, or a ``DataLoader`` over it.
        queries: the queries to measure, likewise.
        directions: number of random sets of examples, at least 3; each costs three replays.
        fraction: share of the training examples in such a set, the size of the removal in question.
        share: part of the removal for ``near``; in float32 a much smaller one would measure
            rounding errors.
        seed: of the random sets.
        batch_size: of queries.
        together: runs to train at once; see :func:`~tda_lightning.evaluation.retrain_each`.
        training: replay in train mode, as Lightning trains.

    Raises:
        ValueError: a setting out of range, or fewer than 3 queries.
        UnsupportedTrainingError, TrajectoryMismatchError, NonFiniteError: as
            :func:`~tda_lightning.evaluation.retrain` does.
    """
    began = time.monotonic()
    train = ExampleSource.of(dataset, 1, "training")
    num_train = len(train)
    left_out = _random_sets(num_train, fraction, directions, seed)
    if not 0 < share < 0.5:
        raise ValueError(f"share must be above 0 and below 0.5, got {share}.")
    asked = train.others(queries, batch_size, "query")
    if (count := len(asked)) < 3:
        raise ValueError(f"A rank correlation needs at least 3 queries, got {count}.")
    shares = torch.tensor([share, 0.5, 1.0])
    everything = torch.ones(1, left_out.shape[1])
    reduced = 1 - shares[:, None] * left_out[:, None, :].float()
    weights = torch.cat([everything, reduced.flatten(0, 1)])
    names = list(trajectory.facts.parameters)

    def measured(state: State) -> Tensor:
        return measure(module, task, state, asked, trajectory=trajectory).double().cpu()

    with unchanged_randomness(), SlowProgress("Replaying", len(weights)) as progress:

        def replayed(weights: Tensor) -> Iterator[State]:
            work = (trajectory, module, task, train, weights, training, together)
            for state in retrain_each(*work):
                progress.advance()
                yield state

        states = replayed(weights)
        start = next(states)
        before, error = measured(start), landing_error(trajectory, start)
        signs, steps, changes = [], [], []
        for _ in left_out:
            small, half, whole = (next(states) for _ in shares)
            steps.append(_distance(names, start, whole))
            signs.append(_agreement_of_signs(names, start, half, whole))
            changes.append(torch.stack([measured(s) - before for s in (small, half, whole)]))
        again = start if error == 0 else next(replayed(everything))
    small_change, half_change, change = torch.stack(changes, dim=1)
    step, repeated = sum(steps) / len(steps), _distance(names, start, again)
    return Smoothness(
        metasmoothness=Estimate.of(torch.tensor(signs)),
        halfway=_rank_agreement(half_change, change),
        near=_rank_agreement(small_change, change),
        fraction=fraction,
        share=share,
        landing_error=error,
        noise=repeated / step if repeated else 0.0,
        replays=len(weights) + (error > 0),
        seconds=time.monotonic() - began,
    )


def _random_sets(num_train: int, fraction: float, directions: int, seed: int) -> Tensor:
    """Random sets of examples to leave out, bool [direction, train]."""
    if directions < 3:
        raise ValueError(f"An interval needs at least 3 directions, got directions={directions}.")
    if not 0 < fraction < 1 or not 0 < round(fraction * num_train) < num_train:
        raise ValueError(
            f"fraction must be between 0 and 1 and leave out some of {num_train} training examples "
            f"but not all, got {fraction}."
        )
    return ~draw_subsets(num_train, 1 - fraction, directions, seed)


def _distance(names: Sequence[str], one: State, other: State) -> float:
    """Euclidean distance of the trained parameters."""
    return math.sqrt(sum(float((one[n] - other[n]).double().square().sum()) for n in names))


def _agreement_of_signs(names: Sequence[str], start: State, half: State, whole: State) -> float:
    """Empirical metasmoothness; NaN where nothing moved."""
    agreed = total = 0.0
    for name in names:
        first, second = half[name] - start[name], whole[name] - half[name]
        moved = (whole[name] - start[name]).abs().double()
        agreed += float((moved * first.sign() * second.sign()).sum())
        total += float(moved.sum())
    return agreed / total if total else math.nan


def _rank_agreement(some: Tensor, whole: Tensor) -> Estimate:
    """Rank correlation over queries after subtracting each query's mean over directions.

    The subtraction makes directions depend on one another; the jackknife's interval accounts for it
    (Quenouille 1956, Tukey 1958): each direction is left out in turn, before taking means.

    Args:
        some: change of each measurement after part of the removal, [direction, query].
        whole: after all of it.
    """

    def agreement(rows: Tensor) -> Tensor:
        a, b = some[rows], whole[rows]
        return rank_correlation(a - a.mean(0), b - b.mean(0))

    every = torch.arange(len(some))
    found = agreement(every)
    without = torch.stack([agreement(every[every != row]).nanmean() for row in every])
    pseudovalues = len(every) * found.nanmean() - (len(every) - 1) * without
    return Estimate.of(found, pseudovalues[~pseudovalues.isnan()])
