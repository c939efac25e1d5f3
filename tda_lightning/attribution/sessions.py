"""Opens the stages of a recorded run for attribution: the engine is planned on a first batch, the
task prepared, the last checkpoint loaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from tda_lightning.attribution.cache_key import digest_of
from tda_lightning.attribution.member_modules import require_masked
from tda_lightning.attribution.processes import written_by_first
from tda_lightning.attribution.stages import StageSetup, widened
from tda_lightning.edits import EditSet, GraphEditSet
from tda_lightning.gradients import GradientEngine
from tda_lightning.measurements import Measurement
from tda_lightning.records.errors import EngineError, UnsupportedTrainingError
from tda_lightning.records.score_sinks import MemorySink
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.stand_in import stand_in_of
from tda_lightning.session.moments import show
from tda_lightning.session.parts import part_indices
from tda_lightning.session.query_rows import QueryRows, RowExamples
from tda_lightning.session.session import LoadedCheckpoint, Session
from tda_lightning.session.stage import Stage
from tda_lightning.tasks import (
    MEASURED_SEED,
    AttributionTask,
    TrainingStepTask,
    noise_of,
    run_training_step,
    seeded_examples,
)
from tda_lightning.tasks.step_noise import UNSEEN

# Examples that the engine plans and checks itself on, and that identify code in the cache's key.
_FIRST = 32
# The label that torch's losses, and models of transformers, ignore.
_IGNORED = -100


def open_members(
    members: Sequence[Sequence[StageSetup]],
    examples: Sequence[ExampleSource],
    queries: ExampleSource,
    self_influence: bool,
    edits: EditSet | GraphEditSet | None = None,
    draws: int | None = None,
    asked: Measurement | None = None,
    by_token: str | None = None,
) -> list[list[Stage]]:
    """:func:`open_stages` of every member of an ensemble, or of the one run."""
    loaded: dict[nn.Module, LoadedCheckpoint] = {}
    opened = [
        open_stages(setups, examples, queries, self_influence, loaded, draws, asked)
        for setups in members
    ]
    for stages in opened:
        if edits is not None:
            edits.source = edits.source.checked(stages[-1].session.module)
        stages[-1].session.edits = edits
        for stage in stages:
            stage.session.by_token = by_token in ("train", "both")
        if by_token in ("query", "both"):
            take_queries_apart(stages, queries)
    return opened


def take_queries_apart(stages: Sequence[Stage], queries: ExampleSource) -> None:
    """Make every token of the queries a query of its own, by the final model's measurement.

    Raises:
        ValueError: the measurement is of no single tokens.
    """
    session = stages[-1].session
    chosen: list[Tensor] = []
    with torch.no_grad():
        for batch, indices in session.queries(0, session.num_query):
            with seeded_examples(MEASURED_SEED, indices):
                chosen += session.losses.measured_terms(session.module, batch, indices)[1]
    rows = QueryRows.of(chosen)
    session.whole = replace(session)
    for stage in stages:
        for own in {id(part): part for part in (stage.session, stage.wide)}.values():
            _ask_rows(own, queries, rows)


def _ask_rows(session: Session, queries: ExampleSource, rows: QueryRows) -> None:
    source = queries.checked(session.module)
    source = source.with_dataset(RowExamples(source.dataset, rows, source.keys))
    session.rows, session.num_query = rows, len(rows)
    session.queries = lambda start, stop: _query_batches(source, start, stop, session.module)


def open_stages(
    setups: Sequence[StageSetup],
    examples: Sequence[ExampleSource],
    queries: ExampleSource,
    self_influence: bool,
    loaded: dict[nn.Module, LoadedCheckpoint] | None = None,
    draws: int | None = None,
    asked: Measurement | None = None,
) -> list[Stage]:
    """The stages as an estimator sees them.

    Args:
        examples: the training set of each recorded run.
        loaded: what each module holds, shared by all who load checkpoints into it.
        draws: over how many draws of their noise losses are averaged; None: ``task.draws``.
        asked: what is measured of the queries; None: the task's own measurement.
    """
    self_influence = self_influence and len(setups) == 1
    loaded = {} if loaded is None else loaded
    stages = []
    for number, setup in enumerate(setups, start=1):
        source = examples[setup.run]
        holder = loaded.setdefault(setup.module, LoadedCheckpoint())
        session = wide = open_session(setup, source, queries, self_influence, holder, draws, asked)
        session.prefix = f"stage {number}, " if len(setups) > 1 else ""
        if setup.frozen:
            wide = widened(session, setup.frozen, *first_batch(source, _FIRST, setup.module))
        before = sum(len(other) for other in examples[: setup.run])
        columns = range(before, before + len(source))
        stages.append(
            Stage(session, wide, setup.frozen, setup.carried, setup.run, columns, setup.first_step)
        )
    return stages


def open_session(
    setup: StageSetup,
    examples: ExampleSource,
    queries: ExampleSource,
    self_influence: bool,
    loaded: LoadedCheckpoint | None = None,
    draws: int | None = None,
    asked: Measurement | None = None,
) -> Session:
    """One stage's session, with the weights of its last checkpoint in place."""
    module, task = setup.module, setup.task
    engine = GradientEngine(module, setup.trained)
    examples = _by_task(examples, task)
    show(module, setup.trajectory, setup.trajectory.last_step - 1, source=examples)
    examples = examples.checked(module)
    batch, indices = first_batch(examples, _FIRST, module)
    kept = task.kept_parts
    session = Session(
        module=module,
        task=task,
        trajectory=written_by_first(setup.trajectory),
        engine=engine,
        scores=MemorySink(0, 0),
        num_train=len(examples),
        num_query=0,
        num_parts=1 if kept is None else len(kept),
        examples=examples,
        queries=lambda start, stop: (),
        cache_key=lambda steps: digest_of(session, steps, batch, indices),
        self_influence=self_influence,
        batch_size=examples.batch_size,
        loaded=loaded or LoadedCheckpoint(),
    )
    session.load(setup.trajectory.last_step)
    task.training_batch_size = setup.trajectory.batch_size
    session.noise = _noise_of(session.train_loss, module, examples, batch, indices)
    queries = ask(session, queries, asked)
    trainer = stand_in_of(module)
    unknown = [] if trainer is None else trainer.unknown
    began = time.monotonic()
    with _noise_explained(session, batch, indices):
        with seeded_examples(0, indices):
            task.prepare(module, batch)
        task.average(module, lambda: session.batches(examples.batches()))
        task.notes.extend(dict.fromkeys([*unknown, *examples.notes, *queries.notes]))
        engine.discover(session.train_loss, batch, indices, task.one_by_one)
    session.check_seconds = time.monotonic() - began
    require_masked(module)
    if session.noise or session.measured_noise:
        session.draws = task.draws if draws is None else draws
    return session


