"""Reverse sweeps: the adjoints of some queries carried back through the kept states of a stage of
training, and their scores."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from tda_lightning.edits import GraphEditSet
from tda_lightning.estimators.unrolled.adjoint import OptimizerAdjoint
from tda_lightning.estimators.unrolled.adjoints import Adjoints
from tda_lightning.estimators.unrolled.batch_statistics import read_statistics, statistics_names
from tda_lightning.estimators.unrolled.derivatives import (
    BatchDerivatives,
    activations_counted,
    batch_derivatives,
    is_out_of_memory,
    queries_at_once,
)
from tda_lightning.estimators.unrolled.graph_edits import edit_products
from tda_lightning.estimators.unrolled.round_scores import RoundScores
from tda_lightning.estimators.unrolled.step_states import StepState
from tda_lightning.estimators.unrolled.variants import Variants, add_changes
from tda_lightning.replay.prepared import require_task_loss
from tda_lightning.replay.run import Draws, Replay
from tda_lightning.runtime.module_state import load_tensors
from tda_lightning.session.stage import Stage
from tda_lightning.tasks import NodeBatch


class ReverseSweeps:
    """Carries the adjoints of some queries back through a stage of training.

    Args:
        number: of the stage, from 0.
        moving: layers whose running statistics move in it.
        resting: layers that read running statistics which an earlier stage moved.
        adjoints: of the queries, at the end of the stage or where an interrupted attribution left
            them.
        scores: of the round of queries.
        room: bytes for the graphs of batches on an accelerator.
        by_position: score the terms of an example's loss.

    Attributes:
        adjoint: of the optimizer's state.
        frozen: adjoints of parameters that the stage uses and does not train, [query, *shape].
        statistics: adjoints of running statistics, [query, features] by buffer name.
    """

    def __init__(
        self,
        number: int,
        stage: Stage,
        replay: Replay,
        moving: Mapping[str, _BatchNorm],
        resting: Mapping[str, _BatchNorm],
        adjoints: Adjoints,
        scores: RoundScores,
        *,
        room: int,
        by_position: bool,
    ) -> None:
        self.number, self.stage, self.session = number, stage, stage.session
        self.replay, self.scores = replay, scores
        self.moving, self.resting = moving, resting
        # Those of the engine: empty parameters have no gradient.
        trained = {name: adjoints.parameters[name] for name in self.session.engine.names}
        self.adjoint = OptimizerAdjoint(replay.trajectory, trained, adjoints.states)
        self.frozen = {name: adjoints.parameters[name] for name in stage.frozen}
        self.statistics = adjoints.statistics
        self._variants = Variants(replay, self.session)
        self._starts = sorted(replay.trajectory.checkpoints)[:-1]
        self._room, self._by_position = room, by_position
        self._queries = len(next(iter(trained.values())))
        self._chunk = 0  # how many queries go back together; settled by the first batch
        self._values = self._zeros()
        # From now on the module's weights are those of a replay, no checkpoint's.
        self.session.loaded.trajectory = None

    @property
    def adjoints(self) -> Adjoints:
        """Where the queries are."""
        parameters = {**self.adjoint.a, **self.frozen}
        return Adjoints(parameters, self.statistics, self.adjoint.states)

    def step(self, state: StepState) -> None:
        """Go back through one step."""
        replay, steps = self.replay, self.replay.trajectory.steps
        load_tensors(replay.module, state.parameters)
        u = self.adjoint.step(state)
        batches = list(zip(steps.batches(state.row), state.draws, state.counts, strict=True))
        losses = []
        with replay.as_trained():
            for name in self.frozen:
                replay.module.get_parameter(name).requires_grad_(True)
            for number, (examples, draws, counts) in reversed([*enumerate(batches)]):
                replay.see(state.row, number)
                if not self._chunk:
                    self._settle(state.row, examples, draws)
                load_tensors(replay.module, counts)
                graph = self._graph(state.row, examples, draws)
                losses.append(graph.loss)
                self._add(graph, examples, u)
                if isinstance(self.session.edits, GraphEditSet):
                    self._add_graph_edits(self.session.edits, state.row, examples, draws, u)
        first = next(iter(state.parameters.values()))
        found = sum(losses) / len(losses)
        require_task_loss(state.row + 1, found, state.loss, first.dtype, "Exact unrolling")
        if state.row in self._starts:
            self._end_segment(self._starts.index(state.row))

    def tensors(self) -> dict[str, Tensor]:
        """The adjoints and the scores so far, to resume from."""
        tensors = {**self.adjoints.tensors(), **self.scores.tensors()}
        tensors["stage"] = torch.tensor(self.number)
        tensors["open"] = self._values  # of a segment of which the last steps are only a part
        tensors["together"] = torch.tensor(self._chunk)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume from what :meth:`tensors` gave, adjoints and finished scores apart."""
        self._values = tensors["open"].to(self.session.device)
        self._chunk = int(tensors["together"])

    def growth(self) -> Tensor:
        """How many times longer the parameters' adjoint of each query has become on its way back
        from the end of training."""
        return self.scores.growth(self.adjoints.parameters)

    def finish(self) -> None:
        """Hand over the scores of a segment that was not walked to its start (last_steps)."""
        number = len(self._starts) - 1 - self.scores.segments_of(self.number)
        if number >= 0:
            self._end_segment(number)

    def _zeros(self) -> Tensor:
        edits = self.session.edits
        shape = (self._queries, self.session.num_train if edits is None else len(edits))
        return torch.zeros(shape, dtype=self.session.dtype, device=self.session.device)

    def _end_segment(self, segment: int) -> None:
        self.scores.add(self.number, segment, self._values)
        self._values = self._zeros()

    def _settle(self, row: int, examples: Tensor, draws: Draws | None) -> None:
        module, room = self.replay.module, self._room // 2
        try:
            with activations_counted([*module.parameters(), *module.buffers()]) as sizes:
                self._graph(row, examples, draws)
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            self._chunk = 1  # torch.func in the loss keeps its activations to itself
            return
        self._chunk = queries_at_once(self.session.device, room, sum(sizes))

    def _graph(self, row: int, examples: Tensor, draws: Draws | None) -> BatchDerivatives:
        replay, trajectory = self.replay, self.replay.trajectory
        batch = self._variants.fetched(examples, draws)
        trained = {name: replay.module.get_parameter(name) for name in trajectory.facts.parameters}
        frozen = {name: replay.module.get_parameter(name) for name in self.frozen}
        with read_statistics(self.resting) as read:
            return batch_derivatives(
                replay,
                self.session.task,
                trained,
                {**frozen, **read},
                self.moving,
                batch,
                examples,
                draws,
                int(trajectory.steps.accumulation[row]),
                self._variants.of(batch, examples, draws),
                self._by_position,
            )

    def _add(self, graph: BatchDerivatives, examples: Tensor, u: Mapping[str, Tensor]) -> None:
        """What a batch adds to scores and adjoints, for as many queries at once as fit."""
        start = 0
        while start < self._queries:
            rows = slice(start, min(start + self._chunk, self._queries))
            moving = statistics_names(self.moving)
            statistics = {name: self.statistics[name][rows].clone() for name in moving}
            try:
                hessian, parts, others = graph.products(
                    {name: v[rows] for name, v in u.items()}, statistics
                )
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or self._chunk == 1:
                    raise
                self._chunk = (self._chunk + 1) // 2
                continue
            for name, c in statistics.items():
                self.statistics[name][rows] = c
            adjoints = {**self.adjoint.a, **self.frozen, **self.statistics}
            for name, product in hessian.items():
                adjoints[name][rows] += product
            self._add_scores(rows, examples.to(self.session.device), parts, others)
            start = rows.stop

    def _add_scores(self, rows: slice, columns: Tensor, parts: Tensor, others: Tensor) -> None:
        """Add the batch's share of dm/dw, of its examples and of what edits put in their places."""
        if self._by_position:
            self.scores.add_tokens(self.number, self._queries, rows, columns, parts)
            parts = parts.sum(2)
        values = self._values[rows]
        if self.session.edits is None:
            values.index_add_(1, columns, parts.to(values), alpha=-1)
            return
        if isinstance(self.session.edits, GraphEditSet):
            return
        own, other = self._variants.changes(columns)
        add_changes(values, own, parts[:, [change.position for change in own]])
        add_changes(values, other, others)

    def _add_graph_edits(
        self,
        edits: GraphEditSet,
        row: int,
        examples: Tensor,
        draws: Draws | None,
        u: Mapping[str, Tensor],
    ) -> None:
        """Add what edits of the graph change in this batch's gradient."""
        batch = self._variants.fetched(examples, draws)
        assert isinstance(batch, NodeBatch)
        found = edit_products(edits, self.replay, self.session.task, batch, examples, draws, u)
        self._values -= found.to(self._values) / int(self.replay.trajectory.steps.accumulation[row])
