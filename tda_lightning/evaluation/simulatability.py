r"""Do scores tell what a little more training on an example does to a prediction?

A few steps of gradient descent on a single training example, from the trained weights:

.. math::
    \theta \leftarrow \theta - \epsilon\, \nabla_\theta l_n(\theta)

A positive score says that without the example the query's measurement would be larger, so more
of it should make the measurement smaller. One step of a small rate moves it by
:math:`-\epsilon\, \nabla m_q^T \nabla l_n`, whatever the curvature is; scores with curvature may
rightly rank other examples first.

References:
    | FastIF (Guo et al., 2021), sec. 5.1 (explainability), https://arxiv.org/abs/2012.15781
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tda_lightning.evaluation.linear_datamodeling import Interval, bootstrap, rank_correlation
from tda_lightning.evaluation.retraining import by_prepared, measure, require_finite
from tda_lightning.measurements import Measurement
from tda_lightning.records.scores import Scores
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.module_state import borrowed, load_tensors
from tda_lightning.runtime.progress import SlowProgress
from tda_lightning.session.moments import show
from tda_lightning.tasks import AttributionTask, as_task, seeded_examples

KINDS = ("helpful", "harmful", "random")


@dataclass(frozen=True)
class Simulation:
    """What steps on single examples do, and whether the scores foresaw it.

    Attributes:
        steps: number of steps.
        change: of the measurement, mean over a query's examples, by kind: its strongest proponents
            (*helpful*), its strongest opponents (*harmful*), or *random* ones.
        agrees: share of the examples whose score has the sign of what happened, by kind.
        rank: Spearman's correlation of score and fall over all of a query's examples.
    """

    steps: int
    change: Mapping[str, Interval]
    agrees: Mapping[str, Interval]
    rank: Interval


def chosen_examples(scores: Scores, each: int = 3, seed: int = 0) -> Tensor:
    """Each query's ``each`` strongest proponents, strongest opponents, and random scored examples:
    int64 [query, kind, each]."""
    own = torch.Generator().manual_seed(seed)
    rows = []
    for query in range(scores.num_queries):
        everything = scores.proponents(query, scores.num_scored)[0]
        drawn = torch.randperm(len(everything), generator=own)[:each]
        picks = [scores.proponents(query, each)[0], scores.opponents(query, each)[0]]
        rows.append(torch.stack([*picks, everything[drawn]]))
    return torch.stack(rows)


def fine_tuned_changes(
    module: nn.Module,
    task: AttributionTask | None,
    trajectory: Trajectory,
    dataset: object,
    queries: object,
    examples: Sequence[int],
    steps: Sequence[int] = (1, 5),
    rate: float = 0.01,
    measurement: Measurement | None = None,
) -> Tensor:
    """How gradient descent on each of ``examples`` alone changes every measurement: float64 [query,
    example, steps].

    Args:
        module: as it was trained; restored at the end. It descends in eval mode.
        task: gives the loss of a training example.
        trajectory: the recorded run, whose last weights it starts from.
        dataset: the training set.
        queries: what is measured.
        examples: indices of training examples.
        steps: numbers of steps after which to measure, in increasing order.
        rate: of plain gradient descent.
        measurement: what was asked about the queries; None: the task's own measurement.

    Raises:
        NonFiniteError: a smaller rate is needed.
    """
    require_steps(steps, rate)
    train = ExampleSource.of(dataset, 1, "training")
    asked = train.others(queries, 256, "query")
    last = trajectory.checkpoints[trajectory.last_step]
    start = {**last.buffers, **last.parameters}
    own = as_task(task)

    def measured(state: Mapping[str, Tensor]) -> Tensor:
        found = measure(module, own, state, asked, 256, trajectory, measurement)
        return found.double().cpu()

    before = measured(start)

    def tuned(prepared: AttributionTask) -> Tensor:
        changes = torch.zeros(len(before), len(examples), len(steps), dtype=torch.float64)
        with SlowProgress("Fine-tuning on single examples", len(examples)) as progress:
            for column, example in enumerate(examples):
                work = (module, prepared, trajectory, start, train, example)
                for number, state in enumerate(_descent(*work, steps, rate)):
                    changes[:, column, number] = measured(state) - before
                progress.advance()
        return changes

    return by_prepared(own, tuned, module, start, train, trajectory)


def _descent(
    module: nn.Module,
    task: AttributionTask,
    trajectory: Trajectory,
    start: Mapping[str, Tensor],
    train: ExampleSource,
    example: int,
    steps: Sequence[int],
    rate: float,
) -> list[dict[str, Tensor]]:
    """The weights after each number of steps on one example."""
    states = []
    index = torch.tensor([example])
    with borrowed(module):
        load_tensors(module, start)
        module.eval()
        show(module, trajectory, trajectory.last_step - 1, source=train)
        named = dict(module.named_parameters())
        trained = [named[name].requires_grad_() for name in trajectory.facts.parameters]
        batch = train.checked(module).batch(index, module)
        for step in range(1, steps[-1] + 1):
            with seeded_examples(0, index):
                loss = task.train_loss(module, batch).sum()
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            with torch.no_grad():
                for parameter, gradient in zip(trained, gradients, strict=True):
                    if gradient is not None:
                        parameter.sub_(gradient, alpha=rate)
            if step in steps:
                own = {name: named[name].detach().clone() for name in trajectory.facts.parameters}
                require_finite(own)
                states.append({**start, **own})
    return states


def simulatability(
    scores: Scores, chosen: Tensor, changes: Sequence[Tensor] | Tensor, steps: Sequence[int]
) -> list[Simulation]:
    """Compare scores with what fine-tuning on their examples did, for each number of steps.

    Args:
        scores: [query, train].
        chosen: :func:`chosen_examples`, [query, kind, each].
        changes: of each query's own examples, [query, kind, each, steps].
        steps: the numbers of steps.

    Example:
        >>> scores = Scores(torch.tensor([[3.0, -1.0, 2.0, -2.0]]))
        >>> chosen = chosen_examples(scores, each=1)
        >>> fell = -scores.values.gather(1, chosen.flatten(1)).view(1, 3, 1, 1)
        >>> simulatability(scores, chosen, fell, [1])[0].agrees["harmful"].value
        1.0
    """
    moved = torch.as_tensor(changes) if isinstance(changes, Tensor) else torch.stack([*changes])
    values = scores.values.cpu().double().gather(1, chosen.flatten(1))
    said = values.view(chosen.shape)
    found = []
    for number, count in enumerate(steps):
        change = moved[..., number].double()
        agree = (change.sign() == -said.sign()).double()
        found.append(
            Simulation(
                count,
                {kind: bootstrap(change[:, n].mean(1)) for n, kind in enumerate(KINDS)},
                {kind: bootstrap(agree[:, n].mean(1)) for n, kind in enumerate(KINDS)},
                bootstrap(rank_correlation(values, -change.flatten(1))),
            )
        )
    return found


def require_steps(steps: Sequence[int], rate: float) -> None:
    """Refuse steps or a rate that are none.

    Raises:
        ValueError: says what was expected.
    """
    ascending = list(steps) == sorted(set(steps)) and all(type(step) is int for step in steps)
    if not steps or not ascending or steps[0] < 1:
        raise ValueError(
            f"Expected numbers of steps in increasing order, such as [1, 5], got {list(steps)}."
        )
    if not rate > 0:
        raise ValueError(f"The rate of fine-tuning must be positive, got {rate}.")
