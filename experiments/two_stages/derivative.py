r"""The exact first-order effect of leaving groups out of stage 1, through both stages.

What exact unrolling differentiates, here forwards: with the recorded batches, rates and momentum of
both stages, the change of the weights under a change :math:`\delta w` of the examples' weights is
carried along step by step,

.. math::
    \delta g = H_t\, \delta\theta + \frac1{|B_t|} \sum_{n \in B_t} \delta w_n \nabla l_n,
    \qquad \delta b \leftarrow \mu\, \delta b + \delta g,
    \qquad \delta\theta \leftarrow \delta\theta - \eta_t\, \delta b

One pass forwards serves every query and all groups at once, where going backwards serves every
example and all queries at once. Hessians are those between kinks: a change so small that no unit
switches on or off.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.data import TensorDataset

from tda_lightning import Trajectory
from tda_lightning.runtime.progress import SlowProgress

Named = dict[str, Tensor]


def derivative(
    runs: Sequence[Trajectory],
    module: nn.Module,
    stages: Sequence[TensorDataset],
    queries: TensorDataset,
    subsets: Tensor,
    weights: Sequence[float] = (1.0, 1.0),
) -> Tensor:
    """Predicted change of each query's loss when what a subset leaves out of stage 1 goes.

    Args:
        runs: of SGD with momentum, each started from the end of the one before it.
        module: a classifier without dropout or batch statistics.
        stages: the training sets.
        queries: measured after the last stage.
        subsets: which examples of stage 1 each keeps, bool [subset, train].
        weights: of every example of each stage, where the derivative is taken; below 1 the runs
            are trained again with them on the way.

    Returns:
        float [query, subset].
    """
    began = runs[0].checkpoints[0].parameters
    at = {name: tensor.clone() for name, tensor in began.items()}
    moved = {name: tensor.new_zeros(len(subsets), *tensor.shape) for name, tensor in at.items()}
    changes = -(~subsets).to(next(iter(at.values())).dtype)
    with SlowProgress("Derivative of both stages", sum(run.num_steps for run in runs)) as progress:
        for number, (run, data, weight) in enumerate(zip(runs, stages, weights, strict=True)):
            own = changes if number == 0 else changes.new_zeros(len(subsets), len(data))
            buffer = {name: torch.zeros_like(tensor) for name, tensor in at.items()}
            moved_buffer = {name: torch.zeros_like(tensor) for name, tensor in moved.items()}
            for row in range(run.num_steps):
                (batch,) = run.steps.batches(row)
                rate = float(run.steps.learning_rate[row, 0])
                momentum = float(run.steps.hyperparameters["momentum"][row, 0])
                slope, turned = _gradients(module, data, batch, at, moved, own[:, batch], weight)
                for name in at:
                    buffer[name] = momentum * buffer[name] + slope[name]
                    moved_buffer[name] = momentum * moved_buffer[name] + turned[name]
                    at[name] = at[name] - rate * buffer[name]
                    moved[name] = moved[name] - rate * moved_buffer[name]
                progress.advance()
    inputs, labels = queries.tensors

    def losses(parameters: Named) -> Tensor:
        outputs = functional_call(module, parameters, (inputs,))
        return F.cross_entropy(outputs, labels, reduction="none")

    return vmap(lambda change: jvp(losses, (at,), (change,))[1], out_dims=1)(moved)


def _gradients(
    module: nn.Module,
    data: TensorDataset,
    batch: Tensor,
    at: Named,
    moved: Named,
    changes: Tensor,
    weight: float,
) -> tuple[Named, Named]:
    """Gradient of a batch whose examples have one weight, and how it changes with the parameters
    and with the examples' weights."""
    inputs, labels = data[batch]

    def loss(parameters: Named, weights: Tensor) -> Tensor:
        outputs = functional_call(module, parameters, (inputs,))
        return (weights * F.cross_entropy(outputs, labels, reduction="none")).mean()

    slope, whole = grad(loss), torch.full((len(batch),), weight, dtype=changes.dtype)

    def turned(change: Named, weights: Tensor) -> Named:
        return jvp(slope, (at, whole), (change, weights))[1]

    return slope(at, whole), vmap(turned)(moved, changes)
