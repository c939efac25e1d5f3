r"""Replay the recorded run with weighted examples: the truth that scores are judged by.

Everything comes from the trajectory: initial weights (checkpoint 0), batches in their recorded
order, applied rates, optimizer settings and clipping. The loss of a batch is

.. math::
    L_B = \frac1{|B|} \sum_{n \in B} w_n\, l_n(\theta)

so an example of weight 0 leaves its batch while the *denominator stays the same*. This differs from
a smaller training set, where every other example gains weight; see
:func:`~tda_lightning.evaluation.as_removal`. With batch statistics (BatchNorm in train mode), an
example of weight 0 still contributes to the statistics.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor, nn

from tda_lightning.evaluation.stacked_replay import draws_alike, replay_stacked
from tda_lightning.measurements import Measurement
from tda_lightning.optimizers import rule_of
from tda_lightning.records.data_module import require_data_module
from tda_lightning.records.errors import NonFiniteError, UnseenBatchError
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.replay.prepared import again_where_unseen, prepared
from tda_lightning.replay.run import Replay, State, Walk
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.module_state import borrowed, load_tensors
from tda_lightning.runtime.random_states import unchanged_randomness
from tda_lightning.session.moments import show
from tda_lightning.tasks import (
    MEASURED_SEED,
    AttributionTask,
    as_task,
    numbered_draw,
    seeded_examples,
    watching_noise,
)
from tda_lightning.tasks.example_seeds import active_examples

Result = TypeVar("Result")

_FEW = 8  # examples that a task is prepared on for a measurement
ROUNDING = 1e-2  # landing errors up to here are rounding errors, even amplified over a long run


def retrain(
    trajectory: Trajectory,
    module: nn.Module,
    task: AttributionTask | None,
    dataset: object,
    weights: Tensor,
    training: bool = True,
) -> State:
    """Replay the recorded run with example n's loss multiplied by ``weights[n]``.

    With all weights 1 it lands on the last checkpoint, bit for bit or to rounding;
    :func:`landing_error` says how closely.

    Args:
        trajectory: the recorded run.
        module: built as it was trained; it is restored at the end.
        task: gives each example's training loss; None for the module's own ``training_step``.
        dataset: the recorded training set, or a ``DataLoader`` over it for its collate function.
        weights: [train], 0 for an example left out.
        training: replay in train mode, as Lightning trains; False for eval mode.

    Returns:
        Parameters and buffers after the last step, by name.

    Raises:
        TrajectoryMismatchError: another number of training examples than recorded.
        UnsupportedTrainingError: the run cannot be replayed: no recorded batches, mixed precision,
            or random numbers in training (dropout) without recorded generator states.
        NonFiniteError: training with these weights diverged.
    """
    (state,) = retrain_each(trajectory, module, task, dataset, weights[None], training)
    return state


def retrain_each(
    trajectory: Trajectory,
    module: nn.Module,
    task: AttributionTask | None,
    dataset: object,
    weights: Tensor,
    training: bool = True,
    together: int = 1,
) -> Iterator[State]:
    """:func:`retrain` for every row of ``weights``, [runs, train].

    Args:
        weights: or [runs, train, position], for each term of an example's loss (the tokens of a
            sequence, as in ``Scores.by_token``), one run after another.
        together: runs to train at once through ``torch.func.vmap``, equal up to rounding: 38
            times faster for an MLP of 1,400 weights (50 at once), 8 times for 18,000. 1 is the
            plain loop; an optimizer that mixes a parameter's elements always takes it, and so
            does training whose recorded random numbers are not drawn alike for stacked models.

    Raises:
        As :func:`retrain` does.
    """
    source = ExampleSource.of(dataset, 1, "training")
    replay = Replay(trajectory, module, as_task(task), source, training)
    replay.check()
    _check_weights(replay, weights)
    if not bool((weights == 1).all()):
        replay.task = prepared(replay)
    vectorised = rule_of(trajectory).elementwise and not replay.task.one_by_one
    vectorised &= weights.dim() == 2
    if together > 1 and not (vectorised and draws_alike(replay)):
        together = 1
    for part in weights.split(together):
        for state in again_where_unseen(replay, functools.partial(_run_all, replay, part)):
            require_finite(state)
            yield state


def _run_all(replay: Replay, weights: Tensor) -> list[State]:
    if len(weights) == 1 or replay.task.one_by_one:
        return [_run(replay, own) for own in weights]
    return list(replay_stacked(replay, weights))


def _run(replay: Replay, weights: Tensor) -> State:
    """One run by torch.optim."""
    own = None if bool((weights == 1).all()) else weights
    with borrowed(replay.module), replay.as_trained():
        walk = Walk(replay)
        walk.restart(0)
        for row in range(replay.trajectory.last_step):
            walk.step(row, own)
        return dict(walk.snapshot().tensors)


def _check_weights(replay: Replay, weights: Tensor) -> None:
    shaped = weights.dim() in (2, 3) and weights.shape[1] == len(replay.source)
    if not shaped or not weights.numel():
        raise ValueError(
            f"weights must have the shape [runs, {len(replay.source)}], at least one run and one "
            f"number for each training example, got {list(weights.shape)}."
        )


def require_finite(state: Mapping[str, Tensor]) -> None:
    """Refuse a training run that diverged.

    Raises:
        NonFiniteError: names the first parameter or buffer that is not finite.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NonFiniteError(
                f"Retraining ended with {name} not finite: training with these weights diverged."
            )