def ask(session: Session, queries: ExampleSource, asked: Measurement | None) -> ExampleSource:
    """Ask about these queries from now on, in a session that may have been asked about others.

    Args:
        asked: what is measured of them; None: the task's own measurement.

    Returns:
        The queries as they are read.

    Raises:
        ValueError: the measurement has settings for another number of queries.
    """
    module, task = session.module, session.task
    queries = _by_task(queries, task).checked(module)
    if asked is not None:
        asked.check(len(queries))
    kept = task.kept_parts
    session.asked, session.num_query = asked, len(queries) * session.num_parts
    session.queries = lambda start, stop: _measured_batches(queries, start, stop, module, kept)
    session.measured_noise = session.noise
    if not session.measures_loss:
        some, own = next(iter(_query_batches(queries, 0, min(_FIRST, len(queries)), module)))
        session.measured_noise = _noise_of(session.measurement, module, queries, some, own)
    return queries


def _by_task(source: ExampleSource, task: AttributionTask) -> ExampleSource:
    if type(task).example is AttributionTask.example:
        return source
    return replace(source, example=task.example)


def _noise_of(
    loss: Callable[[nn.Module, object, Tensor], Tensor],
    module: nn.Module,
    source: ExampleSource,
    batch: object,
    indices: Tensor,
) -> frozenset[str]:
    """What kinds of random numbers a loss draws."""
    return noise_of(
        lambda part, examples: loss(module, part, examples),
        batch,
        indices,
        lambda: first_batch(source, len(indices) - 1, module),
    )


@contextmanager
def _noise_explained(session: Session, batch: object, indices: Tensor) -> Iterator[None]:
    """Add to an error what random numbers of the loss have to do with it."""
    try:
        yield
    except (EngineError, ValueError) as error:
        text = _about_noise(session, batch, indices)
        if text is None or type(error) not in (EngineError, ValueError, UnsupportedTrainingError):
            raise
        raise type(error)(f"{error} {text}") from error


