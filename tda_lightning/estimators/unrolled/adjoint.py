r"""Adjoints of the optimizers' steps: how a change of a step's gradient reaches the measurement.

``a`` is the derivative of the measurement with respect to the parameters after a step, ``b`` to the
momentum buffer or Adam's first moment, ``e`` to the second moment. With g the gradient as the
optimizer sees it, :meth:`OptimizerAdjoint.enter` gives :math:`u = \partial m / \partial g` and
:meth:`OptimizerAdjoint.leave` ends the step; the Hessian's part, :math:`a \mathrel{+}= H u`, is
added in between (docs/methods.md, "Exact unrolling").
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tda_lightning.estimators.unrolled.tape import StepState
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.replay.run import clips_by_value

# The first steps of Adam cancel: where |g| is far above eps their update hardly depends on |g|,
# and what is left of two large terms is lost in float32.
_CANCELLING_STEPS = 16


@dataclass
class OptimizerAdjoint:
    """The adjoints of some queries: [query, *shape] by parameter.

    Attributes:
        trajectory: of the run.
        a: with respect to the parameters.
        b: the momentum buffer or first moment; of a parameter that has none, absent.
        e: the second moment.
    """

    trajectory: Trajectory
    a: dict[str, Tensor]
    b: dict[str, Tensor] = field(default_factory=dict)
    e: dict[str, Tensor] = field(default_factory=dict)

    def enter(self, state: StepState) -> dict[str, Tensor]:
        """Go back through the optimizer's step.

        Returns:
            u = d m / d g by parameter, of the gradient before clipping. It may share memory with
            the adjoints until :meth:`leave`.
        """
        optimizer = self.trajectory.facts.optimizer
        u: dict[str, Tensor] = {}
        for name in self.a:
            if name in state.without:
                continue
            if optimizer == "SGD":
                u[name] = self._enter_sgd(name, state)
            else:
                u[name] = self._enter_adam(name, state, decoupled=optimizer == "AdamW")
        return self._before_clipping(u, state)

    def leave(self, state: StepState) -> None:
        """Go on to the state before the step."""
        for name in self.a:
            if name in state.without:
                continue
            if self.trajectory.facts.optimizer == "SGD":
                momentum = self._setting("momentum", name, state)
                if name in state.fresh:
                    self.b.pop(name, None)
                elif momentum and name in self.b:
                    self.b[name].mul_(momentum)
            else:
                self.b[name].mul_(self._setting("beta1", name, state))
                self.e[name].mul_(self._setting("beta2", name, state))

    def _enter_sgd(self, name: str, state: StepState) -> Tensor:
        a, rate = self.a[name], self._rate(name, state)
        momentum, decay = (self._setting(key, name, state) for key in ("momentum", "weight_decay"))
        if momentum:
            nesterov = bool(self._setting("nesterov", name, state))
            # torch.optim.SGD begins a buffer with the whole gradient.
            fresh = name in state.fresh
            taken = 1.0 if fresh else 1 - self._setting("dampening", name, state)
            if name not in self.b:
                self.b[name] = torch.zeros_like(a)
            b = self.b[name]
            b.add_(a, alpha=-rate * (momentum if nesterov else 1))
            u = b if taken == 1 else taken * b
            if nesterov:
                u = torch.add(u, a, alpha=-rate)
        else:
            u = -rate * a
        if decay:
            a.add_(u, alpha=decay)
        return u

    def _enter_adam(self, name: str, state: StepState, decoupled: bool) -> Tensor:
        count = state.count[name]
        if count <= _CANCELLING_STEPS:
            self.a[name] = self.a[name].double()
        a = self.a[name]
        b, e = self._moments(name, a)
        rate, eps, decay, beta1, beta2 = (
            self._rate(name, state),
            *(self._setting(key, name, state) for key in ("eps", "weight_decay", "beta1", "beta2")),
        )
        c1, c2 = 1 - beta1**count, 1 - beta2**count
        first, second = state.first[name].to(a), state.second[name].to(a)
        gradient = self._seen(name, state).to(a)
        root = (second / c2).sqrt_()
        denominator = root + eps
        moved = second != 0  # the others never had a gradient, and get none
        b.addcmul_(a, torch.where(moved, 1 / denominator, 0), value=-rate / c1)
        through_root = first / (2 * c2 * root * denominator**2)
        e.addcmul_(a, torch.where(moved, through_root, 0), value=rate / c1)
        u = torch.mul(e, 2 * (1 - beta2) * gradient).add_(b, alpha=1 - beta1)
        if decoupled:
            a.mul_(1 - rate * decay)
        elif decay:
            a.add_(u, alpha=decay)
        return u

    def _moments(self, name: str, a: Tensor) -> tuple[Tensor, Tensor]:
        """Adjoints of both moments in the precision of ``a``; zero at the end of training."""
        for adjoints in (self.b, self.e):
            found = adjoints.get(name)
            adjoints[name] = torch.zeros_like(a) if found is None else found.to(a.dtype)
        return self.b[name], self.e[name]

    def _seen(self, name: str, state: StepState) -> Tensor:
        """The gradient as Adam saw it: clipped, with coupled weight decay."""
        gradient = state.gradient[name] * self._clipping(state)
        if by_value := self._clip_value():
            gradient = gradient.clamp(-by_value, by_value)
        decay = self._setting("weight_decay", name, state)
        if self.trajectory.facts.optimizer == "Adam" and decay:
            gradient = gradient + decay * state.parameters[name]
        return gradient

    def _before_clipping(self, u: dict[str, Tensor], state: StepState) -> dict[str, Tensor]:
        """d m / d (gradient before clipping), from that after it."""
        if by_value := self._clip_value():
            return {
                name: v * (state.gradient[name].abs() <= by_value).to(v.device)
                for name, v in u.items()
            }
        factor = self._clipping(state)
        if factor == 1:
            return u
        gradients = {name: state.gradient[name].to(v) for name, v in u.items()}
        norm = _norm(gradients.values())
        along = sum((v * gradients[n]).flatten(1).sum(1) for n, v in u.items())
        assert isinstance(along, Tensor)
        shares = along / (norm * (norm + 1e-6))
        return {name: factor * (v - _outer(shares, gradients[name])) for name, v in u.items()}

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

    def _rate(self, name: str, state: StepState) -> float:
        group = self.trajectory.facts.parameters[name].group
        return float(self.trajectory.steps.learning_rate[state.row, group])

    def _setting(self, key: str, name: str, state: StepState) -> float:
        group = self.trajectory.facts.parameters[name].group
        return float(self.trajectory.steps.hyperparameters[key][state.row, group])


def _norm(gradients: Iterable[Tensor]) -> float:
    return float(torch.stack([g.norm() for g in gradients]).norm())


def _outer(shares: Tensor, gradient: Tensor) -> Tensor:
    """[query] times the gradient's shape."""
    return shares.view(-1, *[1] * gradient.dim()) * gradient
