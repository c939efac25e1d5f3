"""Has every use of the trained parameters been seen?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tda_lightning.gradients.blocks import Block
from tda_lightning.gradients.composite import first_examples
from tda_lightning.gradients.forms import Gradient
from tda_lightning.records.errors import UnsupportedTrainingError

_FEW = 8


def require_complete(
    blocks: list[Block],
    gradients: Mapping[str, Gradient],
    own: Mapping[str, Tensor | None],
    allowed: float,
) -> None:
    """Check that the examples' gradients sum to autograd's, parameter by parameter.

    Raises:
        UnsupportedTrainingError: some use of a parameter has not been seen.
    """
    for block in blocks:
        gradient = gradients[block.name]
        total = block.tensors(gradient.mean() * gradient.batch)
        # A few examples tell how large what cancels in the sum is.
        few = first_examples(gradient, _FEW)
        spread = few.weighted_squares(None, None, None).mean() * gradient.batch**2
        for name in block.parameters:
            plain = own[name]
            expected = torch.zeros_like(total[name]) if plain is None else plain
            difference = (total[name] - expected).norm()
            if difference > allowed * torch.maximum(expected.norm(), spread.sqrt()):
                raise unseen(name)


def unseen(name: str) -> UnsupportedTrainingError:
    """Some use of parameter ``name`` has not been seen."""
    return UnsupportedTrainingError(
        f"Parameter {name} is used in training_step in a way that curvature='online' cannot see "
        "(inside compiled or checkpointed code, or by an operation other than a linear, "
        "convolution, embedding, norm, attention or recurrent layer). Record with curvature=None "
        "and fit curvature afterwards."
    )
