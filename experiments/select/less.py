r"""Gradient matching as LESS does it (Xia et al. 2024, 2402.04333, sec. 3 and 4.2).

.. math::
    s_{qn} = \sum_c \bar\eta_c\, \cos\big(\nabla m_q(\theta_c),\, \Gamma(z_n, \theta_c)\big)

with :math:`\Gamma` the update that Adam would make of the example's gradient with the states it
had at checkpoint c, and :math:`\bar\eta_c` the mean rate since the checkpoint before. Departures:
full gradients of all weights, where the paper projects those of an adapter at random, and no
warm-up: the checkpoints are those of the recorded run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from experiments.select.recorded import Run

_BATCH = 64
EVERY = 2  # of the recorded checkpoints


def less_scores(run: Run) -> Tensor:
    """By target pair and pair of the pool, [target, pool]; the largest match best."""
    total = torch.zeros(len(run.target), len(run.labels))
    before = 0
    for step in sorted(run.trajectory.checkpoints)[EVERY::EVERY]:
        rates = run.trajectory.steps.learning_rate[before:step]
        checkpoint = run.trajectory.checkpoints[step]
        asked = torch.cat([*gradients(run, checkpoint.parameters, run.target)])
        asked = F.normalize(asked, dim=1)
        moments = adam_states(run, step)
        for place, rows in enumerate(gradients(run, checkpoint.parameters, run.pool)):
            updates = F.normalize(adam_update(rows, *moments), dim=1)
            columns = slice(place * _BATCH, place * _BATCH + len(rows))
            total[:, columns] += float(rates.mean()) * asked @ updates.T
        before = step
    return total


def gradients(run: Run, weights: Mapping[str, Tensor], pairs: Dataset) -> Iterator[Tensor]:
    """Gradients of the loss of single pairs, in batches of [batch, weight]."""
    run.module.eval()

    def loss(parameters: Mapping[str, Tensor], tokens: Tensor, label: Tensor) -> Tensor:
        outputs = torch.func.functional_call(run.module, parameters, (tokens[None],))
        return F.cross_entropy(outputs, label[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    values = {name: value.detach() for name, value in weights.items()}
    size: int = len(pairs)  # type: ignore[arg-type]
    for start in range(0, size, _BATCH):
        items = [pairs[n] for n in range(start, min(start + _BATCH, size))]
        found = each(values, *(torch.stack(part) for part in zip(*items, strict=True)))
        yield torch.cat([found[name].flatten(1) for name in values], dim=1)


def adam_states(run: Run, step: int) -> tuple[Tensor, Tensor, int, float, float, float]:
    """First and second moments [weight], the count of steps, and beta1, beta2 and eps."""
    checkpoint = run.trajectory.checkpoints[step]
    assert checkpoint.optimizer is not None
    states = [checkpoint.optimizer[name] for name in checkpoint.parameters]
    first, second = (
        torch.cat([state[key].flatten() for state in states]) for key in ("exp_avg", "exp_avg_sq")
    )
    settings = {
        name: float(values[step - 1, 0])
        for name, values in run.trajectory.steps.hyperparameters.items()
    }
    return first, second, step, settings["beta1"], settings["beta2"], settings["eps"]


def adam_update(
    rows: Tensor, first: Tensor, second: Tensor, count: int, beta1: float, beta2: float, eps: float
) -> Tensor:
    """What Adam's next step would be made of for each gradient, [batch, weight]."""
    own = (beta1 * first + (1 - beta1) * rows) / (1 - beta1 ** (count + 1))
    square = (beta2 * second + (1 - beta2) * rows.square()) / (1 - beta2 ** (count + 1))
    return own / (square.sqrt() + eps)
