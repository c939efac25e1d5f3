r"""The adjoints of some queries at one moment of training, and what a stage of it hands to the one
before.

A stage hands over the adjoints of what it took over: the parameters whose values come from the
stage before, trained or frozen; running statistics of BatchNorm; and the states of an optimizer
that went on. What began with the stage (a new head, a fresh optimizer) ends with it on the way
back (docs/methods.md, "Several stages").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from tda_lightning.estimators.unrolled.batch_statistics import (
    measurement_adjoints,
    statistics_names,
)
from tda_lightning.session.session import Session
from tda_lightning.session.stage import Stage


@dataclass
class Adjoints:
    """Derivatives of the measurements of some queries, [query, *shape].

    Attributes:
        parameters: by name, trained or frozen.
        statistics: of running statistics, by buffer name.
        states: of the optimizer's states, by parameter and name; one that is absent is zero.
    """

    parameters: dict[str, Tensor]
    statistics: dict[str, Tensor]
    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @staticmethod
    def measured(
        stage: Stage, layers: Mapping[str, _BatchNorm], queries: range
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and statistics of some queries at the end of the last stage.

        Args:
            layers: whose running statistics some stage moved.
        """
        session = stage.wide
        session.load(session.trajectory.last_step)
        return _parameter_gradients(session, queries), _statistics_gradients(
            session, layers, queries
        )

    def handed_over(self, stage: Stage, statistics: frozenset[str]) -> Adjoints:
        """At the start of a stage: what the one before is asked.

        Args:
            statistics: running statistics that the stage took over.
        """
        goes_on = stage.session.trajectory.steps_before
        return Adjoints(
            {name: own for name, own in self.parameters.items() if name in stage.carried},
            {name: own for name, own in self.statistics.items() if name in statistics},
            {name: dict(own) for name, own in self.states.items() if name in goes_on},
        )

    def entered(self, stage: Stage, layers: Mapping[str, _BatchNorm]) -> Adjoints:
        """At the end of a stage, from what the next one handed over: what later stages did not use
        has an adjoint of zero."""
        session = stage.session
        queries = len(next(iter(self.parameters.values())))
        named = dict(session.module.named_parameters())
        buffers = dict(session.module.named_buffers())

        def own(tensors: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
            if name in tensors:
                # A later stage may have been in another precision.
                return tensors[name].to(session.device, session.dtype)
            return torch.zeros(queries, *shape, dtype=session.dtype, device=session.device)

        names = [*session.trajectory.facts.parameters, *stage.frozen]
        return Adjoints(
            {name: own(self.parameters, name, named[name].shape) for name in names},
            {
                name: own(self.statistics, name, buffers[name].shape)
                for name in statistics_names(layers)
            },
            self.states,
        )

    def tensors(self) -> dict[str, Tensor]:
        """To resume from."""
        tensors = {f"a.{name}": tensor for name, tensor in self.parameters.items()}
        tensors |= {f"c.{name}": tensor for name, tensor in self.statistics.items()}
        for name, states in self.states.items():
            tensors |= {f"states.{key}.{name}": tensor for key, tensor in states.items()}
        return tensors

    @staticmethod
    def restored(tensors: Mapping[str, Tensor], device: torch.device) -> Adjoints:
        """What :meth:`tensors` gave."""

        def those_of(kind: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(f"{kind}."): tensor.to(device)
                for name, tensor in tensors.items()
                if name.startswith(f"{kind}.")
            }

        states: dict[str, dict[str, Tensor]] = {}
        for name, tensor in those_of("states").items():
            key, _, parameter = name.partition(".")
            states.setdefault(parameter, {})[key] = tensor
        return Adjoints(those_of("a"), those_of("c"), states)


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
