"""Some edits of one graph: the columns of an attribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor, nn

from tda_lightning.edits.graph_edits import GraphEdit
from tda_lightning.records.provenance import EditRecord
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.tasks.node_batch import NodeBatch, Nodes


@dataclass(frozen=True)
class EditedGraphs:
    """The data of a batch of :meth:`Session.walk_columns` over edits of a graph.

    Attributes:
        edits: all of them.
        columns: those that are meant.
        batch: the graph before the edits, with its training nodes, on the module's device.
    """

    edits: GraphEditSet
    columns: Sequence[int]
    batch: NodeBatch

    def __len__(self) -> int:
        return len(self.columns)


@dataclass
class GraphEditSet:
    """The edits of a graph that are scored, column by column.

    Attributes:
        edits: at least one.
        source: of the training nodes; its data set is :class:`~tda_lightning.tasks.Nodes`.
        hops: how far a change reaches in the model; None before it has been found.
        whole: whether the model sees more of a graph than neighbourhoods, so that an edit is
            looked at in the whole graph.
        reach: ids of the nodes within so many hops of an edit, by column, once they were asked for.

    Raises:
        ValueError: no edits, or one that does not fit the graph; names the edit.
    """

    edits: Sequence[GraphEdit]
    source: ExampleSource
    hops: int | None = None
    whole: bool = False
    reach: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.edits):
            raise ValueError("edits is empty: give at least one, or None to score every removal.")
        for column, edit in enumerate(self.edits):
            try:
                edit.applied(self.graph)
            except ValueError as error:
                raise ValueError(f"Edit {column}: {error}") from error

    @property
    def graph(self) -> Any:
        """The graph as it is read."""
        return cast(Nodes, self.source.dataset).graph

    @property
    def nodes(self) -> Tensor:
        """Ids of the training nodes."""
        return cast(Nodes, self.source.dataset).nodes

    def __len__(self) -> int:
        return len(self.edits)

    def __getitem__(self, columns: Sequence[int]) -> EditedGraphs:
        every = range(len(self.nodes))
        return EditedGraphs(self, list(columns), cast(Nodes, self.source.dataset)[every])

    @property
    def column_source(self) -> ExampleSource:
        """Reads edits by their columns."""
        return ColumnSource(self, 1, collate=_itself, keys=_itself)

    def positions_of(self, index: int) -> list[int]:
        """The edits that go with a use of training node ``index``. Every step uses the graph and
        so all edits; the first node stands for it."""
        return list(range(len(self.edits))) if index == 0 else []

    def require_in_batches(self, question: str) -> None:
        """Every recorded batch is the graph, so all edits are in it."""

    def records(self) -> list[EditRecord]:
        """The edits for the provenance."""
        return [
            cast(EditRecord, {"kind": type(edit).__name__, **edit.record()}) for edit in self.edits
        ]


@dataclass(frozen=True)
class ColumnSource(ExampleSource):
    """Reads columns of a :class:`GraphEditSet`, which is its data set: the graph goes to the device
    as in training."""

    def checked(self, module: nn.Module) -> ExampleSource:
        """There is nothing to compare."""
        return self

    def _transferred(self, batch: Any, module: nn.Module) -> Any:
        edited: EditedGraphs = batch
        return replace(edited, batch=edited.edits.source.placed(edited.batch, module, ()))


def _itself(value: Any) -> Any:
    return value
