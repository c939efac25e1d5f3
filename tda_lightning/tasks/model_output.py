r"""The output of a model that its loss is a function of, one number for each example (TRAK).

TRAK (Park et al. 2023, 2303.14186) replaces the model by a generalised linear one: the gradient of
an *output function* f is an example's features, and its loss is a function of f alone. From a loss
that consists of standard ones f follows:

========================= ============================= =================
loss of an example        f                             dl/df
========================= ============================= =================
negative log-likelihood,  sqrt(w) log p / (1 - p);      -sqrt(w) (1 - p)
l = -w log p, of a class  w = 1 is the paper's,
or a bit                  section 3.3
its mean over several     the same with p the           -sqrt(w) (1 - p)
(tokens, pixels, bits)    geometric mean
squared error             sqrt(2 l); of a single        f
                          output the residual, with
                          its sign
========================= ============================= =================

with w the weights of the example's terms, added up. It stands in f so that a factor of the loss,
which moves no optimum, does not change what leaving an example out does.

The geometric mean is a choice of ours: for language models the paper (section 5.2) puts together
the log-odds of single tokens, of which the loss is no function. For squared errors f is the output
up to a constant and a factor, with which d^2 l / df^2 = 1: TRAK leaves that derivative out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tda_lightning.tasks.curved_losses import CurvedLoss
from tda_lightning.tasks.loss_calls import WeightedLoss
from tda_lightning.tasks.standard_losses import LogisticLoss, SoftmaxLoss, SquaredLoss


class NoModelOutputError(ValueError):
    """A loss is not known to be a function of one output."""


@dataclass(frozen=True)
class ModelOutput:
    """Of a batch.

    Attributes:
        values: f of each example, with its graph, [batch].
        slopes: the derivative of the training loss by f, [batch].
    """

    values: Tensor
    slopes: Tensor


def output_of_losses(losses: Sequence[CurvedLoss], batch: int) -> ModelOutput:
    """f of the examples whose losses consist of ``losses``.

    Raises:
        NoModelOutputError: of no standard loss; of several kinds; of labels that are probabilities.
    """
    standard = [loss for loss in losses if isinstance(loss, WeightedLoss)]
    if not standard or len(standard) < len(losses):
        raise NoModelOutputError("it is no standard loss of torch.nn.functional")
    if all(isinstance(loss.loss, SquaredLoss) for loss in standard):
        return _residual(standard, batch)
    if any(isinstance(loss.loss, SquaredLoss) for loss in standard):
        raise NoModelOutputError("it adds squared errors to a log-likelihood")
    return _log_odds(standard, batch)


def _residual(losses: Sequence[WeightedLoss], batch: int) -> ModelOutput:
    # l = sum_t w_t d_t^2, so that sqrt(2 l) is a norm, which has a gradient at 0 too.
    parts = [(_weights(loss) * 2).sqrt() * loss.loss.outputs for loss in losses]
    parts = _by_example(losses, parts, batch)
    terms = torch.cat(parts, dim=1)
    values = terms.squeeze(1) if terms.shape[1] == 1 else torch.linalg.vector_norm(terms, dim=1)
    return ModelOutput(values, values.detach())


def _log_odds(losses: Sequence[WeightedLoss], batch: int) -> ModelOutput:
    margins = []
    for loss in losses:
        assert isinstance(loss.loss, SoftmaxLoss | LogisticLoss)
        own = loss.loss.correct_margins()
        if own is None:
            raise NoModelOutputError(
                "its labels are probabilities or smoothed, and no label's probability is all that "
                "it depends on"
            )
        margins.append(own)
    weights = torch.cat(_by_example(losses, [_weights(loss) for loss in losses], batch), dim=1)
    terms = torch.cat(_by_example(losses, margins, batch), dim=1)
    total = weights.sum(1)
    root = total.sqrt()
    if terms.shape[1] == 1:
        log_odds = terms.squeeze(1)
        return ModelOutput(root * log_odds, -root * torch.sigmoid(-log_odds.detach()))
    # -log p of the geometric mean; an example without terms has none to explain.
    mean = -(weights * F.logsigmoid(terms)).sum(1) / total.where(total > 0, 1)
    mean = mean.where(total > 0, 1)
    log_odds = -mean - (-torch.expm1(-mean)).log()
    return ModelOutput(root * log_odds, root * torch.expm1(-mean.detach()))


def _weights(loss: WeightedLoss) -> Tensor:
    """Of every element's loss without class weights, in the loss of its example: [elements]."""
    return (loss.weights.flatten() * loss.loss.curvature).detach()


def _by_example(
    losses: Sequence[WeightedLoss], elements: Sequence[Tensor], batch: int
) -> list[Tensor]:
    """Elements of the losses as [batch, positions] each."""
    whole: list[Tensor] = []
    alone: list[list[Tensor]] = [[] for _ in range(batch)]  # of examples that were run alone
    for loss, own in zip(losses, elements, strict=True):
        if loss.example is None:
            whole.append(own.reshape(batch, -1))
        else:
            alone[loss.example].append(own.flatten())
    if not any(alone):
        return whole
    rows = [torch.cat(parts) if parts else elements[0].new_zeros(0) for parts in alone]
    return [*whole, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)]
