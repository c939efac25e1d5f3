"""A run whose checkpoints hold random weights: do scores depend on what the model learned?"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tda_lightning.records.trajectory import Checkpoint, Trajectory
from tda_lightning.runtime.random_states import unchanged_randomness


@dataclass(frozen=True)
class _RandomCheckpoints(Mapping[int, Checkpoint]):
    """The run's own checkpoints with other weights, read one at a time."""

    recorded: Mapping[int, Checkpoint]
    weights: Mapping[str, Tensor]

    def __getitem__(self, step: int) -> Checkpoint:
        own = self.recorded[step]
        weights = {name: self.weights[name].to(value) for name, value in own.parameters.items()}
        return replace(own, parameters=weights)

    def __iter__(self) -> Iterator[int]:
        return iter(self.recorded)

    def __len__(self) -> int:
        return len(self.recorded)


def randomised(trajectory: Trajectory, module: nn.Module, seed: int = 0) -> Trajectory:
    """The recorded run with weights drawn afresh in every checkpoint, the same in each.

    Scores of it by the same estimator, compared with the real ones by
    :func:`~tda_lightning.evaluation.agreement`, are the *model randomisation* test (Adebayo et al.
    2018; Hanawa et al. 2021): a correlation near 0 says that scores depend on what was learned, one
    near 1 that they depend on the data and the architecture alone.

    It holds for estimators that read checkpoints. Those that train the run again (``Unrolled``,
    ``keep`` below 1, SOURCE on the recorded order) would be about a run that never was.

    Args:
        trajectory: the recorded run; what it gathered during training is left out.
        module: as it was trained; layers draw weights as they do when they are made
            (``reset_parameters``), and other parameters from a normal distribution with the mean
            and deviation of the trained ones.
        seed: of the draw.

    References:
        | Sanity Checks for Saliency Maps (Adebayo et al., 2018), https://arxiv.org/abs/1810.03292
        | Quanda (Bareeva et al., 2024), https://arxiv.org/abs/2410.07158
    """
    last = trajectory.checkpoints[trajectory.last_step]
    trained = {name: value.detach().cpu() for name, value in last.parameters.items()}
    weights = _drawn(module, trained, seed)
    return replace(
        trajectory,
        checkpoints=_RandomCheckpoints(trajectory.checkpoints, weights),
        curvature={},
        unfinished={},
        features={},
        path=None,
        statistics={},
        what_if={},
    )


def _drawn(module: nn.Module, trained: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    drawn = {}
    with unchanged_randomness():
        torch.manual_seed(seed)
        for name, value in trained.items():  # where no layer draws them
            deviation = float(value.double().std(unbiased=False))
            drawn[name] = torch.randn(value.shape).to(value) * deviation + value.mean()
        for path, part in module.named_modules():
            own = dict(part.named_parameters(recurse=False))
            if not own or not callable(getattr(part, "reset_parameters", None)):
                continue
            fresh = copy.deepcopy(part).cpu()
            fresh.reset_parameters()  # type: ignore[operator]
            for name, value in fresh.named_parameters(recurse=False):
                full = f"{path}.{name}" if path else name
                if full in drawn:
                    drawn[full] = value.detach().to(drawn[full])
    return drawn
