"""What an estimator works with: the model, the recorded run, walks over the training set, and the
place where scores go.

An estimator is a method that runs from top to bottom over one of these. Which processes share the
work, on which devices, with which progress bar, and whether it is the real run or a dry run that
only measures, is known to the session alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

from tda_lightning.edits import EditedGraphs, EditSet, GraphEditSet
from tda_lightning.gradients import Block, ExampleGradients, Gradient, GradientEngine
from tda_lightning.gradients.rows import touched_rows
from tda_lightning.measurements import Measurement
from tda_lightning.records.errors import NonFiniteError, TrajectoryMismatchError
from tda_lightning.records.example_use import example_weights
from tda_lightning.records.score_sinks import ScoreSink
from tda_lightning.records.trajectory import Checkpoint, Trajectory
from tda_lightning.runtime import conditions
from tda_lightning.runtime.free_memory import free_memory
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.origins import inherit
from tda_lightning.runtime.processes import rank_and_world
from tda_lightning.runtime.structures import moved
from tda_lightning.session.edited_graphs import edit_gradients
from tda_lightning.session.losses import Losses
from tda_lightning.session.moments import show
from tda_lightning.session.pace import Pace
from tda_lightning.session.parts import are_parts, own_indices, part_indices
from tda_lightning.session.queries import QueryGradients
from tda_lightning.session.query_rows import QueryRows
from tda_lightning.session.totals import Totals
from tda_lightning.tasks import AttributionTask
from tda_lightning.tasks.recorded_noise import RecordedNoise

T = TypeVar("T")
Span = tuple[int, int]  # the steps start < t <= stop
# On a CPU, a layer's output of more scalars than these does not stay near the processor from one
# operation to the next, and above twice as many glibc asks the kernel for new pages every time.
_OUTPUT_SCALARS = 1 << 22
_FEWEST = 32  # examples that matrix products want together
_EDIT_BYTES = 1 << 27  # of the gradients of edits that are held at once


@dataclass
class LoadedCheckpoint:
    """Which checkpoint a module holds; stages that train one module share this record."""

    trajectory: Trajectory | None = None
    step: int | None = None


@dataclass
class Batch:
    """Some training examples, with the weights of a checkpoint in place.

    Attributes:
        data: the batch on the module's device.
        examples: indices in the training set, int64 [batch].
        position: of the batch in the order that was asked for.
        columns: of the scores that they belong to, int64 [batch], on the host.
        used_as: the training examples whose use in training they have, int64 [batch], on the host;
            -1 for an average one.
        signs: what their gradients count by, [batch]; None: 1.
        noise: what the training loss drew for this batch of the run; None: seeded draws.
        places: positions among all that ``walk_columns`` goes through, int64 [batch]; None: those
            of the examples.
    """

    session: Session
    data: object
    examples: Tensor
    position: int
    columns: Tensor
    used_as: Tensor
    signs: Tensor | None = None
    noise: RecordedNoise | None = None
    places: Tensor | None = None

    def weights(self, used: Span) -> Tensor | None:
        """How much each was used in the steps of ``used``, [batch]; None: all evenly."""
        return self.session.weights(self.used_as, used)

    def curvature_weights(self, used: Span | None) -> Tensor | None:
        """What each counts by in the curvature over the steps of ``used``, [batch]; None: 1."""
        return self.session.curvature_weights(self.used_as, used)

    @cached_property
    def gradients(self) -> dict[str, Gradient]:
        """Per-example gradients of the training loss, factored, by block."""
        return self.session.train_gradients(self.data, self.examples, self.noise).blocks

    @cached_property
    def measurement_gradients(self) -> dict[str, Gradient]:
        """The same of the measurement; the very objects of ``gradients`` where it is the loss, of
        which no noise is drawn."""
        if self.session.measures_loss and not self.session.measured_noise:
            return self.gradients
        return self.session.measurement_gradients(self.data, self.examples).blocks


@dataclass
class Session:
    """One stage of training, open for attribution.

    Attributes:
        module: the model; its weights are those of the checkpoint loaded last.
        task: the training loss and the measurement.
        trajectory: the recorded run, with what is kept beside it (``curvature``, ``features``,
            ``unfinished``).
        engine: per-example gradients of the parameters that are attributed.
        scores: where scores are added.
        num_train: training examples.
        num_query: queries.
        examples: the training set.
        queries: loads the queries from ``start`` to ``stop``, as (batch, query indices) on the
            module's device.
        cache_key: digest of everything that curvature at some steps depends on besides its own
            settings: weights, data, task and code.
        self_influence: whether training examples are to be scored for themselves.
        batch_size: examples per batch, at most.
        loaded: the checkpoint whose weights the module holds.
        pace: shows progress; in a dry run it shortens every walk and measures it.
        whole: the same with whole queries, where they are taken apart.
        prefix: of the titles of walks, where a run has several stages.
        edits: what the columns are about; None: the removal of each training example.
        asked: what is measured of the queries; None: the task's own measurement.
        by_token: whether the terms of training examples are scored too.
        rows: the tokens of queries, where these are taken apart: each is then a query of its own,
            and ``num_query`` counts them.
        noise: what kinds of random numbers the training loss draws (``watching_noise``).
        measured_noise: the same of the measurement.
        recorded_draws: whether the gradients of the training loss are those of the run's own draws.
        num_parts: parts of the measurement that are scored as queries of their own, part after part
            (the timesteps of a diffusion model); 1: none.
        no_recorded_draws: why not, where the estimator asked for them.
        check_seconds: that planning and checking losses and gradients took.
        draws: over how many draws of them losses and their gradients are averaged.
    """

    module: nn.Module
    task: AttributionTask
    trajectory: Trajectory
    engine: GradientEngine
    scores: ScoreSink
    num_train: int
    num_query: int
    examples: ExampleSource
    queries: Callable[[int, int], Iterable[tuple[object, Tensor]]]
    cache_key: Callable[[Sequence[int]], str]
    self_influence: bool = True
    batch_size: int = 256
    loaded: LoadedCheckpoint = field(default_factory=LoadedCheckpoint)
    pace: Pace = field(default_factory=Pace)
    prefix: str = ""
    edits: EditSet | GraphEditSet | None = None
    asked: Measurement | None = None
    by_token: bool = False
    rows: QueryRows | None = None
    whole: Session | None = None
    noise: frozenset[str] = frozenset()
    measured_noise: frozenset[str] = frozenset()
    recorded_draws: bool = False
    check_seconds: float = 0.0
    no_recorded_draws: str | None = None
    draws: int = 1
    num_parts: int = 1
    _checkpoints: dict[int, Checkpoint] = field(default_factory=dict)
    _weights: dict[Span, Tensor | None] = field(default_factory=dict)
    _totals: Totals = field(default_factory=Totals)

    @property
    def blocks(self) -> list[Block]:
        """The units of parameters that the engine's gradients come in, mostly layers."""
        return self.engine.blocks

    @property
    def num_parameters(self) -> int:
        """Parameters that are attributed."""
        return sum(block.size for block in self.blocks)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the scores: float64 for a module in float64, else float32."""
        own = next(self.module.parameters()).dtype
        return own if own == torch.float64 else torch.float32

    @property
    def walk_size(self) -> int:
        """Examples that a walk in no given order takes at a time: ``batch_size``, or fewer on a
        CPU where the outputs of a layer would be so large that more examples take longer each.

        Nothing but time and memory depends on it, unless the loss draws noise for whole batches.
        """
        if self.device.type != "cpu" or self.noise:
            return self.batch_size
        return min(self.batch_size, max(_FEWEST, _OUTPUT_SCALARS // self.engine.widest))

    @property
    def measures_loss(self) -> bool:
        """Whether the measurement is the training loss, so that one pass serves both."""
        return self.asked is None and self.task.measures_loss

    @property
    def losses(self) -> Losses:
        """The functions whose gradients are taken."""
        return Losses(self.task, self.asked, self.rows, self.draws)

    @property
    def num_processes(self) -> int:
        """Processes that share the walks."""
        return rank_and_world()[1]

    @property
    def loaded_step(self) -> int:
        """The checkpoint whose weights the module holds."""
        if self.loaded.trajectory is not self.trajectory or self.loaded.step is None:
            raise RuntimeError("No checkpoint has been loaded yet: call load(step) first.")
        return self.loaded.step

    def load(self, step: int) -> None:
        """Put the weights and buffers of the checkpoint at ``step`` into the module.

        The module's steps see the epoch and step that led there. The weights stay in memory: some
        estimators go back and forth between checkpoints.
        """
        show(self.module, self.trajectory, step - 1, source=self.examples)
        if self.loaded.trajectory is self.trajectory and self.loaded.step == step:
            return
        if step not in self._checkpoints:
            recorded = self.trajectory.checkpoints[step]
            self._checkpoints[step] = Checkpoint(step, recorded.parameters, recorded.buffers)
        checkpoint = self._checkpoints[step]
        own = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        with torch.no_grad():
            for name, value in {**checkpoint.buffers, **checkpoint.parameters}.items():
                _require_like(own.get(name), value, name, step)
                own[name].copy_(value)
        self.loaded.trajectory, self.loaded.step = self.trajectory, step

    @property
    def loaded_checkpoints(self) -> list[int]:
        """Steps of the checkpoints that have been loaded so far and are in memory."""
        return list(self._checkpoints)

    def forget(self, step: int) -> None:
        """Let go of a checkpoint that :meth:`load` keeps in memory."""
        self._checkpoints.pop(step, None)

    def walk(
        self, title: str, step: int | None = None, order: Sequence[Sequence[int]] | None = None
    ) -> Iterator[Batch]:
        """The training set, batch by batch; of several processes, each has its share.

        Args:
            title: a few words for the progress bar.
            step: load the weights of this checkpoint first; None: those in place.
            order: batches of example indices; None: every example once, in batches of
                ``walk_size``.
        """
        rank, world = rank_and_world()
        if order is None:
            # Small enough that no process goes without a batch.
            order = self.examples.batches(size=min(self.walk_size, max(1, self.num_train // world)))
        yield from self._walked(title, step, list(enumerate(order))[rank::world])

    def walk_whole(self, title: str, step: int, order: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Batches of example indices at a checkpoint, all of them in every process."""
        yield from self._walked(title, step, list(enumerate(order)))

    def _walked(
        self, title: str, step: int | None, own: Sequence[tuple[int, Sequence[int]]]
    ) -> Iterator[Batch]:
        if step is not None:
            self.load(step)
        title = self.prefix + title
        with conditions.noted():
            for position, indices, data in self.pace.walk(title, self.examples, self.module, own):
                yield Batch(self, data, moved(indices, self.device), position, indices, indices)

    def walk_columns(
        self, title: str, step: int | None = None, order: Sequence[Sequence[int]] | None = None
    ) -> Iterator[Batch]:
        """The examples whose gradients are scored: :meth:`walk`, or the examples of the edits that
        are asked about.

        Args:
            order: batches of positions as :meth:`uses` gives them.
        """
        if self.edits is None:
            yield from self.walk(title, step, order)
            return
        if isinstance(self.edits, GraphEditSet):
            yield from self._walk_graph_edits(self.edits, title, step, order)
            return
        rank, world = rank_and_world()
        edits = self.edits
        if order is None:
            size = min(self.walk_size, max(1, len(edits.terms) // world))
            order = edits.source.batches(size=size)
        if step is not None:
            self.load(step)
        own = list(enumerate(order))[rank::world]
        title = self.prefix + title
        for position, places, data in self.pace.walk(title, edits.source, self.module, own):
            rows = edits.rows(places, self.num_train)
            yield Batch(
                self,
                relabelled(self.task, data, rows.labels) if rows.labels else data,
                rows.examples.to(self.device),
                position,
                rows.columns,
                rows.used_as,
                rows.signs.to(self.device, self.dtype),
                places=places,
            )

    def _walk_graph_edits(
        self,
        edits: GraphEditSet,
        title: str,
        step: int | None,
        order: Sequence[Sequence[int]] | None,
    ) -> Iterator[Batch]:
        rank, world = rank_and_world()
        source = edits.column_source
        if order is None:
            fitting = _EDIT_BYTES // self.gradient_bytes(1)
            size = max(1, min(fitting, self.batch_size, len(edits) // world))
            order = [range(at, min(at + size, len(edits))) for at in range(0, len(edits), size)]
        if step is not None:
            self.load(step)
        own = list(enumerate(order))[rank::world]
        title = self.prefix + title
        for position, columns, data in self.pace.walk(title, source, self.module, own):
            # Every step uses the graph, so an edit counts as often as an average example.
            nobody = torch.full_like(columns, -1)
            yield Batch(
                self, data, moved(columns, self.device), position, columns, nobody, places=columns
            )

    def uses(self, index: int) -> list[int]:
        """What :meth:`walk_columns` reads for a use of training example ``index``: itself, or the
        terms of the edits that change it."""
        return [index] if self.edits is None else self.edits.positions_of(index)

    def example_weights(self, used: Span) -> Tensor | None:
        """How much each training example was used in the steps of ``used``, relative to even use,
        float64 [train]; None: all evenly, or unknown
        (:func:`~tda_lightning.records.example_use.example_weights`)."""
        if used not in self._weights:
            run, share = self.trajectory, self.task.share
            self._weights[used] = example_weights(run, *used, self.num_train, share)
        return self._weights[used]

    def weights(self, examples: Tensor, used: Span) -> Tensor | None:
        """:meth:`example_weights` of some training examples; -1 stands for an average one."""
        weights = self.example_weights(used)
        if weights is None:
            return None
        with_average = torch.cat([weights, torch.ones_like(weights[:1])])  # their mean is 1
        return with_average[examples.cpu()].to(self.device, self.dtype)

    def data_weights(self, examples: Tensor) -> Tensor | None:
        """What the loss of some training examples was multiplied by in a what-if run, [batch];
        None: 1."""
        weights = self.trajectory.data_weights
        return None if weights is None else weights[examples.cpu()].to(self.device, self.dtype)

    def curvature_weights(self, examples: Tensor, used: Span | None) -> Tensor | None:
        """What some training examples count by in the curvature of the loss that the steps of
        ``used`` descended, [batch]: their weights in it times how much they were used; None: 1."""
        weights = self.data_weights(examples)
        uses = None if used is None else self.weights(examples, used)
        return uses if weights is None else weights if uses is None else weights * uses

    def add(
        self,
        segment: int | None,
        batch: Batch,
        values: Tensor,
        first_query: int = 0,
        used: Span | None = None,
        sink: ScoreSink | None = None,
    ) -> None:
        """Add the scores of a batch of :meth:`walk_columns`, [query, batch].

        Args:
            used: each example counts by how much these steps used it; None: as ``values`` has it.
            sink: where they go; None: to ``scores``.
        """
        if used is not None and (weights := batch.weights(used)) is not None:
            values = values * weights
        if batch.signs is not None:
            values = values * batch.signs
        try:
            (self.scores if sink is None else sink).add(segment, batch.columns, values, first_query)
        except NonFiniteError:
            conditions.settle()  # a loss tells more than the scores that follow from it
            raise

    def loop(
        self, title: str, items: Iterable[T], total: int | None = None, memory: int = 0
    ) -> Iterator[T]:
        """``items`` with a progress bar: for work that is no walk over the training set.

        Args:
            title: a few words for the progress bar.
            items: what to loop over. The loop may end early.
            total: how many there are at most; their length by default.
            memory: bytes of main memory that are filled when the loop is over.
        """
        return self.pace.loop(self.prefix + title, items, total, memory)

    def query_rounds(self, bytes_each: int, budget: int | None = None) -> Iterator[tuple[int, int]]:
        """Ranges of queries that fit into memory together, in every process.

        Args:
            bytes_each: what a query takes; see :meth:`gradient_bytes`.
            budget: bytes for all of them; by default a quarter of the free memory.
        """
        fitting = max(1, (memory_budget() if budget is None else budget) // bytes_each)
        # Processes share the queries of a round, so all of them need the same rounds.
        fitting = int(self.gathered(torch.tensor([fitting])).min())
        rounds = -(-self.num_query // fitting)
        bounds = [number * self.num_query // rounds for number in range(rounds + 1)]
        return self.pace.rounds(list(zip(bounds, bounds[1:], strict=False)))

    def gradient_bytes(self, copies: int) -> int:
        """Bytes of so many dense gradients."""
        return copies * self.num_parameters * self.dtype.itemsize

    def factored_bytes(self, copies: int) -> int:
        """The same where a block whose rows are looked up takes the rows that an example touches
        alone, with room for queries that touch twice as many as the first training examples."""
        scalars = 0
        for block in self.blocks:
            rows = self.engine.rows_each.get(block.name)
            # Values, and with them the example and the row.
            own = block.size if rows is None else 2 * rows * (block.shape[2] + 4)
            scalars += min(own, block.size)
        return copies * scalars * self.dtype.itemsize

    def restricted(self, rows: Mapping[str, Tensor]) -> Session:
        """The same session with some rows alone, ascending, of blocks whose rows are looked up.

        Nothing is lost where the other rows meet no query: they take no part in any score.
        """
        return replace(self, engine=self.engine.restricted(rows))

    def query_rows(self, first: int, last: int) -> dict[str, Tensor]:
        """Which rows the queries ``first`` to ``last`` touch at the weights in place, of blocks
        whose rows are looked up."""
        return touched_rows(
            self.measurement_gradients(batch, indices).blocks
            for batch, indices in self.queries(first, last)
        )

    def whole_queries(self) -> Iterator[tuple[object, Tensor]]:
        """All queries as (batch, indices), each with its whole measurement."""
        for batch, indices in self.queries(0, self.num_query // self.num_parts):
            yield batch, own_indices(indices)

    def query_gradients(self, first: int, last: int) -> QueryGradients:
        """Measurement gradients of the queries ``first`` to ``last`` at the weights in place."""
        return QueryGradients.of(
            self.measurement_gradients(batch, indices).blocks
            for batch, indices in self.queries(first, last)
        )

    def batches(self, order: Iterable[Sequence[int]]) -> Iterator[tuple[object, Tensor]]:
        """Training examples by their indices, as (batch, indices) on the module's device, the same
        in every process and without a progress bar."""
        for chosen in order:
            indices = torch.as_tensor(chosen, dtype=torch.int64)
            yield self.examples.batch(indices, self.module), indices.to(self.device)

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows, ascending, that any process has."""
        if rank_and_world()[1] == 1:
            return rows
        parts: list[Tensor] = [rows] * rank_and_world()[1]
        torch.distributed.all_gather_object(parts, rows.cpu())
        united: Tensor = torch.cat(parts).unique()
        return united.to(rows.device)

    def reduce(self, values: Tensor) -> Tensor:
        """Sum over processes."""
        if rank_and_world()[1] == 1:
            return values
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    def add_self_influence(
        self, examples: Tensor, values: Tensor, used: Span | None = None
    ) -> None:
        """Add to the self-influence of ``examples`` [batch]; ``used``: see :meth:`add`."""
        if used is not None and (weights := self.weights(examples, used)) is not None:
            values = values * weights
        own = self._totals.self_influence
        if own is None:
            own = torch.zeros(self.num_train, dtype=self.dtype, device=self.device)
            self._totals.self_influence = own
        own.index_add_(0, examples, values.to(own))

    def on_parameters(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Matrices [query, groups, rows, columns] by block as tensors [query, *shape] by
        parameter."""
        tensors: dict[str, Tensor] = {}
        for block in self.blocks:
            for name, own in block.tensors(matrices[block.name]).items():
                if block.chosen is not None:  # the other rows meet no query
                    shape = self.module.get_parameter(name).shape
                    whole = own.new_zeros(len(own), *shape)
                    whole[:, block.chosen] = own
                    own = whole
                tensors[name] = own
        return tensors

    def add_terms(
        self,
        batch: Batch,
        directions: Mapping[str, Tensor],
        first_query: int = 0,
        factor: float | Tensor = 1.0,
        used: Span | None = None,
    ) -> None:
        """Add the scores of the single terms (tokens) of a batch of :meth:`walk_columns` at the
        weights in place: ``factor`` times the inner products of their gradients with
        ``directions``, which are what scores multiply gradients with.

        Args:
            directions: [query, *shape] by parameter.
            factor: a number, or one for each example [batch].
            used: see :meth:`add`.
        """
        if self.rows is not None:
            summed = {name: self.rows.summed(own, first_query) for name, own in directions.items()}
            directions = {name: own for name, (own, _) in summed.items()}
            first_query = next(first for _, first in summed.values())
        values = self._term_products(batch, directions)
        factors = torch.as_tensor(factor, dtype=values.dtype, device=values.device)
        factors = factors.expand(len(batch.columns))
        if used is not None and (weights := batch.weights(used)) is not None:
            factors = factors * weights
        if batch.signs is not None:
            factors = factors * batch.signs
        total = self._term_scores(values.shape[2])
        rows = total[first_query : first_query + len(values), :, : values.shape[2]]
        columns = moved(batch.columns, self.device)
        rows.index_add_(1, columns, values * factors[:, None])

    def add_term_scores(self, values: Tensor, first_query: int = 0) -> None:
        """Add scores of the single terms of all training examples, [query, train, position]."""
        if self.rows is not None:
            values, first_query = self.rows.summed(values, first_query)
        total = self._term_scores(values.shape[2])
        total[first_query : first_query + len(values), :, : values.shape[2]] += values

    def _term_products(self, batch: Batch, directions: Mapping[str, Tensor]) -> Tensor:
        terms = self.losses.train_terms(batch.noise)
        draws = range(1) if batch.noise is not None else self.losses.each_draw()
        found = [
            self.engine.term_products(terms, batch.data, batch.examples, directions) for _ in draws
        ]
        return found[0] if len(found) == 1 else torch.stack(found).mean(0)

    def _term_scores(self, length: int) -> Tensor:
        """Where scores of terms are added up, for examples of up to ``length`` terms."""
        queries = self.num_query if self.rows is None else self.rows.num_query
        columns = self.num_train if self.edits is None else len(self.edits)
        return self._totals.terms(queries, columns, length, self.dtype, self.device)

    def finished_terms(self) -> Tensor | None:
        """The scores by token of all processes, [query, column, position]; None where none were
        added."""
        rank, world = rank_and_world()
        lengths = torch.zeros(world, device=self.device)
        lengths[rank] = self._totals.positions
        longest = int(self.reduce(lengths).max())
        return self.reduce(self._term_scores(longest)).cpu() if longest else None

    def finish_self_influence(self) -> None:
        """Hand the self-influence of all processes to the scores, if any was added."""
        own = self._totals.self_influence
        added = self.reduce(torch.tensor([float(own is not None)], device=self.device))
        if not bool(added):
            return
        if own is None:
            own = torch.zeros(self.num_train, dtype=self.dtype, device=self.device)
        self.scores.set_self_influence(self.reduce(own).cpu())

    def require(self, fulfilled: bool, error: Exception) -> None:
        """Raise ``error`` where numbers are not as they must be. In a dry run, which sees a few
        batches only, they need not be."""
        if not fulfilled:
            self.pace.refuse(error)

    # Per-example gradients at the weights in place.

    def train_gradients(
        self, batch: object, examples: Tensor, noise: RecordedNoise | None = None
    ) -> ExampleGradients:
        """Per-example gradients of the training loss; of a batch of the run with what it drew. Of
        edits of a graph, what they change of the training set's."""
        if isinstance(batch, EditedGraphs):
            return edit_gradients(self, batch)
        loss = self.losses.train if noise is None else self.losses.as_drawn(noise)
        return self.engine.gradients(loss, batch, examples)

    def measurement_gradients(self, batch: object, examples: Tensor) -> ExampleGradients:
        """Per-example gradients of the measurement, or of the parts of it that ``examples`` name
        (:func:`~tda_lightning.session.parts.part_indices`)."""
        loss = self.losses.part if are_parts(examples) else self.losses.measurement
        return self.engine.gradients(loss, batch, examples)

    def measurement_terms(self, batch: object, examples: Tensor) -> Iterator[ExampleGradients]:
        """Per-example gradients of the terms that :meth:`measurement` is the mean of: its parts
        (timesteps) at each draw of its noise."""
        parts = self.task.measured_parts
        named = [examples]
        if parts > 1 and not are_parts(examples):
            named = [part_indices(examples, number) for number in range(parts)]
        losses = self.losses
        for _ in losses.each_draw():
            for indices in named:
                loss = losses.part_once if are_parts(indices) else losses.measured_once
                yield self.engine.gradients(loss, batch, indices)

    def fisher_gradients(self, batch: object, examples: Tensor, seed: int) -> ExampleGradients:
        """Per-example gradients whose second moment estimates the Gauss-Newton matrix: of the
        loss under sampled labels, or of the loss itself (empirical Fisher). For one draw of the
        loss's noise (:meth:`Losses.each_draw`), over which second moments are averaged."""

        sampled = self.task.can_sample
        loss = self.losses.sampled(seed) if sampled else self.losses.train_once
        return self.engine.gradients(loss, batch, examples)

    def output_gradients(self, batch: object, examples: Tensor) -> tuple[ExampleGradients, Tensor]:
        """Per-example gradients of the output that the loss is a function of, and the derivative
        of the loss by it, [batch] (``AttributionTask.model_output``)."""
        slopes: list[Tensor] = []

        def output(module: nn.Module, part: object, indices: Tensor) -> Tensor:
            made = self.losses.model_output(module, part, indices)
            slopes.append(made.slopes.detach())
            return made.values

        gradients = self.engine.gradients(output, batch, examples)
        return gradients, slopes[0]  # of the whole batch; later ones are of single examples

    def output_slopes(self, batch: object, examples: Tensor) -> Tensor:
        """The derivatives alone: a forward pass."""
        return self.losses.model_output(self.module, batch, examples).slopes.detach()

    def gauss_newton_gradients(self, batch: object, examples: Tensor) -> Iterable[ExampleGradients]:
        """Per-example gradients whose outer products sum to the exact Gauss-Newton matrix, for one
        draw of the loss's noise."""

        return self.engine.each_gradient(self.losses.gauss_newton, batch, examples)

    def train_loss(self, module: nn.Module, batch: object, examples: Tensor) -> Tensor:
        """The training loss of each example, [batch]; the mean over ``draws`` of its noise."""
        return self.losses.train(module, batch, examples)

    def measurement(self, module: nn.Module, batch: object, examples: Tensor) -> Tensor:
        """The measurement of each example, [batch], or the parts of it that ``examples`` name; the
        mean over ``draws`` of its noise."""
        return self.losses.measurement(module, batch, examples)


def relabelled(task: AttributionTask, batch: object, labels: Mapping[int, object]) -> object:
    """The batch with other labels at some positions; its layout stays known."""
    changed = task.relabelled(batch, labels)
    inherit(batch, changed)
    return changed


def memory_budget() -> int:
    """Bytes that dense query gradients may take: a quarter of what the machine has free."""
    return free_memory() // 4


def _require_like(own: Tensor | None, value: Tensor, name: str, step: int) -> None:
    """Refuse a tensor that the module lacks, or has in another shape: copying may broadcast."""
    if own is None or own.shape != value.shape:
        actual = "no such tensor" if own is None else list(own.shape)
        raise TrajectoryMismatchError(
            f"The checkpoint of step {step} does not fit the module: expected {name} of shape "
            f"{list(value.shape)}, got {actual}. Build the module as it was trained."
        )
