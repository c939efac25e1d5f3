"""Reverse sweeps: the adjoints of some queries carried back through the kept states, and their
scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from tda_lightning.edits import GraphEditSet, Term
from tda_lightning.estimators.unrolled.adjoint import OptimizerAdjoint
from tda_lightning.estimators.unrolled.batch_statistics import measurement_adjoints
from tda_lightning.estimators.unrolled.derivatives import (
    BatchDerivatives,
    activations_counted,
    batch_derivatives,
    is_out_of_memory,
    queries_at_once,
)
from tda_lightning.estimators.unrolled.directions import Directions
from tda_lightning.estimators.unrolled.graph_edits import edit_products
from tda_lightning.estimators.unrolled.step_states import StepState
from tda_lightning.optimizers import rule_of
from tda_lightning.replay.prepared import require_task_loss
from tda_lightning.replay.run import Draws, Replay
from tda_lightning.runtime.module_state import load_tensors
from tda_lightning.runtime.random_states import unchanged_randomness
from tda_lightning.session.session import Session, relabelled
from tda_lightning.tasks import NodeBatch


class _Change(NamedTuple):
    """A term of an edit of the example at a position of a batch."""

    position: int
    column: int
    term: Term


class ReverseSweeps:
    """Carries the adjoints of some queries back.

    Attributes:
        adjoint: of the optimizer's state.
        statistics: adjoints of running statistics, [query, features] by buffer name.
        by_token: [query, train, position] when asked for; None before the first step.
        directions: what goes back instead of the queries; None: they go back themselves.
        first_query: number of the first of the queries.
    """

    def __init__(
        self,
        replay: Replay,
        session: Session,
        layers: Mapping[str, _BatchNorm],
        adjoint: OptimizerAdjoint,
        statistics: dict[str, Tensor],
        segments: Sequence[tuple[int, int]],
        first_query: int,
        room: int,
        by_position: bool,
        directions: Directions | None = None,
    ) -> None:
        self.directions = directions
        self.replay, self.session, self.layers = replay, session, layers
        self.adjoint, self.statistics = adjoint, statistics
        self.first_query = first_query
        self.by_token: Tensor | None = None
        self._starts = [start for start, _ in segments]
        self._room, self._by_position = room, by_position
        self._queries = len(next(iter(adjoint.a.values())))
        self._chunk = 0  # how many queries go back together; settled by the first batch
        self._finished: dict[int, Tensor] = {}
        self._values = self._zeros()
        self._lengths = self._adjoint_lengths()  # at the end of training

    @staticmethod
    def open(
        replay: Replay,
        session: Session,
        layers: Mapping[str, _BatchNorm],
        segments: Sequence[tuple[int, int]],
        queries: range,
        tensors: Mapping[str, Tensor] | None,
        *,
        room: int,
        by_position: bool,
        tolerance: float = 0.0,
    ) -> ReverseSweeps:
        """Some queries at the end of training, or where an interrupted attribution left them.

        Args:
            segments: the rows that scores are split by.
            tensors: what :meth:`tensors` gave; None for the end of training.
            room: bytes for the graphs of batches on an accelerator.
            by_position: score the terms of an example's loss.
            tolerance: how far a query may be from the directions that go back in its place; 0: it
                goes back itself.
        """
        trajectory, first = replay.trajectory, queries.start
        directions = None if tensors is None else Directions.restored(tensors)
        if tensors is None:
            session.load(trajectory.last_step)
            gradients = _parameter_gradients(session, queries)
            statistics = _statistics_gradients(session, layers, queries)
            if tolerance and (found := Directions.of({**gradients, **statistics}, tolerance)):
                directions, carried = found
                gradients = {name: carried[name] for name in gradients}
                statistics = {name: carried[name] for name in statistics}
            adjoint = OptimizerAdjoint(trajectory, gradients)
        else:
            device = session.device
            grouped = {
                kind: {
                    name.removeprefix(f"{kind}."): tensor.to(device)
                    for name, tensor in tensors.items()
                    if name.startswith(f"{kind}.")
                }
                for kind in ("a", "c", *(f"states.{key}" for key in rule_of(trajectory).states))
            }
            states: dict[str, dict[str, Tensor]] = {}
            for key in rule_of(trajectory).states:
                for name, tensor in grouped[f"states.{key}"].items():
                    states.setdefault(name, {})[key] = tensor
            adjoint, statistics = OptimizerAdjoint(trajectory, grouped["a"], states), grouped["c"]
        reverse = ReverseSweeps(
            replay,
            session,
            layers,
            adjoint,
            statistics,
            segments,
            first,
            room,
            by_position,
            directions,
        )
        if tensors is not None:
            reverse.restore(tensors)
        # From now on the module's weights are those of a replay, no checkpoint's.
        session.loaded.trajectory = None
        return reverse

    def step(self, state: StepState) -> None:
        """Go back through one step."""
        replay, steps = self.replay, self.replay.trajectory.steps
        load_tensors(replay.module, state.parameters)
        u = self.adjoint.step(state)
        batches = list(zip(steps.batches(state.row), state.draws, state.counts, strict=True))
        losses = []
        with replay.as_trained():
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
        tensors = {f"a.{name}": tensor for name, tensor in self.adjoint.a.items()}
        tensors |= {f"c.{name}": tensor for name, tensor in self.statistics.items()}
        for name, states in self.adjoint.states.items():
            tensors |= {f"states.{key}.{name}": tensor for key, tensor in states.items()}
        tensors |= {f"scores.{number}": values for number, values in self._finished.items()}
        tensors["open"] = self._values  # of a segment of which the last steps are only a part
        tensors["together"] = torch.tensor(self._chunk)
        tensors["lengths"] = self._lengths
        if self.directions is not None:
            tensors |= self.directions.tensors()
        return tensors if self.by_token is None else {**tensors, "by_token": self.by_token}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume from what :meth:`tensors` gave."""
        for name, tensor in tensors.items():
            if name.startswith("scores."):
                self._values = tensor.to(self.session.device)
                self._end_segment(int(name.removeprefix("scores.")))
        self._values = tensors["open"].to(self.session.device)
        self._chunk = int(tensors["together"])
        self._lengths = tensors.get("lengths", self._lengths)
        if "by_token" in tensors:
            self.by_token = tensors["by_token"].to(self.session.device)

    def growth(self) -> Tensor:
        """How many times longer the parameters' adjoint of each query has become on its way back:
        [query]; of directions in their place, where there are such."""
        return self._adjoint_lengths() / self._lengths.clamp(min=torch.finfo(torch.float64).tiny)

    def _adjoint_lengths(self) -> Tensor:
        rows = [a.double().reshape(len(a), -1) for a in self.adjoint.a.values()]
        squares = [row.square().sum(1).cpu() for row in rows]
        return torch.stack(squares).sum(0).sqrt()

    def finish(self) -> None:
        """Hand over the scores of a segment that was not walked to its start (last_steps)."""
        number = len(self._starts) - 1 - len(self._finished)
        if number >= 0:
            self._end_segment(number)

    def add_tokens_to(self, by_token: Tensor | None) -> Tensor | None:
        """The scores of single terms of all queries, [query, train, position], with these; None
        where none are asked for."""
        if self.by_token is None:
            return by_token
        if by_token is None:
            shape = (self.session.num_query, *self.by_token.shape[1:])
            by_token = self.by_token.new_zeros(shape)
        own = self.by_token if self.directions is None else self.directions.scores(self.by_token)
        by_token[self.first_query : self.first_query + len(own)] = own
        return by_token

    def _zeros(self) -> Tensor:
        edits = self.session.edits
        shape = (self._queries, self.session.num_train if edits is None else len(edits))
        return torch.zeros(shape, dtype=self.session.dtype, device=self.session.device)

    def _end_segment(self, number: int) -> None:
        columns = torch.arange(self._values.shape[1])
        values = self._values
        if self.directions is not None:
            values = self.directions.add(values)
        self.session.scores.add(number, columns, values, self.first_query)
        self._finished[number] = self._values
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
        batch = self._fetched(examples, draws, {})
        variants = [
            (self._variant(batch, examples, draws, terms), list(terms))
            for terms in _variants(self._changes(examples)[1])
        ]
        trained = {name: replay.module.get_parameter(name) for name in trajectory.facts.parameters}
        return batch_derivatives(
            replay,
            self.session.task,
            trained,
            self.layers,
            batch,
            examples,
            draws,
            int(trajectory.steps.accumulation[row]),
            variants,
            self._by_position,
        )

    def _changes(self, examples: Tensor) -> tuple[list[_Change], list[_Change]]:
        """What the edits of a batch's examples take: their own gradients, and those of other
        examples or labels in their places."""
        own: list[_Change] = []
        other: list[_Change] = []
        edits = self.session.edits
        if edits is None or isinstance(edits, GraphEditSet):
            return own, other
        for position, index in enumerate(examples.tolist()):
            for number in edits.positions_of(index):
                column, term = edits.terms[number]
                itself = term.index == index and not term.labels
                (own if itself else other).append(_Change(position, column, term))
        return own, other

    def _fetched(
        self, examples: Tensor, draws: Draws | None, replaced: Mapping[int, object]
    ) -> object:
        """The batch, with other examples at some positions."""
        replay = self.replay
        with unchanged_randomness():
            if not replaced:
                if draws is None:
                    return replay.fetch(examples)
                return replay.fetched(examples, draws.fetch)[0]
            if draws is not None:
                draws.fetch.restore()
            items = [
                replaced[position] if position in replaced else replay.source.dataset[index]
                for position, index in enumerate(examples.tolist())
            ]
            return replay.source.placed(replay.source.join(items), replay.module, ())

    def _variant(
        self, batch: object, examples: Tensor, draws: Draws | None, terms: Mapping[int, Term]
    ) -> object:
        """The batch with the examples and labels of ``terms`` at their positions."""
        dataset = self.replay.source.dataset
        replaced = {
            position: term.example if term.index is None else dataset[term.index]
            for position, term in terms.items()
            if term.index != int(examples[position])
        }
        if replaced:
            batch = self._fetched(examples, draws, replaced)
        labels = {position: term.labels[0] for position, term in terms.items() if term.labels}
        return relabelled(self.session.task, batch, labels) if labels else batch

    def _add(self, graph: BatchDerivatives, examples: Tensor, u: Mapping[str, Tensor]) -> None:
        """What a batch adds to scores and adjoints, for as many queries at once as fit."""
        start = 0
        while start < self._queries:
            rows = slice(start, min(start + self._chunk, self._queries))
            statistics = {name: c[rows].clone() for name, c in self.statistics.items()}
            try:
                hessian, parts, others = graph.products(
                    {name: v[rows] for name, v in u.items()}, statistics
                )
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or self._chunk == 1:
                    raise
                self._chunk = (self._chunk + 1) // 2
                continue
            for name, product in hessian.items():
                self.adjoint.a[name][rows] += product
            for name, c in statistics.items():
                self.statistics[name][rows] = c
            self._add_scores(rows, examples.to(self.session.device), parts, others)
            start = rows.stop

    def _add_scores(self, rows: slice, columns: Tensor, parts: Tensor, others: Tensor) -> None:
        """Add the batch's share of dm/dw, of its examples and of what edits put in their places."""
        if self._by_position:
            self._add_tokens(rows, columns, parts)
            parts = parts.sum(2)
        values = self._values[rows]
        if self.session.edits is None:
            values.index_add_(1, columns, parts.to(values), alpha=-1)
            return
        if isinstance(self.session.edits, GraphEditSet):
            return
        own, other = self._changes(columns)
        # In the order of the variants.
        other = [change for terms in _variants(other) for change in _of_variant(other, terms)]
        for changes, products in ((own, parts[:, [c.position for c in own]]), (other, others)):
            if changes:
                signs = torch.tensor([c.term.sign for c in changes]).to(values)
                places = torch.tensor([c.column for c in changes], device=values.device)
                values.index_add_(1, places, signs * products.to(values), alpha=-1)

    def _add_graph_edits(
        self,
        edits: GraphEditSet,
        row: int,
        examples: Tensor,
        draws: Draws | None,
        u: Mapping[str, Tensor],
    ) -> None:
        """Add what edits of the graph change in this batch's gradient."""
        batch = self._fetched(examples, draws, {})
        assert isinstance(batch, NodeBatch)
        found = edit_products(edits, self.replay, self.session.task, batch, examples, draws, u)
        self._values -= found.to(self._values) / int(self.replay.trajectory.steps.accumulation[row])

    def _add_tokens(self, rows: slice, columns: Tensor, parts: Tensor) -> None:
        length = parts.shape[2]
        if self.by_token is None:
            shape = (self._queries, self.session.num_train, length)
            self.by_token = parts.new_zeros(shape)
        if length > self.by_token.shape[2]:  # sequences of another batch may be longer
            longer = length - self.by_token.shape[2]
            self.by_token = torch.nn.functional.pad(self.by_token, (0, longer))
        self.by_token[rows, :, :length].index_add_(1, columns, parts, alpha=-1)


