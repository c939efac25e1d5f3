"""The outputs of the model for a batch of queries, found where its loss takes them.

The task runs its loss, of whatever kind of module, and the standard loss in it
(``torch.nn.functional.cross_entropy`` and its like) shows logits and labels. So a ``training_step``
that was never meant to be asked about classes can be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tda_lightning.tasks import AttributionTask
from tda_lightning.tasks.batches import Batch, each_alone, num_examples
from tda_lightning.tasks.curved_losses import run_graph, weighted_losses
from tda_lightning.tasks.loss_calls import WeightedLoss
from tda_lightning.tasks.output_curvature import output_nodes, output_rows
from tda_lightning.tasks.standard_losses import LogisticLoss, SoftmaxLoss

_ADVICE = (
    "Give outputs=, a function (module, batch) -> logits [batch, classes] or [batch, position, "
    "classes], or measure by a function of your own (tda_lightning.measurements.Function)."
)


class NoClassesError(ValueError):
    """What is asked about has no logits of classes, or no labels."""


@dataclass(frozen=True)
class ClassOutputs:
    """Logits of a batch.

    Attributes:
        logits: [batch, position, class]. Of a bit, half its logit with both signs.
        labels: int64 [batch, position]; None where there are none.
        counted: whether a position counts in the loss, bool [batch, position].
        bits: whether the classes are the two values of a bit.
    """

    logits: Tensor
    labels: Tensor | None
    counted: Tensor
    bits: bool = False


def class_outputs(task: AttributionTask, module: nn.Module, batch: Batch) -> ClassOutputs:
    """The logits that the loss of a batch is made of.

    Raises:
        NoClassesError: it is not made of a single cross entropy.
    """
    count = num_examples(batch)
    if task.one_by_one and count > 1:
        return _joined(each_alone(batch, lambda one: class_outputs(task, module, one)))
    try:
        with torch.enable_grad():  # the graph tells what each position counts by
            standard, _, _ = weighted_losses(module, *task.loss_graph(module, batch))
            if not standard:  # nothing is trained: what the loss ignores is all that is known
                run, _ = task.loss_graph(module, batch)
                calls = enumerate(run_graph(module, run)[0].calls)
                standard = [
                    WeightedLoss(call.loss, torch.ones_like(call.loss.values), number)
                    for number, call in calls
                ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The task's loss cannot be computed for the queries ({type(error).__name__}: {error}),"
            f" so their logits are not known. {_ADVICE}"
        ) from error
    known = [loss for loss in standard if isinstance(loss.loss, SoftmaxLoss | LogisticLoss)]
    if len(known) != 1 or not known[0].fits(count):
        found = ", ".join(loss.loss.kind for loss in standard) or "none of torch.nn.functional"
        raise NoClassesError(
            "Expected a loss with one cross entropy or binary cross entropy, whose logits "
            f"probabilities are made of, got {found}. {_ADVICE}"
        )
    outputs = _of_loss(known[0], count)
    if torch.is_grad_enabled():
        return outputs
    return replace(outputs, logits=outputs.logits.detach())


def _of_loss(weighted: WeightedLoss, count: int) -> ClassOutputs:
    loss = weighted.loss
    assert isinstance(loss, SoftmaxLoss | LogisticLoss)
    counted = (weighted.weights.flatten() * loss.curvature != 0).reshape(count, -1)
    labels = None if loss.labels is None else loss.labels.long().reshape(count, -1)
    if isinstance(loss, LogisticLoss):
        half = _precise(loss.outputs).reshape(count, -1) / 2
        return ClassOutputs(torch.stack([-half, half], -1), labels, counted, bits=True)
    logits = _precise(loss.outputs)
    return ClassOutputs(logits.reshape(count, -1, logits.shape[-1]), labels, counted)


def _joined(parts: list[ClassOutputs]) -> ClassOutputs:
    """Of examples that were run alone, perhaps of different lengths."""
    length = max(part.logits.shape[1] for part in parts)

    def padded(values: Tensor) -> Tensor:
        missing = length - values.shape[1]
        return torch.cat([values, values.new_zeros(1, missing, *values.shape[2:])], 1)

    labels = [part.labels for part in parts]
    return ClassOutputs(
        torch.cat([padded(part.logits) for part in parts]),
        None if any(own is None for own in labels) else torch.cat([padded(own) for own in labels]),  # type: ignore[arg-type]
        torch.cat([padded(part.counted) for part in parts]),
        parts[0].bits,
    )


def given_outputs(
    function: Callable[..., Any], module: nn.Module, batch: Batch, count: int
) -> ClassOutputs:
    """The logits that a function gives for a batch, which need no labels.

    Raises:
        ValueError: they have another shape.
    """
    logits = function(module, batch)
    fits = isinstance(logits, Tensor) and logits.dim() in (2, 3) and len(logits) == count
    if not fits:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            "outputs must give logits [batch, classes] or [batch, position, classes] for a batch "
            f"of {count}, got {got}."
        )
    logits = _precise(logits)
    logits = logits[:, None] if logits.dim() == 2 else logits
    counted = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    return ClassOutputs(logits, None, counted)


def raw_outputs(task: AttributionTask, module: nn.Module, batch: Batch) -> Tensor:
    """What the network returns for each query, in a row: [batch, outputs]."""
    count = num_examples(batch)
    if task.one_by_one and count > 1:
        return torch.cat(each_alone(batch, lambda one: raw_outputs(task, module, one)))
    run, _ = task.loss_graph(module, batch)
    with torch.enable_grad():
        rows = output_rows(run_graph(module, run)[1], count, task._marked(module, batch))
    return rows if torch.is_grad_enabled() else rows.detach()


def network_outputs(task: AttributionTask, module: nn.Module, batch: Batch) -> Tensor:
    """What the network returns for each query, in its own shape [batch, ...].

    Raises:
        ValueError: it returns several tensors.
    """
    count = num_examples(batch)
    if task.one_by_one and count > 1:
        return torch.cat(each_alone(batch, lambda one: network_outputs(task, module, one)))
    run, _ = task.loss_graph(module, batch)
    with torch.enable_grad():
        nodes = output_nodes(run_graph(module, run)[1], count, task._marked(module, batch))
    if len(nodes) != 1:
        raise ValueError(
            f"The loss is made of {len(nodes)} outputs of the network. Measure by a function "
            "(module, batch) -> [batch] (tda_lightning.measurements.Function)."
        )
    value = nodes[0].value if torch.is_grad_enabled() else nodes[0].value.detach()
    return value if len(value) == count else value.reshape(count, -1, *value.shape[1:])


def _precise(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
