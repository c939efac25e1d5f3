"""Where one stage of training meets the next: whose adjoint goes on, and what frozen parameters do.

A stage moves its trained parameters T and keeps its frozen ones F, but where T ends up depends on
F: a perturbation of F changes every gradient of the stage by H_TF. Backwards through a segment with
response R (estimators/spectral.py),

    q_F <- q_F - H_FT u,    u = R q_T

with H the Gauss-Newton matrix of the stage's mean loss over T and F together, averaged over the
segment's checkpoints. H_FT u = mean_n g_nF (g_nT . u) takes no matrix, only passes over the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tda_lightning.curvature import unit_matrices
from tda_lightning.curvature.fit import WHOLE
from tda_lightning.estimators.queries import query_gradients
from tda_lightning.estimators.source.segments import Adjoint
from tda_lightning.gradients import ExampleGradients
from tda_lightning.session.passes import Pass, Session, Stage

# Adjoints of single parameters by name, [query, *shape].
Named = dict[str, Tensor]


class StageLink:
    """Brings the queries' adjoints to the end of a stage, and hands over those at its start.

    Args:
        stage: the stage.
        later: the link of the stage after it; None for the last stage, where the queries are.
        curvature: the kind that the stage's segments use.
        seed: of the sampled labels.
    """

    def __init__(self, stage: Stage, later: StageLink | None, curvature: str, seed: int):
        self.stage, self.later, self.curvature, self.seed = stage, later, curvature, seed
        self.has_earlier = bool(stage.carried)
        # ``identity`` is no curvature at all, so nothing couples.
        self.couples = bool(stage.frozen) and curvature != "identity"
        self.frozen: Named = {}
        self._trained: Named = {}
        # Of momentum buffers or Adam's moments, those of frozen parameters apart: they wait.
        self._moments: list[Named] = []
        self._waiting: list[Named] = []
        self._response: dict[str, Tensor] = {}
        self._products: Named = {}

    def arrive(self, grouping: str, start: int, stop: int) -> Adjoint:
        """The adjoints of the stage's trained parameters at its end; those of the frozen ones are
        kept here."""
        stage, moments = self.stage, []
        if self.later is None:
            stage.wide.load(stage.wide.trajectory.last_step)
            found = query_gradients(stage.wide, "blocks", start, stop)
            named = by_name(stage.wide, "blocks", found)
        else:
            named = self._filled(self.later.handed_over(), stop - start)
            moments = [self._filled(m, stop - start) for m in self.later.moments_handed_over()]
        self.frozen = {name: named[name] for name in stage.frozen}
        self._waiting = [{name: moment[name] for name in stage.frozen} for moment in moments]
        return Adjoint(
            by_unit(stage.session, grouping, named),
            *(by_unit(stage.session, grouping, moment) for moment in moments),
        )

    def depart(self, grouping: str, adjoint: Adjoint) -> None:
        """Keep the adjoints at the start of the stage."""
        self._trained = by_name(self.stage.session, grouping, adjoint.a)
        moments = [moment for moment in (adjoint.b, adjoint.e) if moment is not None]
        self._moments = [by_name(self.stage.session, grouping, moment) for moment in moments]

    def handed_over(self) -> Named:
        """What the stage before is asked: the adjoints of the parameters that it handed on.

        A parameter that begins with this stage (a new head) ends here.
        """
        everything = {**self._trained, **self.frozen}
        return {name: everything[name] for name in self.stage.carried}

    def moments_handed_over(self) -> list[Named]:
        """The adjoints of the optimizer's state that goes on from the stage before: buffers of
        parameters that it had trained before; none where the optimizer is a new one."""
        goes_on = self.stage.session.trajectory.steps_before
        waiting = self._waiting or [{} for _ in self._moments]
        both = [{**own, **late} for own, late in zip(self._moments, waiting, strict=True)]
        kept = [{n: m for n, m in moment.items() if n in goes_on} for moment in both]
        return kept if any(kept) else []

    def meet(self, grouping: str, response: Mapping[str, Tensor]) -> None:
        """Take a segment's response u to the queries, on the trained parameters, by unit."""
        wide = self.stage.wide
        named = by_name(self.stage.session, grouping, response)
        queries = len(next(iter(named.values())))
        self._response = {}
        for block in wide.blocks:
            if any(name in named for name in block.parameters):
                parts = {
                    name: named[name] if name in named else _zeros(wide, queries, shape)
                    for name, shape in zip(block.parameters, block.shapes, strict=True)
                }
                self._response[block.name] = block.matrix(parts)
        self._products = {name: torch.zeros_like(self.frozen[name]) for name in self.frozen}

    def passes(self, checkpoints: Sequence[int], title: str) -> list[Pass]:
        """The passes over a segment's checkpoints that end with q_F at its start."""
        if not self.couples:
            return []
        return [
            Pass(
                f"{title}: coupling to frozen parameters, step {step}",
                step,
                self._multiply(step),
                None,
                self._finish(len(checkpoints)) if step == checkpoints[-1] else None,
            )
            for step in checkpoints
        ]

    def _multiply(self, step: int) -> Callable[[Any, Tensor, int], None]:
        def accumulate(batch: Any, examples: Tensor, _: int) -> None:
            for found in self._gauss_newton(batch, examples, step):
                inner = torch.stack(
                    [found.blocks[name].dot(u) for name, u in self._response.items()]
                ).sum(0)
                for block in self.stage.wide.blocks:
                    if not any(name in self._products for name in block.parameters):
                        continue
                    product = block.tensors(found.blocks[block.name].weighted_sums(inner))
                    for name in set(product) & set(self._products):
                        self._products[name] += product[name]

        return accumulate

    def _gauss_newton(self, batch: Any, examples: Tensor, step: int) -> Iterable[ExampleGradients]:
        wide = self.stage.wide
        if self.curvature == "exact":
            return wide.gauss_newton_gradients(batch, examples)
        return [wide.fisher_gradients(batch, examples, self.seed + step)]

    def _finish(self, count: int) -> Callable[[], None]:
        def end() -> None:
            wide = self.stage.wide
            for name in self.stage.frozen:
                product = wide.reduce(self._products[name])
                self.frozen[name] = self.frozen[name] - product / (wide.num_train * count)
            self._products, self._response = {}, {}

        return end

    def _filled(self, named: Named, queries: int) -> Named:
        """With zeros for the parameters that later stages did not use."""
        wide = self.stage.wide
        return {
            name: named[name] if name in named else _zeros(wide, queries, shape)
            for block in wide.blocks
            for name, shape in zip(block.parameters, block.shapes, strict=True)
        }


def by_name(context: Session, grouping: str, by_unit: Mapping[str, Tensor]) -> Named:
    """[query, groups, rows, columns] by unit of curvature as [query, *shape] by parameter."""
    matrices = dict(by_unit)
    if grouping == "exact":
        whole = by_unit[WHOLE][..., 0, 0, :]
        parts = whole.split([block.size for block in context.blocks], dim=-1)
        matrices = {
            block.name: part.unflatten(-1, block.shape)
            for block, part in zip(context.blocks, parts, strict=True)
        }
    return {
        name: tensor
        for block in context.blocks
        for name, tensor in block.tensors(matrices[block.name]).items()
    }


def by_unit(context: Session, grouping: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`by_name`, for the parameters of ``context``."""
    return unit_matrices(grouping, {b.name: b.matrix(named) for b in context.blocks})


def _zeros(context: Session, queries: int, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(queries, *shape, dtype=context.dtype, device=context.device)
