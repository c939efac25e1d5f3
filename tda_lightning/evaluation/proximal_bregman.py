r"""The proximal Bregman response: the question that damped influence functions answer.

They do not approximate training a network without an example (Bae et al. 2022), but this: stay near
the trained weights :math:`\theta_s`, in outputs (by the loss's Bregman divergence) and in weights
(by the damping), while giving up the example's loss,

.. math::
    \theta^*_n = \arg\min_\theta \frac1N \sum_i D_i\big(o_i(\theta), o_i(\theta_s)\big)
        - \frac1N l_n(\theta) + \frac{\lambda}{2} |\theta - \theta_s|^2

The response is :math:`m_q(\theta^*_n) - m_q(\theta_s)`, in the unit of scores. To second order
around :math:`\theta_s` it is the influence function with the Gauss-Newton matrix and damping
:math:`\lambda`.

References:
    | If Influence Functions are the Answer, Then What is the Question? (Bae et al., 2022), eq. 13
    | https://arxiv.org/abs/2209.05364
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tda_lightning.evaluation.retraining import measure
from tda_lightning.optimizers import weight_decay
from tda_lightning.records.errors import NonFiniteError
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.module_state import borrowed, load_tensors
from tda_lightning.tasks import AttributionTask, ClassificationTask, RegressionTask, seeded_examples


class _Constant(nn.Module):
    """A network with fixed outputs, so that a task's loss is a function of them."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *_: object, **__: object) -> Tensor:
        return self.outputs


def proximal_bregman_response(
    module: nn.Module,
    task: ClassificationTask | RegressionTask,
    state: Mapping[str, Tensor],
    dataset: object,
    queries: object,
    examples: Sequence[int],
    damping: float,
    iterations: int = 200,
    batch_size: int = 256,
) -> Tensor:
    """The response of every query to giving up each of ``examples``, float64 [query, example].

    The minimum over all parameters that require gradients, found by L-BFGS on the whole training
    set in the module's precision. Use float64: responses to single examples are tiny.

    Args:
        module: restored at the end.
        task: its loss must be a function of outputs and labels.
        state: the trained weights and buffers.
        dataset: the training set.
        queries: the queries to measure.
        examples: indices of training examples.
        damping: of the influence function, plus the weight decay.
        iterations: most iterations of L-BFGS per example.
        batch_size: training examples at a time.

    Raises:
        NonFiniteError: the minimisation diverged; a larger damping stays closer.
    """
    work = (module, task, state, dataset, queries, examples, damping, iterations, batch_size)
    return torch.stack(list(each_response(*work)), dim=1)


def each_response(
    module: nn.Module,
    task: AttributionTask | None,
    state: Mapping[str, Tensor],
    dataset: object,
    queries: object,
    examples: Sequence[int],
    damping: float,
    iterations: int = 200,
    batch_size: int = 256,
) -> Iterator[Tensor]:
    """:func:`proximal_bregman_response` one example at a time, float64 [query]."""
    if not isinstance(task, (ClassificationTask, RegressionTask)):
        raise TypeError(
            "The Bregman divergence needs a loss that is a function of outputs and labels: "
            f"expected a ClassificationTask or a RegressionTask, got {type(task).__name__}."
        )
    if not damping > 0:
        raise ValueError(f"damping must be positive for a unique response, got {damping}.")
    source = ExampleSource.of(dataset, batch_size, "training")
    before = measure(module, task, state, queries)
    with borrowed(module):
        load_tensors(module, state)
        module.eval()
        batches = [(source.batch(rows, module), torch.tensor(rows)) for rows in source.batches()]
        anchors = [_anchor(module, task, *batch) for batch in batches]
        for example in examples:
            load_tensors(module, state)
            given_up = source.batch([example], module), torch.tensor([example])
            _minimise(module, task, batches, anchors, given_up, len(source), damping, iterations)
            moved = {name: tensor.detach().clone() for name, tensor in _tensors(module).items()}
            if not all(bool(tensor.isfinite().all()) for tensor in moved.values()):
                raise NonFiniteError(
                    f"The response to example {example} diverged. Use a larger damping than "
                    f"{damping:g}."
                )
            yield (measure(module, task, moved, queries) - before).double().cpu()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _anchor(
    module: nn.Module,
    task: ClassificationTask | RegressionTask,
    batch: object,
    examples: Tensor,
) -> tuple[Tensor, Tensor]:
    """Outputs of the trained weights, and the derivative of the summed losses in them."""
    with torch.enable_grad(), seeded_examples(0, examples):
        outputs = task.forward(module, batch)[0].detach().requires_grad_()
        (slope,) = torch.autograd.grad(task.train_loss(_Constant(outputs), batch).sum(), outputs)
    return outputs.detach(), slope


def _minimise(
    module: nn.Module,
    task: ClassificationTask | RegressionTask,
    batches: Sequence[tuple[object, Tensor]],
    anchors: Sequence[tuple[Tensor, Tensor]],
    given_up: tuple[object, Tensor],
    num_train: int,
    damping: float,
    iterations: int,
) -> None:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=iterations,
        history_size=50,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        total = 0.0
        for (batch, examples), (anchor, slope) in zip(batches, anchors, strict=True):
            with seeded_examples(0, examples):
                outputs = task.forward(module, batch)[0]
                # The constant of the divergence, the loss at the anchor, does not move the minimum.
                losses = task.train_loss(_Constant(outputs), batch).sum()
            part = (losses - (slope * (outputs - anchor)).sum()) / num_train
            part.backward()
            total += float(part.detach())
        pairs = zip(parameters, start, strict=True)
        near = sum((parameter - at).square().sum() for parameter, at in pairs)
        with seeded_examples(0, given_up[1]):
            part = damping / 2 * near - task.train_loss(module, given_up[0]).sum() / num_train
        part.backward()
        return part.detach() + total

    with torch.enable_grad():
        optimizer.step(objective)  # type: ignore[arg-type]


def total_damping(trajectory: Trajectory, damping: float) -> float:
    """``damping`` plus the recorded weight decay, as influence functions add them.

    Raises:
        ValueError: parameters differ in their weight decay.
    """
    last = trajectory.last_step
    rates = weight_decay(trajectory, slice(last - 1, last))[0]
    decays = {float(rates[fact.group]) for fact in trajectory.facts.parameters.values()}
    if len(decays) > 1:
        raise ValueError(
            "The proximal Bregman response needs one weight decay for all parameters, got "
            f"{sorted(decays)}. Judge by protocol=single_run."
        )
    return damping + decays.pop()


def in_double(module: nn.Module, *datasets: Any) -> tuple[Any, ...]:
    """A copy of the module, and the data sets, in double precision."""
    return copy.deepcopy(module).double(), *map(_in_double, datasets)


def _in_double(data: Any) -> Any:
    if isinstance(data, ExampleSource):
        return data.with_dataset(_DoubleDataset(data.dataset))
    return _DoubleDataset(data)


class _DoubleDataset(torch.utils.data.Dataset[object]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> object:
        return pytree.tree_map(_doubled, self.dataset[index])


def _doubled(leaf: object) -> object:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
