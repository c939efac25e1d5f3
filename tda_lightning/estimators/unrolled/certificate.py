"""Whether a replay lands where the run went: the check that its derivative is the run's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tda_lightning.records import provenance
from tda_lightning.records.errors import TrajectoryMismatchError

CAUSES = (
    "The usual causes are changed data or code, a training step that depends on something outside "
    "of the recorded batches, hooks that change weights or gradients (on_train_batch_end, "
    "backward), an operation whose result differs from call to call or from device to device, or "
    "another number of threads."
)


Require = Callable[[bool, Exception], None]


@dataclass
class Certificate:
    """Replayed weights against recorded ones, at every checkpoint that was passed.

    Attributes:
        tolerance: of the difference, relative to how far the weights moved since the checkpoint
            before; above it there is an error.
        require: raises an error where a condition is not met (``Session.require``).
        stage: number of the stage of training that is replayed, from 1; 0: the only one.
        largest: difference of a single weight.
        relative: largest distance of all weights, relative to how far they moved.
        checkpoints: steps of those that were compared.
    """

    tolerance: float
    require: Require
    stage: int = 0
    largest: float = 0.0
    relative: float = 0.0
    checkpoints: set[int] = field(default_factory=set)

    def compare(
        self,
        step: int,
        replayed: Mapping[str, Tensor],
        recorded: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
    ) -> None:
        """Compare the weights after ``step``; ``before`` are the recorded ones it started from.

        Raises:
            TrajectoryMismatchError: they differ by more than the tolerance.
        """
        missed, moved = 0.0, 0.0
        for name, expected in recorded.items():
            found = replayed[name].detach().cpu().double()
            difference = found - expected.double()
            self.largest = max(self.largest, _largest(difference))
            missed += float(difference.square().sum())
            moved += float((expected.double() - before[name].double()).square().sum())
        relative = (missed / moved) ** 0.5 if moved else float(missed > 0)
        self.require(
            relative <= self.tolerance,  # NaN is no agreement
            TrajectoryMismatchError(
                f"{self._where}Replayed from the recorded batches, the weights after step {step} "
                f"are not the recorded ones: they differ by {relative:.2g} of how far they moved "
                f"since the checkpoint before, expected at most {self.tolerance:.2g}. {CAUSES} "
                "Mend that, or raise Unrolled's tolerance and read the scores as those of a "
                "similar run."
            ),
        )
        self.relative = max(self.relative, relative)
        self.checkpoints.add(step)

    def compare_loss(self, step: int, replayed: float, recorded: float) -> None:
        """Compare the loss of a step; a recorded NaN tells nothing.

        Raises:
            TrajectoryMismatchError: they differ by more than the tolerance.
        """
        same = abs(replayed - recorded) <= self.tolerance * max(1.0, abs(recorded))
        self.require(
            same or recorded != recorded,
            TrajectoryMismatchError(
                f"{self._where}Replayed, the loss of step {step} is {replayed:.6g}, recorded was "
                f"{recorded:.6g} (a difference of {replayed - recorded:.2g}, with a tolerance of "
                f"{self.tolerance:.2g}): the replay is not the recorded run. {CAUSES}"
            ),
        )

    def tensors(self) -> dict[str, Tensor]:
        """What was found so far, to go on from later."""
        differences = torch.tensor([self.largest, self.relative], dtype=torch.float64)
        steps = torch.tensor(sorted(self.checkpoints), dtype=torch.int64)
        return {f"differences.{self.stage}": differences, f"compared.{self.stage}": steps}

    def restore(self, found: Mapping[str, Tensor]) -> None:
        """Add what :meth:`tensors` gave; nothing where the stage was not replayed."""
        if f"compared.{self.stage}" not in found:
            return
        largest, relative = found[f"differences.{self.stage}"].tolist()
        self.largest, self.relative = max(self.largest, largest), max(self.relative, relative)
        self.checkpoints.update(found[f"compared.{self.stage}"].tolist())

    @staticmethod
    def of_all(parts: Sequence[Certificate]) -> Certificate:
        """That of all stages together."""
        return Certificate(
            parts[0].tolerance,
            parts[0].require,
            largest=max(part.largest for part in parts),
            relative=max(part.relative for part in parts),
            # Only how many there are is told.
            checkpoints=set(range(sum(len(part.checkpoints) for part in parts))),
        )

    @property
    def bit_equal(self) -> bool:
        """Whether every weight was the recorded one, to the bit."""
        return self.largest == 0

    @property
    def _where(self) -> str:
        return f"Stage {self.stage}: " if self.stage else ""

    def record(self) -> provenance.Certificate:
        """For the provenance of scores."""
        return {
            "bit_equal": self.bit_equal,
            "largest_difference": self.largest,
            "relative_difference": self.relative,
            "checkpoints": len(self.checkpoints),
            "tolerance": self.tolerance,
        }

    def note(self) -> str:
        """In words."""
        count = len(self.checkpoints)
        compared = f"{count} recorded checkpoint{'s' * (count != 1)}"
        if self.bit_equal:
            return f"Certificate: replayed, the run lands on {compared} bit for bit."
        return (
            f"Certificate: replayed, the run lands near {compared}, not bit for bit: a weight "
            f"differs by up to {self.largest:.2g}, all weights by {self.relative:.2g} of how far "
            f"they moved. {CAUSES}"
        )


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0
