"""Wide embeddings without the rows that a run never looks up.

A row that no batch of the run and no query looks up has a gradient of zero at every step, and so is
its adjoint; with the clipping and the elementwise rules of the optimizers here it does nothing to
any other row either. So the run is unrolled as that of a module whose tables have the other rows
alone: states, adjoints and products with the Hessian are as high as what is looked up.

Which rows these are is seen in a replay, since a batch may draw what it looks up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tda_lightning.estimators.unrolled.stage_run import StageRun
from tda_lightning.optimizers import rule_of
from tda_lightning.records.deferred import Deferred
from tda_lightning.records.trajectory import Checkpoint, Trajectory
from tda_lightning.replay.run import Replay, Walk
from tda_lightning.runtime.random_states import unchanged_randomness
from tda_lightning.session.session import LoadedCheckpoint, Session
from tda_lightning.session.stage import Stage

WIDE = 1 << 19  # scalars of a table from which a replay costs less than what it saves
_FEW = 0.5  # of a table's rows
# What may be asked of a table besides: nothing that depends on its rows or on how many there are.
_HARMLESS = frozenset(
    getattr(Tensor, name).__get__ for name in ("device", "dtype", "requires_grad", "is_cuda")
)

Rows = Mapping[str, Tensor]


@contextmanager
def narrowed(runs: Sequence[StageRun]) -> Iterator[tuple[list[Stage], Rows]]:
    """The stages with modules whose wide tables have the rows that are looked up alone, and these
    rows by parameter, ascending; all as it was where there is no such table."""
    stages = [run.stage for run in runs]
    rows = _looked_up(runs, _wide_tables(stages))
    if not rows:
        yield stages, {}
        return
    # Of the stages as they are, which the weights in place must fit.
    keys = [stage.session.cache_key([stage.session.trajectory.last_step]) for stage in stages]
    with ExitStack() as swapped:
        loaded: dict[int, LoadedCheckpoint] = {}
        missing: list[Tensor] = []
        for stage in stages:
            module = stage.wide.module
            stage.wide.loaded.trajectory = None
            if id(module) not in loaded:
                loaded[id(module)] = LoadedCheckpoint()
                for name, table in _tables(module).items():
                    if name in rows:
                        missing.append(swapped.enter_context(_swapped(table, rows[name])))
        yield (
            [
                _narrow_stage(stage, rows, loaded[id(stage.wide.module)], key)
                for stage, key in zip(stages, keys, strict=True)
            ],
            rows,
        )
        # Read once, at the end: a device would have to wait for every answer.
        unseen = any(bool(own) for own in missing)
        stages[-1].session.require(
            not unseen,
            RuntimeError(
                "Exact unrolling looked up rows of an embedding that the replay of the run did not "
                "look up. Please report this."
            ),
        )


def _tables(module: nn.Module) -> dict[str, nn.Embedding]:
    """The embeddings whose weight is nobody else's, by its name."""
    names = Counter(id(own) for _, own in module.named_parameters(remove_duplicate=False))
    return {
        f"{name}.weight".lstrip("."): part
        for name, part in module.named_modules()
        if type(part) is nn.Embedding
        and type(part.weight.data) is Tensor
        and names[id(part.weight)] == 1
        and part.max_norm is None
        and not (part.scale_grad_by_freq or part.sparse)
        and not part.weight._backward_hooks
    }


def _wide_tables(stages: Sequence[Stage]) -> set[str]:
    """Names of the trained tables that may be narrow in every stage whose module has them."""
    shapes: dict[str, set[tuple[int, ...] | None]] = {}
    trained: set[str] = set()
    for stage in stages:
        session = stage.session
        if session.edits is not None or not rule_of(session.trajectory).elementwise:
            return set()  # edits look up rows of their own
        tables = _tables(stage.wide.module)
        held = {*session.engine.masked, *session.task.penalty.strengths}
        trained |= session.trajectory.facts.parameters.keys()
        for name, parameter in stage.wide.module.named_parameters():
            narrow = name in tables and parameter.numel() >= WIDE and name not in held
            shapes.setdefault(name, set()).add(tuple(parameter.shape) if narrow else None)
    return {name for name in trained if len(shapes[name]) == 1 and None not in shapes[name]}


