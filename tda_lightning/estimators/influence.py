"""Influence functions at the final weights (Koh & Liang 2017, 1703.04730), with EK-FAC by default
(Grosse et al. 2023, 2308.03296)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tda_lightning.curvature import (
    CurvatureFit,
    RecordedFit,
    Spectrum,
    check_dense_side,
    check_kind,
    check_statistics,
    curvature_of,
    unit_matrices,
    units,
)
from tda_lightning.estimators.about import about_statistics
from tda_lightning.estimators.clipping import clipping_notes
from tda_lightning.estimators.pairs import paired
from tda_lightning.estimators.queries import Response, dot, query_gradients, query_rounds
from tda_lightning.passes import Context, Pass, Plan
from tda_lightning.trajectory import Trajectory


@dataclass
class InfluenceFunction:
    r"""What the optimum of the training loss would lose without an example.

    .. math::
        s_{qn} = \frac1N \nabla m_q(\theta_T)^\top
        (H + (\lambda + \delta) I)^{-1} \nabla l_n(\theta_T)

    with :math:`\lambda` the recorded weight decay.

    Attributes:
        curvature: ``exact``, ``ekfac``, ``kfac``, ``diagonal`` or ``identity``.
        damping: :math:`\delta`, absolute.
        relative_damping: :math:`\delta` as a multiple of the layer's mean eigenvalue; 0.1 when
            neither is given.
        statistics: ``recorded``: curvature from the statistics that
            ``TrajectoryRecorder(curvature="online")`` gathered in the last interval before the
            last checkpoint. ``corrected``: with one pass for EK-FAC's eigenvalues in their basis.
            ``fitted``: curvature fitted at the last checkpoint. ``auto``: recorded where the run
            has any and ``curvature`` is ``ekfac`` or ``kfac``, else fitted.
        dense_side: the widest side of a layer (its inputs or outputs) whose covariance ``ekfac``
            and ``kfac`` hold as a dense matrix of that width; of a wider one they hold the
            leading 256 directions and the diagonal. None: 4096; 1024 for layers whose gradients
            have no factors (a weight used in two ways).
        seed: of the sampled labels.

    Raises:
        ValueError: at once for impossible settings; when planning, for statistics that are asked
            for and were not recorded, or do not fit the model.

    References:
        | Understanding Black-box Predictions via Influence Functions (Koh & Liang, 2017), sec. 2
        | https://arxiv.org/abs/1703.04730
        | Studying Large Language Model Generalization with Influence Functions (Grosse et al.,
          2023), sec. 2.2, 3.1
        | https://arxiv.org/abs/2308.03296
    """

    curvature: str = "ekfac"
    damping: float | None = None
    relative_damping: float | None = None
    statistics: str = "auto"
    dense_side: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_kind(self.curvature)
        check_statistics(self.statistics, self.curvature)
        check_dense_side(self.dense_side)
        if self.damping is not None and self.relative_damping is not None:
            raise ValueError(
                f"Give damping (got {self.damping}) or relative_damping (got "
                f"{self.relative_damping}), not both."
            )
        for name in ("damping", "relative_damping"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}.")

    def segment_count(self, context: Context) -> int | None:
        """Influence functions know no time."""
        return None

    def plan(self, context: Context) -> Plan:
        """Fit curvature at the last checkpoint, then score the training set against it."""
        return self._planned(context, None)

    def _planned(self, context: Context, candidates: Tensor | None) -> Plan:
        """The plan for all training examples, or for those in ``candidates`` [query, k] alone."""
        run = _Run(self, context)
        step = context.trajectory.last_step
        passes = run.fit.passes()
        for number, (start, stop) in enumerate(query_rounds(context, copies=2)):
            run_self = context.self_influence and candidates is None and number == 0
            order = None if candidates is None else _batches(context, candidates[start:stop])
            passes.append(
                Pass(
                    "influence function",
                    step,
                    run.score(start, run_self),
                    run.prepare(start, stop),
                    run.finish if run_self else None,
                    order,
                )
            )
        damping = (
            {"absolute": self.damping}
            if self.damping is not None
            else {"relative to the layer's mean eigenvalue": run.relative_damping}
        )
        about = about_statistics(
            self.statistics, self.curvature, context.trajectory, [last_interval(context.trajectory)]
        )
        notes = clipping_notes(context.trajectory, "the formula looks at the final weights alone")
        return Plan(passes, {"damping": damping, "checkpoints": [step], **about}, notes)


def _batches(context: Context, candidates: Tensor) -> list[list[int]]:
    """Batches of the candidates of some queries, small enough that every process has one."""
    chosen = candidates.unique()
    size = min(context.batch_size, max(1, len(chosen) // context.world_size))
    return [part.tolist() for part in chosen.split(size)]


def last_interval(trajectory: Trajectory) -> tuple[int, int]:
    """The steps before the last checkpoint that have recorded statistics, else all of them."""
    with_examples = [
        interval
        for interval in sorted(trajectory.statistics, reverse=True)
        if any(float(block.examples) for block in trajectory.statistics[interval].values())
    ]
    return with_examples[0] if with_examples else (0, trajectory.last_step)


@dataclass
class _Run:
    options: InfluenceFunction
    context: Context
    fit: CurvatureFit | RecordedFit = field(init=False)

    def __post_init__(self) -> None:
        context, kind = self.context, self.options.curvature
        self.fit = curvature_of(
            self.options.statistics,
            kind,
            context,
            last_interval(context.trajectory),
            [context.trajectory.last_step],
            seed=self.options.seed,
            dense_side=self.options.dense_side,
        )
        given = self.options.relative_damping
        self.relative_damping = 0.1 if given is None else given
        self.self_influence: Tensor | None = None
        self.responses: dict[str, Response] = {}
        self._damped: dict[str, Spectrum] = {}

    def damped(self, name: str) -> Spectrum:
        """Curvature plus weight decay plus damping, on the device."""
        if name not in self._damped:
            spectrum = self.fit.spectra[name].to(self.context.device, self.context.dtype)
            damping: Any = self.options.damping
            if damping is None:
                damping = self.relative_damping * spectrum.eigenvalues.mean()
            damped = spectrum.shifted(self.decay(name) + damping)
            if not bool((damped.eigenvalues > 0).all()):
                raise ValueError(
                    f"The curvature of {name} is singular and damping is 0: the inverse does not "
                    "exist. Give a positive damping."
                )
            self._damped[name] = damped
        return self._damped[name]

    def decay(self, name: str) -> Tensor:
        """Weight decay of every parameter at the last step."""
        trajectory = self.context.trajectory
        rates = trajectory.steps.hyperparameters["weight_decay"][trajectory.last_step - 1]
        filled = {
            key: torch.full(fact.shape, float(rates[fact.group]), dtype=torch.float64)
            for key, fact in trajectory.facts.parameters.items()
        }
        matrices = {block.name: block.matrix(filled) for block in self.context.blocks}
        found = unit_matrices(self.options.curvature, matrices)[name]
        return found.to(self.context.device, self.context.dtype)

    def prepare(self, start: int, stop: int) -> Any:
        def begin() -> None:
            self.responses = {}
            kind, count = self.options.curvature, self.context.num_train
            found = query_gradients(self.context, kind, start, stop, self.damped)
            for name, coordinates in found.items():
                spectrum = self.damped(name)
                coordinates /= spectrum.eigenvalues
                self.responses[name] = Response(coordinates, spectrum, count)

        return begin

    def score(self, first_query: int, with_self: bool) -> Any:
        def accumulate(batch: Any, examples: Tensor, _: int) -> None:
            found = self.context.train_gradients(batch, examples)
            gradients = units(self.options.curvature, found.blocks)
            values = dot(self.responses, gradients) / self.context.num_train
            self.context.sink.add(None, examples, values, first_query)
            if with_self:
                self._add_self(batch, examples, gradients)

        return accumulate

    def _add_self(self, batch: Any, examples: Tensor, gradients: Mapping[str, Any]) -> None:
        measured = gradients
        if not self.context.task.measures_loss:
            found = self.context.measurement_gradients(batch, examples)
            measured = units(self.options.curvature, found.blocks)
        if self.self_influence is None:
            self.self_influence = torch.zeros(
                self.context.num_train, dtype=self.context.dtype, device=self.context.device
            )
        for name, gradient in gradients.items():
            spectrum = self.damped(name)
            own = paired(measured[name], gradient, spectrum, 1 / spectrum.eigenvalues)
            self.self_influence[examples] += own / self.context.num_train

    def finish(self) -> None:
        assert self.self_influence is not None
        self.context.sink.set_self_influence(self.context.reduce(self.self_influence).cpu())
