"""What is asked about a query, where it is not its loss: ``attribute(..., measurement=...)``.

Every measurement is smaller when the model does better, so that a positive score always says that
the example helped: removing it lowers a probability, a logit, a margin or a contrast, or raises a
loss, by the score.
"""

from tda_lightning.measurements.base import Measurement
from tda_lightning.measurements.classes import (
    Contrast,
    Logit,
    LogProbability,
    Loss,
    Margin,
    Probability,
    Reward,
)
from tda_lightning.measurements.functions import Function, OfOutputs, Output, as_measurement

__all__ = [
    "Contrast",
    "Function",
    "LogProbability",
    "Logit",
    "Loss",
    "Margin",
    "Measurement",
    "OfOutputs",
    "Output",
    "Probability",
    "Reward",
    "as_measurement",
]