def _looked_up(runs: Sequence[StageRun], names: set[str]) -> Rows:
    """Which rows the run and the queries look up, of the tables ``names`` that are used in no other
    way, where they are few."""
    watch = _Watch(names)
    if not names:
        return {}
    for run in runs:
        if not run.counts_nothing:
            _replay(run, watch)
    last = runs[-1].stage.wide
    last.load(last.trajectory.last_step)
    with watch.over(last.module), torch.enable_grad(), unchanged_randomness():
        for batch, examples in last.queries(0, last.num_query):
            last.measurement(last.module, batch, examples)
    rows = watch.rows()
    heights = {
        n: own.num_embeddings for run in runs for n, own in _tables(run.stage.wide.module).items()
    }
    return {name: own for name, own in rows.items() if len(own) <= _FEW * heights[name]}


def _replay(run: StageRun, watch: _Watch) -> None:
    """Train the steps again whose effects count."""
    session = run.stage.session
    replay = _WatchedReplay(session.trajectory, session.module, session.task, session.examples)
    replay.watch = watch
    walk = Walk(replay)
    start = max(start for start in run.starts if start <= run.first_row)
    session.loaded.trajectory = None
    walk.restart(start)
    steps = range(start, session.trajectory.last_step)
    for row in session.loop("rows that the run looks up", steps):
        with replay.as_trained():
            walk.step(row)


