"""The terms of examples' losses: the tokens of a sequence, the pixels of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tda_lightning.tasks.curved_losses import Losses, weighted_losses
from tda_lightning.tasks.loss_calls import by_position_of, inside_transform


def terms_of(
    module: nn.Module, run: Callable[[], Tensor], losses: Losses, batch: int
) -> tuple[Tensor, Tensor]:
    """The terms that the losses [batch] of a run consist of, [batch, position], and whether each
    counts, bool [batch, position].

    Raises:
        ValueError: the losses do not consist of standard losses with as many terms each.
    """
    with torch.enable_grad():
        standard, _, whole = weighted_losses(module, run, losses)
        terms = by_position_of(standard, batch)
    counted = torch.stack(
        [
            (loss.weights.flatten() * loss.loss.curvature != 0).reshape(batch, -1)
            for loss in standard
        ]
    ).any(0)
    if not inside_transform():
        left = (terms.sum(1) - whole).detach().abs().max()
        if not bool(left <= torch.finfo(terms.dtype).eps ** 0.6 * whole.detach().abs().max()):
            raise ValueError(
                "The losses of examples are not the sums of their terms: a part of them belongs to "
                "no token, or they are no means or sums of standard losses. Score whole examples "
                "(by_token=None)."
            )
    return (terms if torch.is_grad_enabled() else terms.detach()), counted


def joined_terms(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of examples that were run alone, perhaps of different lengths."""
    length = max(terms.shape[1] for terms, _ in parts)

    def padded(values: Tensor) -> Tensor:
        missing = length - values.shape[1]
        return torch.cat([values, values.new_zeros(len(values), missing)], 1)

    return (
        torch.cat([padded(terms) for terms, _ in parts]),
        torch.cat([padded(counted) for _, counted in parts]),
    )
