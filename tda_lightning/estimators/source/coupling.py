"""Where one stage of training meets the next: whose adjoint goes on, and what frozen parameters do.

Every stage has its own N, loss, gradients, optimizer and curvature, and no segment crosses its end.
Only the queries' adjoint goes from a stage to the one before it (docs/methods.md, "Several
stages"). Multi-stage influence functions (Chen et al. 2020, 2007.09081) approximate the same at two
optima.

A stage moves its trained parameters T and leaves its frozen ones F in place, but where T ends up
depends on F: a perturbation of F changes every gradient of the stage by H_TF. Backwards through a
segment with response R (``spectral.py``),

    q_F <- q_F - H_FT u,    u = R q_T

with H the Gauss-Newton matrix of the stage's mean loss over T and F together, averaged over the
segment's checkpoints. H_FT u = mean_n g_nF (g_nT . u) takes no matrix, only walks over the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tda_lightning.curvature import as_matrices, unit_matrices
from tda_lightning.curvature.fit import WHOLE
from tda_lightning.estimators.queries import query_gradients
from tda_lightning.estimators.source.segments import Adjoint, FittedSegment, with_components
from tda_lightning.gradients import ExampleGradients
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.session.session import Batch, Session, Span
from tda_lightning.session.stage import Stage

# Adjoints of single parameters by name, [component, query, *shape].
NamedAdjoint: TypeAlias = "dict[str, Tensor]"


def final_adjoint(stage: Stage, first: int, last: int) -> NamedAdjoint:
    """Measurement gradients of the queries ``first`` to ``last`` by the final model."""
    session = stage.wide
    session.load(session.trajectory.last_step)
    gradients = query_gradients(session, "blocks", first, last)
    return {
        name: tensor[None]
        for block in session.blocks
        for name, tensor in block.tensors(gradients[block.name]).items()
    }


def entered(
    stage: Stage, last_segment: FittedSegment, handed: NamedAdjoint, queries: int
) -> tuple[Adjoint, NamedAdjoint]:
    """The adjoint at the end of a stage, of its trained parameters by unit and of its frozen ones
    by name. A parameter that later stages did not use has none, and gets zeros."""
    session, count = stage.wide, last_segment.components
    filled = {
        name: with_components(handed[name], count)
        if name in handed
        else torch.zeros(count, queries, *shape, dtype=session.dtype, device=session.device)
        for block in session.blocks
        for name, shape in zip(block.parameters, block.shapes, strict=True)
    }
    matrices = {block.name: block.matrix(filled) for block in stage.session.blocks}
    frozen = {name: filled[name] for name in stage.frozen}
    return unit_matrices(last_segment.grouping, matrices), frozen


def handed_over(
    stage: Stage, first_segment: FittedSegment, adjoint: Adjoint, frozen: NamedAdjoint
) -> NamedAdjoint:
    """What the stage before is asked: the adjoints of the parameters that it handed on.

    A parameter that begins with this stage (a new head) ends here, and so do the optimizer's states
    that began with it.
    """
    if not stage.carried:
        return {}
    everything = {**by_name(stage.session, first_segment.grouping, adjoint), **frozen}
    goes_on = stage.session.trajectory.steps_before
    return {
        name: everything[name] if name in goes_on else everything[name][:1]
        for name in stage.carried
    }


def coupled(
    stage: Stage,
    segment: FittedSegment,
    response: Mapping[str, Tensor],
    frozen: NamedAdjoint,
    seed: int,
) -> NamedAdjoint:
    """Carry the frozen parameters' adjoint across a segment, by walks over its checkpoints.

    Args:
        response: u of the trained parameters, [query, groups, rows, columns] by unit.
        frozen: at the segment's end.
        seed: of the sampled labels.
    """
    u = by_name(stage.session, segment.grouping, response)
    steps, title, used = segment.steps.checkpoints, segment.title, segment.used
    products = frozen_products(stage, u, steps, title, segment.kind, seed, used)
    carried = {}
    for name, product in products.items():
        adjoint = frozen[name].clone()
        adjoint[0] -= product
        carried[name] = adjoint
    return carried


def frozen_products(
    stage: Stage,
    response: Mapping[str, Tensor],
    steps: Sequence[int],
    title: str,
    curvature: str,
    seed: int,
    used: Span,
) -> dict[str, Tensor]:
    """H_FT u by name of the frozen parameters, [query, *shape]: a mean over checkpoints.

    Args:
        response: u by name of the trained parameters, [query, *shape].
        steps: the checkpoints.
        title: for progress bars.
        curvature: ``exact``, or any other kind: sampled labels.
        seed: of those.
        used: the steps whose use of examples weighs them.
    """
    session, count = stage.wide, len(next(iter(response.values())))
    u = _by_wide_block(stage, response)
    shapes = {
        name: shape
        for block in session.blocks
        for name, shape in zip(block.parameters, block.shapes, strict=True)
    }
    some = next(iter(response.values()))
    products = {name: some.new_zeros(count, *shapes[name]) for name in stage.frozen}
    for step in steps:
        for batch in session.walk(f"{title}: coupling to frozen parameters, step {step}", step):
            for gradients in _gauss_newton(session, batch, curvature, seed + step):
                dots = [gradients.blocks[name].dot(own) for name, own in u.items()]
                inner = torch.stack(dots).sum(0)
                if (weights := batch.curvature_weights(used)) is not None:
                    inner = inner * weights
                for block in session.blocks:
                    if not products.keys() & set(block.parameters):
                        continue
                    product = block.tensors(gradients.blocks[block.name].weighted_sums(inner))
                    for name in product.keys() & products.keys():
                        products[name] += product[name]
    total = session.num_train * len(steps) * session.draws
    # In the same order in every process.
    return {name: session.reduce(product) / total for name, product in products.items()}


def _by_wide_block(stage: Stage, response: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A response by name as matrices of the blocks of ``stage.wide`` that it has a part in."""
    some = next(iter(response.values()))
    matrices = {}
    for block in stage.wide.blocks:
        if response.keys() & set(block.parameters):
            parts = {
                name: response[name] if name in response else some.new_zeros(len(some), *shape)
                for name, shape in zip(block.parameters, block.shapes, strict=True)
            }
            matrices[block.name] = block.matrix(parts)
    return matrices


