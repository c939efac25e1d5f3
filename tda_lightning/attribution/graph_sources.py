"""A run on one whole graph, seen by its nodes: each training node is an example of every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tda_lightning.attribution.stages import StageSetup
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.graphs import entry, find_mask, num_nodes
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.store.fingerprints import LENGTH
from tda_lightning.tasks import (
    AttributionTask,
    ClassificationTask,
    NodeBatch,
    Nodes,
    NodeTask,
    RegressionTask,
    TrainingStepTask,
)
from tda_lightning.tasks.node_batch import node_ids

_ASK = (
    "Give query=Nodes(graph, graph.val_mask) (tda_lightning.tasks): which of the graph's nodes are "
    "the queries."
)


@dataclass(frozen=True)
class NodeSource(ExampleSource):
    """The nodes of one graph; ``dataset`` is :class:`~tda_lightning.tasks.Nodes`."""

    def checked(self, module: nn.Module) -> ExampleSource:
        """A batch of nodes is the graph itself: there is nothing to compare."""
        return self

    def _transferred(self, batch: Any, module: nn.Module) -> Any:
        graph = super()._transferred(batch.graph, module)
        return NodeBatch(graph, batch.nodes.to(next(module.parameters()).device), batch.mask)


def by_node(
    members: Sequence[Sequence[StageSetup]],
    training: Sequence[ExampleSource],
    queries: ExampleSource | None,
) -> tuple[list[list[StageSetup]], list[ExampleSource], Any]:
    """Stages and data sets whose examples are nodes, where a task asks for nodes or the training
    set is one graph with a mask; all others as they are.

    Raises:
        ValueError: a mask selects no node, or it is not said which nodes are queries.
        UnsupportedTrainingError: nodes are asked for, and the training set is several graphs.
    """
    tasks = {stage.run: stage.task for member in members for stage in member}
    sources = [_nodes_of(tasks[run], source) for run, source in enumerate(training)]
    stages = [
        [
            replace(stage, trajectory=over_nodes(stage.trajectory, len(source)))
            if isinstance(source := sources[stage.run], NodeSource)
            else stage
            for stage in member
        ]
        for member in members
    ]
    last = sources[-1]
    if isinstance(last, NodeSource) and queries is not None:
        queries = _queried(tasks[len(sources) - 1], queries, last)
    return stages, sources, queries


def _nodes_of(task: AttributionTask, source: ExampleSource) -> ExampleSource:
    if isinstance(task, NodeTask):
        if len(source) != 1:
            raise UnsupportedTrainingError(
                f"NodeTask is for training on one graph, got a training set of {len(source)}. For "
                "graphs that are examples themselves use GraphTask."
            )
        graph = source.read([0])
        chosen = entry(graph, task.train_mask, "the mask of training nodes")
        return _as_nodes(source, _named(graph, chosen, None, task.train_mask))
    if len(source) != 1:
        return source
    graph = source.read([0])
    key = find_mask(graph)
    if isinstance(task, ClassificationTask | RegressionTask) and key is not None:
        raise ValueError(
            f"The training set is one graph with a mask of nodes ({key!r}), and "
            f"{type(task).__name__} takes batches of examples. Use task=None (the module's own "
            "training_step) or NodeTask, whose examples are the training nodes."
        )
    if not isinstance(task, TrainingStepTask) or key is None:
        return source
    return _as_nodes(source, _named(graph, entry(graph, key, "a mask"), key, key))


def _queried(task: AttributionTask, queries: ExampleSource, training: NodeSource) -> ExampleSource:
    own: Nodes = training.dataset
    given = queries.dataset
    if isinstance(given, Nodes):
        nodes = given if own.mask is None else Nodes(given.graph, given.nodes, own.mask)
        return _as_nodes(queries, nodes)
    if len(queries) != 1:
        raise ValueError(f"Expected one graph of queries, got {len(queries)}. {_ASK}")
    if not isinstance(task, NodeTask) or task.query_mask is None:
        raise ValueError(f"It is not said which nodes of the graph are queries. {_ASK}")
    graph = queries.read([0])
    chosen = entry(graph, task.query_mask, "the mask of queries")
    return _as_nodes(queries, _named(graph, chosen, None, task.query_mask))


def _named(graph: Any, chosen: Tensor, mask: Any, name: object) -> Nodes:
    return Nodes(graph, node_ids(chosen, num_nodes(graph), f"The graph's {name!r}"), mask)


def _as_nodes(source: ExampleSource, nodes: Nodes) -> NodeSource:
    return NodeSource(
        nodes,
        source.batch_size if source.batch_size > 1 else 256,
        collate=_itself,
        keys=_itself,
        data_module=source.data_module,
        loader=source.loader,
    )


def _itself(value: Any) -> Any:
    return value


def over_nodes(trajectory: Trajectory, count: int) -> Trajectory:
    """The run as one of ``count`` examples, all of which stand in every batch.

    Curvature that was gathered during training is that of the graph as one example, and is left
    out.

    Raises:
        UnsupportedTrainingError: a batch was not the one graph.
    """
    steps = trajectory.steps
    batches = len(steps.example_offsets) - 1
    if len(steps.examples) and bool((steps.example_offsets.diff() != 1).any()):
        raise UnsupportedTrainingError(
            "Expected every training batch to be the one graph, got batches of "
            f"{sorted(set(steps.example_offsets.diff().tolist()))} examples."
        )
    if len(steps.examples):
        steps = replace(
            steps,
            examples=torch.arange(count).repeat(batches),
            example_offsets=torch.arange(batches + 1) * count,
        )
    settings = {**trajectory.facts.settings, "batch_size": count}
    known = trajectory.facts.fingerprint  # of the graph; it still tells runs apart
    fingerprint = None if known is None else {**known, LENGTH: str(count)}
    facts = replace(
        trajectory.facts, num_examples=count, settings=settings, fingerprint=fingerprint
    )
    return replace(trajectory, facts=facts, steps=steps, statistics={})
