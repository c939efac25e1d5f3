"""Opens a run for an index: one stage of training, its training set and some queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch.utils.data import Subset

from tda_lightning.attribution.graph_sources import NodeSource, by_node
from tda_lightning.attribution.matching import require_same_data
from tda_lightning.attribution.module import AttributionModule, quiet_trainer
from tda_lightning.attribution.sessions import open_session
from tda_lightning.measurements import as_measurement
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.module_state import in_eval_mode
from tda_lightning.session.session import Session

T = TypeVar("T")


def training_source(
    attribution: AttributionModule, train: object, batch_size: int
) -> ExampleSource:
    """The recorded training set.

    Raises:
        TrajectoryMismatchError: ``train`` is another one.
        UnsupportedTrainingError: there are several runs or stages, or the examples are the nodes of
            one graph.
    """
    if len(attribution.members) > 1 or len(attribution.stages) > 1:
        raise UnsupportedTrainingError(
            "An index is of one run of one stage, got "
            f"{len(attribution.members)} runs of {len(attribution.stages)} stages. Build one for "
            "each of them."
        )
    source = ExampleSource.of(train, batch_size, "training")
    require_same_data(attribution.trajectory, source)
    _, (source,), _ = by_node(attribution.members, [source], None)
    if isinstance(source, NodeSource):
        raise UnsupportedTrainingError(
            "The examples of a run on one graph depend on one another, and an index reads them "
            "one by one. Use AttributionModule.attribute(...)."
        )
    return source


def sampled(source: ExampleSource, indices: list[int]) -> ExampleSource:
    """Some examples of a source."""
    return source.with_dataset(Subset(source.dataset, indices))


def in_session(
    attribution: AttributionModule,
    source: ExampleSource,
    queries: ExampleSource,
    work: Callable[[Session], T],
    trainer: Any = None,
    measurement: Any = None,
) -> T:
    """``work`` on an opened session, in every process of the trainer; its result."""
    runner = trainer or quiet_trainer()
    (stage,) = attribution.stages
    with in_eval_mode([stage.module], runner.strategy.root_device):
        session = open_session(
            stage, source, queries, self_influence=False, asked=as_measurement(measurement)
        )
        return attribution._launch(runner, lambda: work(session))
