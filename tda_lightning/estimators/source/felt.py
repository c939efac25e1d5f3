r"""How much of the gradients that attribution sees training felt.

Attribution takes gradients in eval mode, where a layer with running statistics (BatchNorm) is a
fixed function. In training it subtracts the batch's own mean, so whatever only shifts its input,
such as the bias of the layer before it, has no gradient but rounding errors. An optimizer that
divides by the root of squared gradients makes steps of full length of those: its metric P is near
1 / eps there, and times a gradient of eval mode that is a score beyond all bounds.

So the gradients of recorded batches are taken both ways, at the same weights. With T and S the sums
of their squares in training's way and in attribution's, a coordinate has

.. math::
    w = \min(1, T / S)

the share of what is seen that training can have felt (the coefficient of the best linear estimate
of one by the other, if what training did not feel is independent of what it felt). The optimizer's
gradient is taken for w times the gradient that is seen (docs/methods.md, "SOURCE for Adam").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from tda_lightning.replay.run import Replay, weighted_loss
from tda_lightning.runtime.module_state import restored
from tda_lightning.runtime.random_states import unchanged_randomness
from tda_lightning.session.session import Session
from tda_lightning.tasks import TrainingStepTask, run_training_step

_BATCHES = 8  # the last before the checkpoint
_HARDLY = 1e-3  # of the gradient seen, where the note names a parameter


def felt(session: Session, step: int) -> dict[str, Tensor]:
    """w of every parameter, float64, at a checkpoint; empty where training normalised as
    attribution does, or its batches are unknown.

    An element that has no gradient in these batches has the w of its parameter as a whole.
    """
    replay = Replay(session.trajectory, session.module, session.task, session.examples)
    steps, parts = session.trajectory.steps, _by_batch(replay)
    if not parts or not len(steps.examples):
        return {}
    rows = range(max(0, step - _BATCHES), step)
    batches = [examples.tolist() for row in rows for examples in steps.batches(row)][-_BATCHES:]
    session.load(step)
    parameters = {name: session.module.get_parameter(name) for name in session.engine.names}
    trained, seen = (
        {name: torch.zeros_like(own.data, dtype=torch.float64) for name, own in parameters.items()}
        for _ in range(2)
    )
    with restored(session.module, "buffers"), replay.as_trained():
        session.module.eval()
        for batch, examples in session.batches(batches):
            for training, sums in ((True, trained), (False, seen)):
                for part in parts:
                    part.training = training
                with unchanged_randomness():
                    loss = _loss(session, batch, examples)
                gradients = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        sums[name] += gradient.double().square()
    return {name: _share(trained[name], seen[name]).cpu() for name in parameters}


def _by_batch(replay: Replay) -> list[nn.Module]:
    """Layers that normalised by the batch's own statistics in training, and have running ones."""
    return [
        part
        for name, part in replay.module.named_modules()
        if isinstance(getattr(part, "running_mean", None), Tensor)
        and name not in replay.eval_modules
    ]


def _loss(session: Session, batch: object, examples: Tensor) -> Tensor:
    if (weights := session.data_weights(examples)) is not None:
        return weighted_loss(session.task, session.module, batch, weights)
    if isinstance(session.task, TrainingStepTask):
        return run_training_step(session.module, batch)
    losses = session.train_loss(session.module, batch, examples)
    return losses.sum() * session.task.share(len(losses))


def _share(trained: Tensor, seen: Tensor) -> Tensor:
    if not bool(seen.any()):
        return torch.ones_like(seen)
    whole = float((trained.sum() / seen.sum()).clamp(max=1))
    return torch.where(seen > 0, (trained / seen.clamp(min=1e-300)).clamp(max=1), whole)


def felt_note(shares: Iterable[Mapping[str, Tensor]]) -> list[str]:
    """What a reader should know of w at several checkpoints."""
    largest: dict[str, float] = {}
    for share in shares:
        for name, own in share.items():
            largest[name] = max(largest.get(name, 0.0), float(own.max()) if own.numel() else 0.0)
    if not largest:
        return []
    unmoved = [name for name, value in largest.items() if value < _HARDLY]
    note = (
        "Layers of this model normalised by each batch's own statistics in training and do so by "
        "running statistics here. Gradients count by the share that training felt"
    )
    if unmoved:
        note += f", which is none of {', '.join(unmoved)}: training could not move what only "
        note += "shifts the input of such a layer"
    return [f"{note}."]