def _gauss_newton(
    session: Session, batch: Batch, curvature: str, seed: int
) -> Iterator[ExampleGradients]:
    for _ in session.losses.each_draw():
        if curvature == "exact":
            yield from session.gauss_newton_gradients(batch.data, batch.examples)
        else:
            yield session.fisher_gradients(batch.data, batch.examples, seed)


def by_name(session: Session, grouping: str, by_unit: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[..., groups, rows, columns] by unit of curvature as [..., *shape] by parameter."""
    matrices = by_unit
    if grouping == "exact":
        matrices = as_matrices(session.blocks, by_unit[WHOLE][..., 0, 0, :])
    return {
        name: tensor
        for block in session.blocks
        for name, tensor in block.tensors(matrices[block.name]).items()
    }


def stage_cuts(
    num_segments: int,
    segment_steps: Sequence[int] | Sequence[Sequence[int]] | None,
    stages: Sequence[Stage],
) -> list[int | list[int]]:
    """Where each of several stages is cut: a number of segments, or explicit steps of it.

    A run that was recorded as one keeps the cuts that it would have as a whole, and gets further
    ones where its stages begin. Of ``num_segments`` equal lengths, a cut that would leave a
    segment of a stage without a checkpoint is left out.
    """
    given: Any = segment_steps
    runs = sorted({stage.run for stage in stages})
    nested = bool(given) and all(isinstance(cuts, Sequence) for cuts in given)
    if given is not None and len(runs) > 1 and not (nested and len(given) == len(runs)):
        raise ValueError(
            f"segment_steps must hold one list of steps for each of the {len(runs)} "
            f"trajectories, got {list(given)}."
        )
    cuts_by_stage: list[int | list[int]] = []
    for stage in stages:
        run = [other for other in stages if other.run == stage.run]
        if len(run) == 1 and given is None:
            cuts_by_stage.append(num_segments)
            continue
        if given is None:
            total = sum(other.session.trajectory.last_step for other in run)
            cuts = [part * total // num_segments for part in range(num_segments)]
        else:
            cuts = list(given[runs.index(stage.run)] if nested else given)
        first = stage.first_step - run[0].first_step
        last = first + stage.session.trajectory.last_step
        inside = [cut - first for cut in cuts if first < cut < last]
        if given is None:
            inside = _with_checkpoints(inside, stage.session.trajectory)
        cuts_by_stage.append(inside)
    return cuts_by_stage


def _with_checkpoints(cuts: Sequence[int], trajectory: Trajectory) -> list[int]:
    """Those of ``cuts`` between which every segment holds a checkpoint."""
    chosen = [0]
    for cut in cuts:
        if any(chosen[-1] < step <= cut for step in trajectory.checkpoints):
            chosen.append(cut)
    return chosen[1:]
