"""Curvature from the statistics that were gathered in training, without a pass over the data.

The Kronecker factors of a segment are sums over its intervals. Their eigenvectors are the basis,
the products of their eigenvalues the eigenvalues, scaled so that each block's trace is the
recorded one: what the Kronecker product gets wrong most, where positions are correlated, is its
size. Where few examples were gathered, the eigenvalues are drawn towards their mean
(:func:`shrunk`). Products in place of EK-FAC's measured eigenvalues cost little
(experiments/online has the figures); ``statistics="corrected"`` measures them, in one pass.

For Adam the curvature of h * g is needed. Its factors follow from those of g where h is an outer
product r c^T of a row and a column: diag(r) G diag(r) and diag(c) A diag(c). In its place stands
the outer product of its row and column means (as in Adafactor: Shazeer & Stern 2018, 1804.04235).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tda_lightning.curvature.fit import Scales, fit_curvature
from tda_lightning.curvature.shared_walk import SharedWalk
from tda_lightning.curvature.sides import eigenbasis, trace_of
from tda_lightning.curvature.spectrum import Spectrum
from tda_lightning.gradients import Block
from tda_lightning.records.curvature_statistics import BlockStatistics, Statistics
from tda_lightning.records.provenance import Provenance
from tda_lightning.records.provenance import Statistics as StatisticsRecord
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.session.session import Session, Span

STATISTICS = ("auto", "recorded", "corrected", "fitted")
_KRONECKER = ("ekfac", "kfac")


def check_statistics(choice: str, kind: str) -> None:
    """Refuse an unknown choice of statistics, or one that the kind of curvature cannot use."""
    if choice not in STATISTICS:
        raise ValueError(f"statistics must be one of {', '.join(STATISTICS)}, got {choice!r}.")
    if choice in ("recorded", "corrected") and kind not in _KRONECKER:
        raise ValueError(
            f"statistics={choice!r} are Kronecker factors: they go with curvature='ekfac' or "
            f"'kfac', got curvature={kind!r}."
        )


def uses_statistics(choice: str, kind: str, trajectory: Trajectory) -> bool:
    """Whether curvature of ``kind`` comes from the statistics recorded in training."""
    if choice == "auto":
        # Of a run as a whole, the last stage knows what it trained itself.
        last = trajectory.stages()[-1]
        whole = last.facts.parameters.keys() == trajectory.facts.parameters.keys()
        return kind in _KRONECKER and whole and bool(last.statistics)
    return choice != "fitted"


def statistics_provenance(
    choice: str, kind: str, trajectory: Trajectory, spans: Sequence[tuple[int, int]]
) -> Provenance:
    """Provenance of curvature that was recorded in training over ``spans`` of steps; empty where
    it was fitted."""
    if not uses_statistics(choice, kind, trajectory):
        return {}
    merged = [trajectory.merged_statistics(*span) for span in spans]
    examples = [
        max((int(block.examples) for block in blocks.values()), default=0) for blocks in merged
    ]
    record: StatisticsRecord = {
        "gathered": "in training",
        "eigenvalues": "one pass" if choice == "corrected" else "products, by recorded trace",
        "examples": examples,
    }
    if left_out := sorted({name for blocks in merged for name in _left_out(blocks)}):
        record["fitted"] = left_out
    return {
        "statistics": record,
        "fisher": trajectory.facts.settings.get("curvature", {}).get("fisher"),
    }


def curvature_of(
    choice: str,
    kind: str,
    session: Session,
    interval: tuple[int, int],
    steps: Sequence[int],
    scales: Scales | None = None,
    seed: int = 0,
    title: str = "curvature",
    dense_side: int | None = None,
    used: Span | None = None,
    shared: SharedWalk | None = None,
) -> dict[str, Spectrum]:
    """Curvature of the steps in ``interval`` by unit: recorded where it can be, else fitted at the
    checkpoints ``steps`` (see :func:`fit_curvature` for the other arguments).

    Raises:
        ValueError: statistics are asked for, and there are none that fit the model.
    """
    if not uses_statistics(choice, kind, session.trajectory):
        return fit_curvature(
            kind, session, steps, scales, seed, title, dense_side, used=used, shared=shared
        )
    statistics = session.trajectory.merged_statistics(*interval)
    _require_fitting(statistics, session.blocks, interval)
    missing = _left_out(statistics)
    # Statistics are of all steps together, and so must their metric be.
    scale = _common_scale(scales or {}, steps)
    spectra = {
        block.name: _spectrum(statistics[block.name], scale.get(block.name))
        for block in session.blocks
        if block.name not in missing
    }
    if any(block.name in missing for block in session.blocks):
        fitted = fit_curvature(kind, session, steps, scales, seed, title, dense_side, used=used)
        spectra = {b.name: spectra.get(b.name, fitted[b.name]) for b in session.blocks}
    if choice == "corrected":
        bases = {name: (spectrum.left, spectrum.right) for name, spectrum in spectra.items()}
        return fit_curvature("ekfac", session, steps, scales, seed, title, dense_side, bases, used)
    return {name: s.to(session.device, session.dtype) for name, s in spectra.items()}


def _common_scale(scales: Scales, steps: Sequence[int]) -> dict[str, Tensor]:
    """One h by unit for all ``steps``: where it differs between them, 1 / h^2 is averaged over
    those with h > 0, as are the second moments that it comes from."""
    common = {}
    for name in scales.get(steps[0], {}):
        each = torch.stack([scales[step][name] for step in steps])
        squares = torch.where(each > 0, each.clamp(min=1e-30) ** -2, 0).sum(0)
        mean = squares / (each > 0).sum(0).clamp(min=1)
        alike = bool((each == each[0]).all())
        common[name] = each[0] if alike else torch.where(mean > 0, mean**-0.5, 0)
    return common


def _left_out(statistics: Statistics) -> list[str]:
    """Blocks of which training gathered nothing, while it did of others."""
    return [name for name, block in statistics.items() if not float(block.examples)]


def _require_fitting(
    statistics: Statistics, blocks: Sequence[Block], interval: tuple[int, int]
) -> None:
    advice = "Pass statistics='fitted' to fit curvature at the checkpoints."
    if not any(float(block.examples) for block in statistics.values()):
        raise ValueError(
            f"No curvature statistics were recorded in steps {interval[0]} to {interval[1]}: "
            "expected some from TrajectoryRecorder(curvature='online'), whose curvature_every may "
            f"be longer than these steps. {advice}"
        )
    for block in blocks:
        found = statistics.get(block.name)
        if found is None or (found.parameters, found.shape) != (block.parameters, block.shape):
            what = "none" if found is None else f"{list(found.parameters)} as {list(found.shape)}"
            raise ValueError(
                f"The recorded curvature statistics do not fit the model: expected a block of "
                f"{list(block.parameters)} as {list(block.shape)}, got {what}. {advice}"
            )


def _spectrum(statistics: BlockStatistics, scale: Tensor | None) -> Spectrum:
    left, right, count, trace = (
        value.double().cpu() / statistics.examples.double().cpu()
        for value in (statistics.left, statistics.right, statistics.count, statistics.trace)
    )
    # The trace of g's own factors shows by how much the product is off.
    size = (trace_of(left) * trace_of(right) / count).sum()
    off = trace / size.clamp(min=1e-300)
    rows = columns = None
    if scale is not None:
        rows, columns = _outer_factors(scale.double().cpu())
    left_values, left_basis = eigenbasis(left, rows)
    right_values, right_basis = eigenbasis(right, columns)
    left_values = shrunk(left_values, left, float(statistics.samples[0]))
    right_values = shrunk(right_values, right, float(statistics.samples[1]))
    product = left_values[:, :, None] * right_values[:, None, :] / count.view(-1, 1, 1)
    return Spectrum(left_basis, right_basis, product * off)


def shrunk(eigenvalues: Tensor, moment: Tensor, samples: float) -> Tensor:
    r"""Eigenvalues [groups, width] of a second moment of few samples, drawn towards their mean.

    The eigenvalues of such an estimate are spread too far, to zero where there are fewer samples
    than directions, and a curvature of nearly zero would let influence grow without bound:

    .. math::
        \lambda_i \leftarrow (1 - \rho) \lambda_i + \rho\, \bar\lambda, \qquad
        \rho = \frac{(1 - 2/p) \sum \lambda^2 + (\sum \lambda)^2}
        {(n + 1 - 2/p) (\sum \lambda^2 - (\sum \lambda)^2 / p)} \le 1

    for n samples of width p. A diagonal, whose entries are estimated one by one, stays as it is.

    References:
        | Shrinkage Algorithms for MMSE Covariance Estimation (Chen et al., 2010), eq. 23 (OAS)
        | https://arxiv.org/abs/0907.4698
    """
    width = eigenvalues.shape[-1]
    if moment.dim() == 2 or width == 1:
        return eigenvalues
    total, squares = eigenvalues.sum(-1), eigenvalues.square().sum(-1)
    over = (1 - 2 / width) * squares + total.square()
    under = (samples + 1 - 2 / width) * (squares - total.square() / width)
    part = torch.where(over < under, over / under.clamp(min=1e-300), 1.0).unsqueeze(-1)
    return (1 - part) * eigenvalues + part * total.unsqueeze(-1) / width


def _outer_factors(scale: Tensor) -> tuple[Tensor, Tensor]:
    """r [groups, rows] and c [groups, columns] whose outer product has the row and column means
    of ``scale``."""
    rows, columns = scale.mean(-1), scale.mean(-2)
    overall = rows.mean(-1, keepdim=True).clamp(min=1e-300)
    return rows / overall.sqrt(), columns / overall.sqrt()