def measure(
    module: nn.Module,
    task: AttributionTask | None,
    state: Mapping[str, Tensor],
    queries: object,
    batch_size: int = 256,
    trajectory: Trajectory | None = None,
    measurement: Measurement | None = None,
) -> Tensor:
    """Measurement of every query under ``state``, in eval mode: [query].

    Where it draws random numbers, it is the mean over ``task.draws`` draws, which are those that
    scores are about.

    Args:
        trajectory: of the run that ends in ``state``, for a ``training_step`` that reads its epoch,
            step or rates.
        measurement: what was asked about (``tda_lightning.measurements``); None: the task's own.
    """
    source, given = ExampleSource.of(queries, batch_size, "query"), as_task(task)

    def measured(chosen: AttributionTask) -> Tensor:
        def read(batch: object) -> Tensor:
            if measurement is None:
                return chosen.measurement(module, batch).detach()
            indices = active_examples()
            assert indices is not None
            return measurement.measure(chosen, module, batch, indices).detach()

        each_draw = []
        for number in range(chosen.draws):
            with numbered_draw(number):
                found = of_each_batch(read, module, state, source, MEASURED_SEED, trajectory)
                each_draw.append(torch.cat(found))
        return torch.stack(each_draw).mean(0) if len(each_draw) > 1 else each_draw[0]

    return by_prepared(given, measured, module, state, source, trajectory)


def losses(
    module: nn.Module,
    task: AttributionTask | None,
    state: Mapping[str, Tensor],
    dataset: object,
    batch_size: int = 256,
    trajectory: Trajectory | None = None,
) -> Tensor:
    """Loss of every training example under ``state``, in eval mode: [train], as in
    :func:`measure`."""
    source, given = ExampleSource.of(dataset, batch_size, "training"), as_task(task)

    def lost(chosen: AttributionTask) -> Tensor:
        def read(batch: object) -> Tensor:
            return chosen.train_loss(module, batch).detach()

        return torch.cat(of_each_batch(read, module, state, source, trajectory=trajectory))

    return by_prepared(given, lost, module, state, source, trajectory)


def by_prepared(
    task: AttributionTask,
    work: Callable[[AttributionTask], Tensor],
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: ExampleSource,
    trajectory: Trajectory | None,
) -> Tensor:
    """``work`` with a task that knows how losses are made: a copy prepared on some of the examples
    where it does not."""
    if task.prepared:
        return work(task)
    own = copy.deepcopy(task)
    own.training_batch_size = own.training_batch_size or 1
    for _ in range(3):  # again where a batch is made otherwise than those it was prepared on
        with borrowed(module), unchanged_randomness():
            load_tensors(module, state)
            module.eval()
            if trajectory is not None:
                show(module, trajectory, trajectory.last_step - 1, source=source)
            checked = source.checked(module)
            chunks = [torch.tensor(indices) for indices in checked.batches()]
            few = torch.linspace(0, len(source) - 1, min(_FEW, len(source))).long().unique()
            try:
                batch = checked.batch(few, module)
            except ValueError:  # a loader that reorders a batch can be asked for one example
                few = chunks[0][:1]
                batch = checked.batch(few, module)
            with seeded_examples(0, few):
                own.prepare(module, batch)
            own.average(module, lambda: ((checked.batch(c, module), c) for c in chunks))  # noqa: B023
        with suppress(UnseenBatchError):
            return work(own)
    return work(own)


def of_each_batch(
    read: Callable[[object], Result],
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: ExampleSource,
    seed: int = 0,
    trajectory: Trajectory | None = None,
) -> list[Result]:
    """The results of ``read`` for each batch of ``source``, in order, with the module in eval mode
    under ``state``, at the end of ``trajectory``; ``seed`` is that of the noise drawn in it."""
    results = []
    with borrowed(module), torch.no_grad():
        load_tensors(module, state)
        module.eval()
        if trajectory is not None:
            require_data_module(trajectory.facts, source)
            show(module, trajectory, trajectory.last_step - 1, source=source)
        source = source.checked(module)
        for indices in source.batches():
            examples = torch.tensor(indices)
            batch = source.batch(examples, module)
            with watching_noise() as seen, seeded_examples(seed, examples):
                results.append(read(batch))
            if not seen.isdisjoint({"NumPy", "Python"}):  # seeded from the first use on
                with seeded_examples(seed, examples):
                    results[-1] = read(batch)
    return results


def landing_error(trajectory: Trajectory, state: Mapping[str, Tensor]) -> float:
    r"""Distance of a replay with all weights 1 from the recorded end, relative to the distance
    trained: :math:`|\theta - \theta_T| / |\theta_T - \theta_0|`. 0 means bit for bit."""
    start = trajectory.checkpoints[0].parameters
    end = trajectory.checkpoints[trajectory.last_step].parameters
    missed = sum(float((state[name].cpu() - end[name]).double().square().sum()) for name in end)
    moved = sum(float((start[name] - end[name]).double().square().sum()) for name in end)
    return (missed / moved) ** 0.5 if moved else missed**0.5