def _variants(changes: Sequence[_Change]) -> list[dict[int, Term]]:
    """Terms by position, in as few batches as hold one at each position."""
    variants: list[dict[int, Term]] = []
    for change in changes:
        free = (terms for terms in variants if change.position not in terms)
        terms = next(free, None)
        if terms is None:
            terms = {}
            variants.append(terms)
        terms[change.position] = change.term
    return variants


def _of_variant(changes: Sequence[_Change], terms: Mapping[int, Term]) -> list[_Change]:
    """The changes that a variant holds, in its order."""
    return [
        next(c for c in changes if c.position == position and c.term is term)
        for position, term in terms.items()
    ]


def _parameter_gradients(session: Session, queries: range) -> dict[str, Tensor]:
    """Gradients of the measurements: [query, *shape] by parameter."""
    parts: dict[str, list[Tensor]] = {}
    for batch, examples in session.queries(queries.start, queries.stop):
        gradients = session.measurement_gradients(batch, examples).blocks
        for block in session.blocks:
            for name, tensor in block.tensors(gradients[block.name].dense(slice(None))).items():
                parts.setdefault(name, []).append(tensor.detach())
    return {name: torch.cat(tensors).to(session.dtype) for name, tensors in parts.items()}


def _statistics_gradients(
    session: Session, layers: Mapping[str, _BatchNorm], queries: range
) -> dict[str, Tensor]:
    """Derivatives of the measurements with respect to running statistics: [query, features]."""
    if not layers:
        return {}

    def measure(query: int) -> Tensor:
        ((batch, examples),) = session.queries(queries[query], queries[query] + 1)
        with torch.enable_grad():
            return session.measurement(session.module, batch, examples).sum()

    return measurement_adjoints(measure, layers, len(queries))
