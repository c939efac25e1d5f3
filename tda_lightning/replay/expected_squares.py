r"""The second moments that random subsets of the data leave on average, in one replay.

Adam and its kin divide by the root of a running sum of squared gradients, so a common factor of the
loss changes nothing. What does change if a share of every batch goes is that sum: with example n
kept with probability :math:`w_n`, independently,

.. math::
    E\Big[\big(\tfrac1{|B|} \sum_n b_n g_n\big)^2\Big] =
    \big(\tfrac1{|B|} \sum_n w_n g_n\big)^2
    + \tfrac1{|B|^2} \sum_n w_n (1 - w_n)\, g_n^2

The first term is the square of the weighted gradient. The second is estimated without per-example
gradients: with independent random signs :math:`\epsilon_n` it is the mean of
:math:`(\tfrac1{|B|} \sum_n \epsilon_n \sqrt{w_n (1 - w_n)}\, g_n)^2`, one more backward pass for
each batch (Hutchinson's estimator). The optimizer averages it over many steps. The first steps
have no such average yet: a single square is close to 0 in some coordinate, and dividing by its root
makes some example's score as large as one likes. So step t takes the mean of 16 / t squares.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from tda_lightning.optimizers import STEP_COUNT, OptimizerRule, row_settings
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.trajectory import Trajectory

SETTING = "second_moments"  # of a run's facts, whose value says that they are expected ones
EXPECTED = "expected over random subsets"
_SQUARES = 16  # in the average that the optimizer has after any step


def expects_squares(trajectory: Trajectory) -> bool:
    """Whether the run was trained with expected second moments."""
    return trajectory.facts.settings.get(SETTING) == EXPECTED


def signs(row: int, batch: int, count: int) -> Tensor:
    """Random signs of the examples of a step's batch, the same in every replay: float64 [square,
    count]."""
    generator = torch.Generator().manual_seed(row * 1_000_003 + batch)
    squares = max(1, _SQUARES // (row + 1))
    return torch.randint(2, (squares, count), generator=generator).double() * 2 - 1


class ExpectedSquares:
    """Adds what is expected beyond the squared gradient, step by step, to an optimizer's sums of
    squares.

    Args:
        trajectory: of the replay.
        rule: of its optimizer, which sums squares up.
        trained: the parameters by name.
    """

    def __init__(
        self, trajectory: Trajectory, rule: OptimizerRule, trained: Mapping[str, Tensor]
    ) -> None:
        assert rule.squares is not None
        self._trajectory, self._trained = trajectory, trained
        self._key, self._weights = rule.squares
        self._sums: dict[str, dict[int, Tensor]] = {}  # by parameter and square

    def add_batch(
        self, row: int, batch: int, losses: Tensor, weights: Tensor, accumulation: int
    ) -> None:
        """Go back through the examples' parts of a batch's loss, [batch], with random signs."""
        parameters = list(self._trained.values())
        for number, own in enumerate(signs(row, batch, len(weights))):
            spread = (weights * (1 - weights)).sqrt() * own
            found = torch.autograd.grad(
                (spread.to(losses) * losses).sum() / accumulation,
                parameters,
                retain_graph=True,
                allow_unused=True,
            )
            for name, gradient in zip(self._trained, found, strict=True):
                if gradient is not None:
                    sums = self._sums.setdefault(name, {})
                    sums[number] = gradient + sums[number] if number in sums else gradient

    def enter(self, row: int, optimizer: Optimizer, clipping: float) -> None:
        """Put the expected squares of the step into the optimizer, right before its step.

        Args:
            clipping: what the step's gradient was multiplied by.
        """
        _make_states(optimizer)
        for name, sums in self._sums.items():
            group = self._trajectory.facts.parameters[name].group
            keep, add = self._weights(row_settings(self._trajectory, row, group))
            if keep == 0:
                raise UnsupportedTrainingError(
                    f"The optimizer keeps nothing of earlier squared gradients of {name} (beta2 or "
                    "alpha is 0), so expected ones cannot be entered. Ask with draws=4 (random "
                    "subsets) or draws=0 (the same weight on every example)."
                )
            state = optimizer.state.get(self._trained[name])
            if state:
                # The step multiplies by ``keep`` what was there before it.
                squares = torch.stack([(clipping * total).square() for total in sums.values()])
                state[self._key].add_(squares.mean(0), alpha=add / keep)
        self._sums = {}


def _make_states(optimizer: Optimizer) -> None:
    """torch.optim makes a parameter's state with its first step: here by one that moves nothing."""
    new = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None and not optimizer.state.get(parameter)
    ]
    if not new:
        return
    gradients = {p: p.grad for group in optimizer.param_groups for p in group["params"]}
    settings = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    try:
        for parameter in gradients:
            parameter.grad = None
        for parameter in new:
            parameter.grad = torch.zeros_like(parameter)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 0.0, 0.0
        optimizer.step()
        for parameter in new:
            state = optimizer.state[parameter]
            if STEP_COUNT in state:
                state[STEP_COUNT] = torch.zeros_like(state[STEP_COUNT])
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for group, (rate, decay) in zip(optimizer.param_groups, settings, strict=True):
            group["lr"], group["weight_decay"] = rate, decay
