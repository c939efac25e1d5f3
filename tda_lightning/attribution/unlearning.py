r"""Unlearning: the weights that training without something would have led to, predicted.

.. math::
    \theta_{-e} \approx \theta_T + \frac1N (H + \lambda + \text{damping})^{-1} \delta_e

with :math:`\delta_e` the change that the edits make to the summed training gradients, all of them
at once: before minus after. Of edits of a graph that is GIF (Wu et al. 2023, 2304.02835, eq. 8),
whose gradients after the edit are those of the edited graph; of removals it is the first-order
update of Koh & Liang (2017).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from tda_lightning.attribution.graph_sources import NodeSource
from tda_lightning.edits import EditedGraphs, EditSet, GraphEdit, GraphEditSet
from tda_lightning.estimators import InfluenceFunction
from tda_lightning.estimators.inverse import fit_inverse
from tda_lightning.estimators.queries import directions
from tda_lightning.gradients import Dense, ExampleGradients
from tda_lightning.runtime.graph_caches import forget
from tda_lightning.session.session import Session


@dataclass(frozen=True)
class EditsTogether:
    """Several edits of a graph, made one after the other, as one."""

    edits: Sequence[GraphEdit]

    def applied(self, graph: Any) -> Any:
        """The graph after all of them."""
        for edit in self.edits:
            graph = edit.applied(graph)
        return graph

    def touched(self, graph: Any) -> Tensor:
        """The nodes that any of them touches."""
        touched: Tensor = torch.cat([edit.touched(graph) for edit in self.edits]).unique()
        return touched

    def removed(self) -> Tensor:
        """The nodes that any of them removes."""
        removed: Tensor = torch.cat([edit.removed() for edit in self.edits]).unique()
        return removed

    def record(self) -> dict[str, object]:
        """What each changes."""
        return {"edits": [edit.record() for edit in self.edits]}


@dataclass
class _OneDirection(Session):
    """A session whose only query has a given gradient, [groups, rows, columns] by block."""

    given: Mapping[str, Tensor] = field(default_factory=dict)

    def measurement_gradients(self, batch: object, examples: Tensor) -> ExampleGradients:
        """The given one."""
        rows = {name: Dense(matrix[None]) for name, matrix in self.given.items()}
        return ExampleGradients(torch.zeros(1), dict(rows))


def moved_weights(
    estimator: InfluenceFunction, session: Session, edits: EditSet | GraphEditSet
) -> nn.Module:
    """A copy of the module with the weights that the edits are predicted to lead to."""
    session.load(session.trajectory.last_step)
    delta = _gradient_change(session, edits)
    held = {item.name: getattr(session, item.name) for item in fields(Session)}
    asked = _OneDirection(**{**held, "queries": _one_query, "num_query": 1}, given=delta)
    responses = fit_inverse(estimator, asked).responses(0, 1, 1)
    moved = copy.deepcopy(session.module)
    if isinstance(edits, GraphEditSet):
        forget(moved)  # the graph is another one now
    with torch.no_grad():
        for name, change in directions(session, responses).items():
            parameter = moved.get_parameter(name)
            parameter.add_((change[0] / session.num_train).to(parameter))
    return moved


def edit_set_of(edits: Sequence[Any], source: Any) -> EditSet | GraphEditSet:
    """The edits as one change: those of a graph made one after the other."""
    if not len(edits):
        raise ValueError("edits is empty: give at least one, of what is to be unlearned.")
    if isinstance(source, NodeSource) and all(isinstance(edit, GraphEdit) for edit in edits):
        # Many edits at once reach most of the graph.
        return GraphEditSet([EditsTogether(edits)], source, hops=0, whole=True)
    return EditSet(edits, source)


def _gradient_change(session: Session, edits: EditSet | GraphEditSet) -> dict[str, Tensor]:
    """The sum of what all edits change in the gradients, by block."""
    if isinstance(edits, GraphEditSet):
        batch = edits.column_source.batch([0], session.module)
        found = session.train_gradients(cast(EditedGraphs, batch), torch.zeros(1)).blocks
        return {name: gradient.dense(slice(None))[0] for name, gradient in found.items()}
    session.edits = edits
    total: dict[str, Tensor] = {}
    for some in session.walk_columns("what is to be unlearned", session.trajectory.last_step):
        assert some.signs is not None
        for name, gradient in some.gradients.items():
            summed: Tensor = gradient.weighted_sums(some.signs[None])[0]
            total[name] = total[name] + summed if name in total else summed
    session.edits = None
    return total


def _one_query(start: int, stop: int) -> Iterable[tuple[object, Tensor]]:
    return [(None, torch.zeros(1, dtype=torch.int64))]