class _WatchedReplay(Replay):
    """Notes what the losses look up."""

    watch: _Watch
    _compared = False

    def loss_as_trained(self, batch: object, examples: Tensor) -> Tensor:
        with self.watch.over(self.module):
            if not self._compared and self.trajectory.data_weights is None:
                self._compared = True
                with unchanged_randomness():  # the task's own way to the loss may be another
                    self.task.batch_loss(self.module, batch)
            return super().loss_as_trained(batch, examples)

    def weighted(self, batch: object, examples: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        with self.watch.over(self.module):
            return super().weighted(batch, examples, weights)


@dataclass
class _Watch:
    """Which rows of some tables are looked up, and which tables are used in another way.

    Attributes:
        names: of the tables.
        found: rows by name.
        otherwise: names.
    """

    names: set[str]
    found: dict[str, list[Tensor]] = field(default_factory=dict)
    otherwise: set[str] = field(default_factory=set)

    @contextmanager
    def over(self, module: nn.Module) -> Iterator[None]:
        """Watch what the module does."""
        tables = {n: own for n, own in _tables(module).items() if n in self.names}
        uses = _Uses({id(own.weight): name for name, own in tables.items()}, self.otherwise)

        def note(
            name: str, table: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> None:
            uses.calls[name] += 1
            ids = args[0] if args else kwargs["input"]
            self.found.setdefault(name, []).append(ids.detach().unique().cpu())
            if table.padding_idx is not None:
                self.found[name].append(torch.tensor([table.padding_idx]))

        with ExitStack() as hooks:
            for name, table in tables.items():
                hook = partial(note, name)
                hooks.callback(table.register_forward_pre_hook(hook, with_kwargs=True).remove)
            with uses:
                yield

    def rows(self) -> dict[str, Tensor]:
        """By name, ascending, of the tables that are looked up alone."""
        return {
            name: torch.cat(parts).unique()
            for name, parts in self.found.items()
            if name not in self.otherwise
        }


class _Uses(TorchFunctionMode):
    """Sees the uses of tables: each call of the module may look up rows once."""

    def __init__(self, tables: Mapping[int, str], otherwise: set[str]) -> None:
        super().__init__()
        self.tables, self.otherwise = tables, otherwise
        self.calls: Counter[str] = Counter()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        for name in self._names((*args, *kwargs.values())):
            if func is F.embedding and self.calls[name]:
                self.calls[name] -= 1
            elif func not in _HARMLESS:
                self.otherwise.add(name)
        return func(*args, **kwargs)

    def _names(self, values: Iterable[Any]) -> Iterator[str]:
        for value in values:
            if isinstance(value, Tensor):
                if id(value) in self.tables:
                    yield self.tables[id(value)]
            elif isinstance(value, (list, tuple)):
                yield from self._names(value)


@contextmanager
def _swapped(table: nn.Embedding, rows: Tensor) -> Iterator[Tensor]:
    """The table with some rows alone, its indices being those of all; whether others were looked
    up."""
    weight, padding = table.weight, table.padding_idx
    place = torch.full((len(weight),), -1, device=weight.device)
    place[rows.to(weight.device)] = torch.arange(len(rows), device=weight.device)
    missing = torch.zeros((), dtype=torch.bool, device=weight.device)

    def narrow(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = place[args[0] if args else kwargs["input"]]
        missing.logical_or_((own < 0).any())
        own = own.clamp(min=0)  # of a dry run, which has not seen all batches
        return ((own, *args[1:]), kwargs) if args else (args, {**kwargs, "input": own})

    table.weight = nn.Parameter(weight.detach()[rows.to(weight.device)], weight.requires_grad)
    table.padding_idx = None if padding is None else int(place[padding])
    handle = table.register_forward_pre_hook(narrow, with_kwargs=True)
    try:
        yield missing
    finally:
        handle.remove()
        table.weight, table.padding_idx = weight, padding


def _narrow_stage(stage: Stage, rows: Rows, loaded: LoadedCheckpoint, key: str) -> Stage:
    heights = {name: len(own) for name, own in rows.items()}

    def narrow(session: Session) -> Session:
        return replace(
            session,
            trajectory=_narrow_trajectory(session.trajectory, rows),
            engine=session.engine.with_heights(heights),
            cache_key=lambda _: key,
            loaded=loaded,
            _checkpoints={},
        )

    wide = narrow(stage.wide)
    same = stage.session is stage.wide
    return replace(stage, wide=wide, session=wide if same else narrow(stage.session))


def _narrow_trajectory(trajectory: Trajectory, rows: Rows) -> Trajectory:
    facts = trajectory.facts
    parameters = {
        name: replace(fact, shape=(len(rows[name]), *fact.shape[1:])) if name in rows else fact
        for name, fact in facts.parameters.items()
    }
    return replace(
        trajectory,
        facts=replace(facts, parameters=parameters),
        checkpoints=_NarrowCheckpoints(trajectory.checkpoints, rows),
    )


@dataclass(frozen=True, eq=False)
class _NarrowCheckpoints(Mapping[int, Checkpoint]):
    """Checkpoints with some rows alone of tables."""

    run: Mapping[int, Checkpoint]
    rows: Rows

    def __getitem__(self, step: int) -> Checkpoint:
        whole = self.run[step]
        states = whole.optimizer
        return replace(
            whole,
            parameters=self._of(whole.parameters),
            buffers=self._of(whole.buffers),  # a frozen table is one of them
            optimizer=None if states is None else Deferred(partial(self._states, whole)),
        )

    def _of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows = self.rows
        return {n: own[rows[n]] if n in rows else own for n, own in tensors.items()}

    def _states(self, whole: Checkpoint) -> dict[str, Mapping[str, Tensor]]:
        assert whole.optimizer is not None
        found: dict[str, Mapping[str, Tensor]] = {}
        for name, states in whole.optimizer.items():
            like = whole.parameters[name] if name in self.rows else None
            found[name] = {
                key: value[self.rows[name]]
                if like is not None and value.shape == like.shape
                else value
                for key, value in states.items()
            }
        return found

    def __iter__(self) -> Iterator[int]:
        return iter(self.run)

    def __len__(self) -> int:
        return len(self.run)
