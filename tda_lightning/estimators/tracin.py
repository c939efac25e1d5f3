"""TracIn (Pruthi et al. 2020, 2002.08484): gradients compared at the recorded checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tda_lightning.estimators.clipping import clipping_notes
from tda_lightning.estimators.pairs import paired
from tda_lightning.estimators.use_notes import use_notes
from tda_lightning.optimizers import applied_rates, require_rates, rule_if_known
from tda_lightning.records.provenance import Provenance
from tda_lightning.replay.recorded_draws import RecordedDraws
from tda_lightning.session.queries import QueryGradients
from tda_lightning.session.session import Batch, Session
from tda_lightning.session.stage import Stage

NO_SELF = (
    "No self-influence over several stages: an example of an earlier stage has no measurement of "
    "its own on the final model. Attribute that stage's trajectory alone, or ask for examples as "
    "queries."
)
SIZES = (
    "ranks only: nothing is forgotten and the optimizer's metric is left out, so sizes are off by "
    "orders of magnitude"
)


@dataclass
class TracIn:
    r"""Inner products of training and query gradients at the recorded checkpoints.

    .. math::
        s_{qn} = \frac1N \sum_c w_c\, v_{cn}\, \nabla m_q(\theta_c)^\top \nabla l_n(\theta_c)

    This sums what each use of an example did to the query's measurement, and leaves out that later
    steps partly forget it. Each checkpoint c stands for the steps since the one before it, and
    :math:`w_c` is the sum of their applied rates (with momentum, times
    (1 - dampening) / (1 - momentum)), for each parameter group. :math:`v_{cn}` is 1 where these
    steps used all examples evenly (docs/methods.md, "Uneven use"). The paper writes
    :math:`\eta_c` for :math:`w_c / N`, which gives the same ranking when checkpoints are evenly
    spaced.

    Of a loss that draws random numbers the gradients are those of the run's own draws: the sum over
    an example's uses takes the place of one gradient for all (docs/methods.md, "Random steps").

    References:
        | Estimating Training Data Influence by Tracing Gradient Descent (Pruthi et al., 2020),
          section 3
        | https://arxiv.org/abs/2002.08484

    Example:
        Ten steps at rate 0.1 on least squares with curvature 2 and 1/2: nothing is forgotten, so
        a score is the sum of the rates, 1, times 3 g / 4.

        >>> from tda_lightning.examples.least_squares import least_squares_scores
        >>> least_squares_scores(TracIn())
        tensor([-1.5000,  1.5000, -0.7500,  0.7500])
    """

    def segment_count(self, session: Session) -> int:
        """One segment for each checkpoint after the initial weights."""
        return len(checkpoint_intervals(session))

    def score(self, session: Session) -> Provenance:
        """Compare gradients at every checkpoint.

        Raises:
            UnsupportedTrainingError: the optimizer's rates do not say how far a gradient moved
                the parameters.
        """
        require_rates(session.trajectory)
        draws = RecordedDraws.of(session)
        for number, (start, step) in enumerate(checkpoint_intervals(session)):
            weights = rates_by_block(session, start, step)
            # Recorded batches hold each example as often as it was drawn.
            used = (start, step) if draws is None else None
            for first, last in session.query_rounds(session.factored_bytes(copies=1)):
                session.load(step)
                queries = session.query_gradients(first, last).scaled(weights)
                directions = session.on_parameters(queries.dense()) if session.by_token else {}
                for batch in uses_since(session, draws, start, step):
                    with_self = session.self_influence and first == 0
                    values, own = _products(queries, batch, weights, with_self)
                    session.add(number, batch, values / session.num_train, first, used)
                    if session.by_token:
                        share = 1 / session.num_train
                        session.add_terms(batch, directions, first, share, used)
                    if own is not None:
                        if batch.signs is not None:
                            own = own * batch.signs
                        own = own / session.num_train
                        session.add_self_influence(batch.examples, own, used)
        return {
            "sizes": SIZES,
            "checkpoints": [step for _, step in checkpoint_intervals(session)],
            "segments": [[start, step] for start, step in checkpoint_intervals(session)],
            "notes": clipping_notes(session.trajectory, neglected_clipping(session))
            + use_notes(session),
        }

    def stage_segment_counts(self, stages: Sequence[Stage]) -> list[int]:
        """Checkpoints of each stage."""
        return [self.segment_count(stage.session) for stage in stages]

    def score_stages(self, stages: Sequence[Stage]) -> Provenance:
        """Score every stage by itself, with the queries measured at its own checkpoints.

        Raises:
            ValueError: the stages differ in model or task, so that an earlier one cannot be asked
                for the final model's measurement.
        """
        _require_one_measurement(stages)
        checkpoints: list[int] = []
        segments: list[list[int]] = []
        notes = [NO_SELF]
        for number, stage in enumerate(stages, start=1):
            notes += [f"Stage {number}: {note}" for note in self.score(stage.session)["notes"]]
            for start, step in checkpoint_intervals(stage.session):
                checkpoints.append(stage.first_step + step)
                segments.append([stage.first_step + start, stage.first_step + step])
        record: Provenance = {"checkpoints": checkpoints, "segments": segments, "notes": notes}
        return {"sizes": SIZES, **record}


def uses_since(
    session: Session,
    draws: RecordedDraws | None,
    start: int,
    step: int,
    name: str = "TracIn",
) -> Iterator[Batch]:
    """The training set at checkpoint ``step``. Of a loss that draws random numbers, the recorded
    batches since the checkpoint before: an example's gradient is the sum over its uses, each with
    what it drew and with its share in its step."""
    title, rows = f"{name}, step {step}", range(start, step)
    if draws is None:
        yield from session.walk_columns(title, step)
        return
    shares = draws.shares(rows)
    for batch in draws.walk(title, step, rows):
        own = shares[batch.position] * session.num_train / len(rows)
        yield replace(batch, signs=torch.full_like(batch.examples, own, dtype=session.dtype))


def _products(
    queries: QueryGradients, batch: Batch, weights: Mapping[str, Tensor], with_self: bool
) -> tuple[Tensor, Tensor | None]:
    """Inner products with the queries, [query, batch], and the weighted ones of each example's own
    two gradients, [batch]; None where they are not asked for."""
    gradients = batch.gradients
    if not with_self:
        return queries.dot(gradients), None
    measured = batch.measurement_gradients
    if measured is gradients:
        return queries.dot_and_squares(gradients, weights)
    own = [paired(measured[name], one, None, weights[name]) for name, one in gradients.items()]
    return queries.dot(gradients), torch.stack(own).sum(0)


def checkpoint_intervals(session: Session) -> list[tuple[int, int]]:
    """(step of the checkpoint before, step) of every checkpoint after the initial weights."""
    steps = [step for step in sorted(session.trajectory.checkpoints) if step > 0]
    return list(zip([0, *steps], steps, strict=False))


def rates_by_block(session: Session, start: int, stop: int) -> dict[str, Tensor]:
    """w_c of every parameter, by block: [groups, rows, columns]."""
    trajectory = session.trajectory
    sums = applied_rates(trajectory, slice(start, stop)).sum(0)
    filled = {
        name: torch.full(fact.shape, float(sums[fact.group]), dtype=session.dtype)
        for name, fact in trajectory.facts.parameters.items()
    }
    return {block.name: block.matrix(filled).to(session.device) for block in session.blocks}


def neglected_clipping(session: Session) -> str | None:
    """Why clipping is left out of the formula; None where it is not."""
    rule = rule_if_known(session.trajectory)
    if rule is None:
        return "there is no formula for the optimizer"
    # Other steps hardly depend on the gradient's scale, and TracIn leaves their metric out.
    return None if rule.linear else f"{rule.name} normalises gradient scale away"


def _require_one_measurement(stages: Sequence[Stage]) -> None:
    last = stages[-1].session
    shapes = {name: p.shape for name, p in last.module.named_parameters()}
    for number, stage in enumerate(stages, start=1):
        own = {name: p.shape for name, p in stage.session.module.named_parameters()}
        if own != shapes or stage.session.task.settings() != last.task.settings():
            raise ValueError(
                f"TracIn measures the queries at the checkpoints of every stage, and stage "
                f"{number} has another model or task than the last one. Use Source, which asks "
                "the final model alone."
            )
