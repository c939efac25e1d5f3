r"""Adjoints of the optimizer's steps: how a change of a step's gradient reaches the measurement.

The rule of the optimizer has the formula (``tda_lightning.optimizers``); weight decay and clipping
are added here. Between one step and the one before it, the Hessian's part
:math:`a \mathrel{+}= H u` is added by the caller (docs/methods.md, "Exact unrolling").
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tda_lightning.estimators.unrolled.step_states import StepState
from tda_lightning.optimizers import WEIGHT_DECAY, ParameterStep, row_settings, rule_of
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.replay.run import clips_by_value


@dataclass
class OptimizerAdjoint:
    """The adjoints of some queries: [query, *shape] by parameter.

    Attributes:
        trajectory: of the run.
        a: derivatives with respect to the parameters.
        states: derivatives with respect to the optimizer's states, by parameter and name; one
            that is absent is zero.
    """

    trajectory: Trajectory
    a: dict[str, Tensor]
    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def step(self, state: StepState) -> dict[str, Tensor]:
        """Go back through the optimizer's step.

        Returns:
            d m / d g by parameter, of the gradient before clipping.
        """
        clipping = self._clipping(state)
        u = {
            name: self._step_parameter(name, state, clipping)
            for name in self.a
            if name not in state.without
        }
        return self._before_clipping(u, state, clipping)

    def _step_parameter(self, name: str, state: StepState, clipping: float) -> Tensor:
        rule, group = rule_of(self.trajectory), self.trajectory.facts.parameters[name].group
        assert rule.adjoint is not None
        settings = row_settings(self.trajectory, state.row, group)
        rate = float(self.trajectory.steps.learning_rate[state.row, group])
        decay = settings.get(WEIGHT_DECAY, 0.0)
        if 0 < state.count[name] <= rule.cancelling_steps:
            # Where |g| is far above eps the update hardly depends on |g|: what is left of two
            # large terms is lost in float32.
            self.a[name] = self.a[name].double()
        a = self.a[name]
        known = self.states.get(name, {})
        states = defaultdict(
            lambda: torch.zeros_like(a), {key: value.to(a.dtype) for key, value in known.items()}
        )
        gradient = torch.zeros(0)
        if rule.reads_gradient:
            gradient = self._clipped(state.gradient[name], clipping)
            if decay and not rule.decoupled:
                gradient = gradient + decay * state.parameters[name]
        step = ParameterStep(
            rate,
            settings,
            gradient.to(a),
            {key: value.to(a) for key, value in state.states[name].items()},
            state.count[name],
            state.new_states[name],
        )
        u = rule.adjoint(a, states, step)
        self.states[name] = states
        if decay and rule.decoupled:
            a.mul_(1 - rate * decay)
        elif decay:
            a.add_(u, alpha=decay)
        return u

    def _clipped(self, gradient: Tensor, clipping: float) -> Tensor:
        if by_value := self._clip_value():
            return gradient.clamp(-by_value, by_value)
        return gradient * clipping

    def _before_clipping(
        self, u: dict[str, Tensor], state: StepState, clipping: float
    ) -> dict[str, Tensor]:
        """d m / d (gradient before clipping), from that after it."""
        if by_value := self._clip_value():
            return {
                name: v * (state.gradient[name].abs() <= by_value).to(v.device)
                for name, v in u.items()
            }
        if clipping == 1:
            return u
        gradients = {name: state.gradient[name].to(v) for name, v in u.items()}
        norm = _norm(gradients.values())
        along = sum((v * gradients[n]).flatten(1).sum(1) for n, v in u.items())
        assert isinstance(along, Tensor)
        shares = along / (norm * (norm + 1e-6))
        return {name: clipping * (v - _outer(shares, gradients[name])) for name, v in u.items()}

    def _clipping(self, state: StepState) -> float:
        """What clipping by norm multiplied the gradient by (torch.nn.utils.clip_grad_norm_)."""
        settings = self.trajectory.facts.settings
        limit = settings.get("gradient_clip_val")
        if not limit or self._clip_value():
            return 1.0
        return min(1.0, float(limit) / (_norm(state.gradient.values()) + 1e-6))

    def _clip_value(self) -> float | None:
        settings = self.trajectory.facts.settings
        if not clips_by_value(settings):
            return None
        limit = settings.get("gradient_clip_val")
        return float(limit) if limit else None


def _norm(gradients: Iterable[Tensor]) -> float:
    return float(torch.stack([g.norm() for g in gradients]).norm())


def _outer(shares: Tensor, gradient: Tensor) -> Tensor:
    """[query] times the gradient's shape."""
    return shares.view(-1, *[1] * gradient.dim()) * gradient
