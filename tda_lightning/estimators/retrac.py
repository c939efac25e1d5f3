"""Diffusion-ReTrac (Xie et al. 2024, 2401.09031): TracIn of directions, whatever their lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from tda_lightning.estimators.clipping import clipping_notes
from tda_lightning.estimators.pairs import paired
from tda_lightning.estimators.tracin import (
    checkpoint_intervals,
    neglected_clipping,
    rates_by_block,
    uses_since,
)
from tda_lightning.estimators.use_notes import use_notes
from tda_lightning.gradients import Dense, Gradient, Outer, example_scaled
from tda_lightning.gradients.forms import CHUNK_SCALARS
from tda_lightning.optimizers import require_rates
from tda_lightning.records.provenance import Provenance
from tda_lightning.replay.recorded_draws import RecordedDraws
from tda_lightning.session.queries import QueryGradients
from tda_lightning.session.session import Batch, Session

SIZES = (
    "no unit: gradients are divided by their norms, so scores rank training examples and do not "
    "predict how much a measurement changes"
)


@dataclass
class Retrac:
    r"""Inner products of the directions of training and query gradients at recorded checkpoints.

    .. math::
        s_{qn} = \sum_c w_c\, v_{cn}\, \Big\langle
            \frac1K \sum_k \frac{\nabla m_{qk}(\theta_c)}{\|\nabla m_{qk}(\theta_c)\|},\
            \frac{\nabla l_n(\theta_c)}{\|\nabla l_n(\theta_c)\|} \Big\rangle

    It is :class:`TracIn` without the sizes of gradients. In diffusion models these depend on the
    timestep more than on the example, so that the examples trained at certain timesteps look
    influential on everything. :math:`m_{qk}` is the k-th term that the query's measurement is the
    mean of, a timestep and a draw of the noise: each counts by its direction alone. Of the run's
    own draws each use of an example is normalised by itself. An example without a gradient scores
    0.

    The scores are in no unit: positive ones mark proponents, as everywhere, and their sizes compare
    with one another only.

    References:
        | Data Attribution for Diffusion Models: Timestep-induced Bias in Influence Estimation
          (Xie et al., 2024), section 5
        | https://arxiv.org/abs/2401.09031

    Example:
        The gradients of the four examples lie along the axes and the query's between them, so all
        four count alike, where TracIn gives the first two twice the score.

        >>> from tda_lightning.examples.least_squares import least_squares_scores
        >>> least_squares_scores(Retrac())
        tensor([-0.7071,  0.7071, -0.7071,  0.7071])
    """

    # Each example's own measurement takes a gradient for each timestep and draw.
    costly_self_influence: ClassVar[bool] = True

    def segment_count(self, session: Session) -> int:
        """One segment for each checkpoint after the initial weights."""
        return len(checkpoint_intervals(session))

    def score(self, session: Session) -> Provenance:
        """Compare directions at every checkpoint.

        Raises:
            UnsupportedTrainingError: the optimizer's rates do not say how far a gradient moved
                the parameters.
        """
        require_rates(session.trajectory)
        draws = RecordedDraws.of(session)
        intervals = checkpoint_intervals(session)
        for number, (start, step) in enumerate(intervals):
            weights = rates_by_block(session, start, step)
            used = (start, step) if draws is None else None
            for first, last in session.query_rounds(session.gradient_bytes(copies=2)):
                session.load(step)
                queries = QueryGradients.of(
                    mean_directions(session, batch, indices)
                    for batch, indices in session.queries(first, last)
                ).scaled(weights)
                for batch in uses_since(session, draws, start, step, "ReTrac"):
                    gradients = formed_once(batch.gradients)
                    scales = reciprocal_norms(gradients)
                    values = queries.dot(gradients) * scales
                    session.add(number, batch, values, first, used)
                    if session.self_influence and first == 0:
                        own = own_directions(session, batch, weights) * scales
                        if batch.signs is not None:
                            own = own * batch.signs
                        session.add_self_influence(batch.examples, own, used)
        notes = clipping_notes(session.trajectory, neglected_clipping(session))
        return {
            "sizes": SIZES,
            "checkpoints": [step for _, step in intervals],
            "segments": [[start, step] for start, step in intervals],
            "notes": notes + use_notes(session),
        }


def mean_directions(session: Session, batch: object, examples: Tensor) -> dict[str, Gradient]:
    """The mean of each query's gradients over timesteps and draws, each divided by its norm."""
    total: dict[str, Tensor] = {}
    count = 0
    for term in session.measurement_terms(batch, examples):
        gradients = formed_once(term.blocks)
        scales = reciprocal_norms(gradients)  # over all blocks
        directions = {name: example_scaled(own, scales) for name, own in gradients.items()}
        count += 1
        if count == 1 and session.draws * session.task.measured_parts == 1:
            return directions  # factored
        for name, gradient in directions.items():
            dense = torch.cat([gradient.dense(rows) for rows in gradient.chunks()])
            total[name] = total[name].add_(dense) if name in total else dense
    return {name: Dense(summed / count) for name, summed in total.items()}


def own_directions(session: Session, batch: Batch, weights: Mapping[str, Tensor]) -> Tensor:
    """Weighted inner products of each example's training gradient with the mean direction of its
    own measurement: [batch]."""
    measured = mean_directions(session, batch.data, batch.examples)
    return torch.stack(
        [
            paired(measured[name], gradient, None, weights[name])
            for name, gradient in batch.gradients.items()
        ]
    ).sum(0)


def formed_once(gradients: Mapping[str, Gradient]) -> dict[str, Gradient]:
    """The gradients, dense where norms and inner products would form them, each for itself: those
    of layers with many positions (convolutions), while they are small."""
    out = dict(gradients)
    for name, gradient in gradients.items():
        if not isinstance(gradient, Outer) or gradient.positions == 1:
            continue
        small = gradient.batch * prod(gradient.shape[1:]) <= CHUNK_SCALARS
        if small and not gradient.gram_is_cheaper(gradient):
            out[name] = Dense(torch.cat([gradient.dense(rows) for rows in gradient.chunks()]))
    return out


def reciprocal_norms(gradients: Mapping[str, Gradient]) -> Tensor:
    """1 / norm of each example's gradient over all blocks, [batch]; 0 where there is none."""
    squares = torch.stack([own.weighted_squares(None, None, None) for own in gradients.values()])
    norms = squares.sum(0).sqrt()
    return torch.where(norms > 0, 1 / norms, 0.0)
