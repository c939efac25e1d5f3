"""How close unlearned weights come to those of training again, and at what cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tda_lightning.evaluation.retraining import measure
from tda_lightning.measurements.classes import OfTarget, class_index
from tda_lightning.measurements.outputs import ClassOutputs, NoClassesError
from tda_lightning.tasks import AttributionTask


@dataclass(frozen=True)
class UnlearningReport:
    """The original model, the unlearned one and the one trained again, side by side.

    Attributes:
        moved: distance between the weights before and after unlearning.
        distance: distance of the unlearned weights from the retrained ones.
        distance_before: that of the original weights; unlearning helps where it is larger.
        measures: before, unlearned and retrained, by name.
        seconds: of unlearning and of training again; None where they were not measured.
    """

    moved: float
    distance: float
    distance_before: float
    measures: Mapping[str, tuple[float, float, float]]
    seconds: tuple[float, float] | None = None

    @property
    def recovered(self) -> float:
        """The share of the way from the original to the retrained weights that unlearning went: 1
        for the retrained ones, 0 for no gain, below 0 for a loss."""
        return 1 - self.distance / self.distance_before

    @property
    def speedup(self) -> float | None:
        """How many times longer training again took."""
        return None if self.seconds is None else self.seconds[1] / self.seconds[0]

    def rows(self) -> list[tuple[str, str, str, str]]:
        """A table: name, before, unlearned, retrained."""
        rows = [
            (name, *(f"{value:.4g}" for value in values)) for name, values in self.measures.items()
        ]
        distances = f"{self.distance_before:.4g}", f"{self.distance:.4g}", "0"
        table = [("distance to the retrained weights", *distances), *rows]
        if self.seconds is not None:
            table.append(("seconds", "", *(f"{value:.3g}" for value in self.seconds)))
        return table  # type: ignore[return-value]


def compare_unlearned(
    original: nn.Module,
    unlearned: nn.Module,
    retrained: nn.Module,
    measures: Mapping[str, Callable[[nn.Module], float]],
    seconds: tuple[float, float] | None = None,
) -> UnlearningReport:
    """Compare three models with the same parameters.

    Args:
        original: as trained.
        unlearned: :meth:`AttributionModule.unlearned`.
        retrained: trained again without what was removed, from the same initial weights.
        measures: what to measure of each, such as an accuracy, or the loss of what was removed.
        seconds: of unlearning and of training again.

    Raises:
        ValueError: parameters of other names or shapes.
    """
    before, after, wanted = (_weights(module) for module in (original, unlearned, retrained))
    if not before.shape == after.shape == wanted.shape:
        raise ValueError(
            "Expected three modules with the same parameters, got "
            f"{len(before)}, {len(after)} and {len(wanted)} numbers."
        )
    modules = (original, unlearned, retrained)
    return UnlearningReport(
        moved=float((after - before).norm()),
        distance=float((after - wanted).norm()),
        distance_before=float((before - wanted).norm()),
        measures={
            name: tuple(measure(module) for module in modules)  # type: ignore[misc]
            for name, measure in measures.items()
        },
        seconds=seconds,
    )


class _Right(OfTarget):
    """Whether the label has the largest logit; over several positions, the share of them."""

    @property
    def quantity(self) -> str:
        return "accuracy"

    def values(self, found: ClassOutputs, queries: Tensor) -> Tensor:
        labels = class_index(self.target, queries, found)
        return (found.logits.argmax(-1) == labels).to(found.logits)

    def together(self, values: Tensor, chosen: Tensor, queries: Tensor) -> Tensor:
        return values.sum(1) / chosen.sum(1)


def accuracy(module: nn.Module, task: AttributionTask | None, queries: object) -> float | None:
    """The share of some queries whose label the module gives the largest logit, in eval mode; None
    where the task's loss is not a cross entropy of labels.

    Args:
        module: at its own weights.
        task: as for :func:`~tda_lightning.evaluation.measure`.
        queries: a data set or a loader.
    """
    right = _Right()
    right.sign = 1
    try:
        return float(measure(module, task, module.state_dict(), queries, measurement=right).mean())
    except NoClassesError:
        return None


def membership(removed: Tensor, unseen: Tensor) -> float:
    """How well the losses of removed examples tell that they were trained on: the chance that one
    of them is below that of an example never seen; 0.5 where nothing is left of them.

    Args:
        removed: losses of what was removed, [removed].
        unseen: losses of examples that were in no training, [unseen].

    Example:
        >>> membership(torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4]))
        1.0
        >>> membership(torch.tensor([0.1, 0.4]), torch.tensor([0.1, 0.4]))
        0.5
    """
    differences = unseen[None, :] - removed[:, None]
    return float((differences.sign() + 1).mean() / 2)


def _weights(module: nn.Module) -> Tensor:
    return torch.cat([value.detach().double().flatten() for value in module.parameters()])