def _about_noise(session: Session, batch: object, indices: Tensor) -> str | None:
    unseen = sorted(session.noise & UNSEEN)
    if unseen:
        names = {
            "torch": "a compiled or fused function of torch",
            "NumPy": "NumPy by functions imported by themselves",
            "Python": "Python's random",
        }
        return (
            f"The loss also draws random numbers from {' and '.join(names[n] for n in unseen)}. If "
            "each example draws its own there, they belong to a place in the batch: draw them with "
            "torch (torch.randn_like, torch.randperm) or as numpy.random.randn(...)."
        )
    try:
        with torch.no_grad():
            first, again = (_loss_of(session, batch, indices) for _ in range(2))
    except Exception:  # it is no matter of noise
        return None
    if not torch.allclose(first, again, rtol=1e-3, equal_nan=True):
        return (
            "The loss of the same batch differs from one evaluation to the next: it draws from a "
            "random generator of its own (numpy.random.default_rng, random.Random), or changes "
            "what it reads. Draw from torch's or NumPy's global generator."
        )
    if "partners" in session.noise:
        return (
            "The loss mixes each example with another of its batch (a random permutation), so "
            "parameters that need single examples cannot be followed."
        )
    return None


def _loss_of(session: Session, batch: object, indices: Tensor) -> Tensor:
    """The loss as it is computed: what a task learned may be what is wrong."""
    if not isinstance(session.task, TrainingStepTask):
        return session.train_loss(session.module, batch, indices)
    with seeded_examples(0, indices):
        return run_training_step(session.module, batch)


def first_batch(source: ExampleSource, count: int, module: nn.Module) -> tuple[object, Tensor]:
    """``count`` examples spread over the data as (batch, indices) on the module's device: data may
    be sorted (by length, by class), and the first ones alike."""
    first = source.batches(stop=min(count, len(source)), size=count)[0]
    last, count = len(source) - 1, len(first)
    spread = [position * last // max(1, count - 1) for position in range(count)]
    try:
        return _loaded(source, spread, module)
    except (RuntimeError, ValueError, TypeError):
        # They may differ too much for one batch, where neighbours are alike on purpose.
        return _loaded(source, first, module)


def sample_batches(
    source: ExampleSource, count: int, module: nn.Module
) -> Iterator[tuple[object, Tensor]]:
    """Batches of ``count`` examples: spread over the data, and neighbours at its start, in its
    middle and at its end."""
    yield first_batch(source, count, module)
    size = len(source)
    if size > count == len(source.batches(stop=count, size=count)[0]):
        for start in sorted({0, (size - count) // 2, size - count}):
            yield _loaded(source, range(start, start + count), module)


def _loaded(
    source: ExampleSource, chosen: Sequence[int], module: nn.Module
) -> tuple[object, Tensor]:
    batch, indices = next(iter(source.indexed([chosen])))
    return source.placed(batch, module, indices), indices.to(next(module.parameters()).device)


def _measured_batches(
    queries: ExampleSource,
    start: int,
    stop: int,
    module: nn.Module,
    parts: Sequence[int] | None,
) -> Iterator[tuple[object, Tensor]]:
    """Queries from ``start`` to ``stop``; where parts of their measurement are kept, all queries
    come once for each part."""
    if parts is None:
        yield from _query_batches(queries, start, stop, module)
        return
    count = len(queries)
    for part in range(start // count, -(-stop // count)):
        first, last = max(start - part * count, 0), min(stop - part * count, count)
        for batch, indices in _query_batches(queries, first, last, module):
            yield batch, part_indices(indices, part)


def _query_batches(
    queries: ExampleSource, start: int, stop: int, module: nn.Module
) -> Iterator[tuple[object, Tensor]]:
    device = next(module.parameters()).device
    for batch, indices in queries.indexed(queries.batches(start, stop)):
        placed = queries.placed(batch, module, indices)
        _require_labels(placed, indices)
        yield placed, indices.to(device)


def _require_labels(batch: object, indices: Tensor) -> None:
    """Refuse texts of which no token is predicted: their loss is a mean of nothing."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.dim() < 2 or len(labels) != len(indices):
        return
    ignored = (labels == _IGNORED).flatten(1).all(1)
    if bool(ignored.any()):
        raise ValueError(
            f"Query {int(indices[int(ignored.nonzero()[0])])} has no label that counts: all are "
            f"{_IGNORED}, which losses ignore; expected at least one. Leave it out, or give it "
            "labels."
        )
