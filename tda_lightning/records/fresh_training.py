"""What one training run needs, made from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class FreshTraining:
    """What one training run needs, made for one seed and used once.

    Attributes:
        trainer: a new Lightning ``Trainer``; one that has been fitted does not start over.
        module: with initial weights drawn from the seed.
        data: a data module whose training loader draws its order from the seed.
    """

    trainer: Any
    module: nn.Module
    data: Any
