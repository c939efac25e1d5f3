"""A recorder for members: their checkpoints lie where the recorded run has its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tda_lightning.recording import TrajectoryRecorder
from tda_lightning.records.trajectory import Trajectory


class AdapterRecorder(TrajectoryRecorder):
    """Records adapters together with the base under them, which is the end of another run."""

    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        super().__init__(Path(path), **options)
        self._run.holds_base = True


class MemberRecorder(TrajectoryRecorder):
    """Records a run as another one was recorded: checkpoints after the same steps, optimizer states
    and curvature where the other has them.

    Args:
        path: folder of the trajectory. One that was begun there is replaced, unless the training
            resumes it (``ckpt_path``).
        run: the recorded run.
    """

    def __init__(self, path: str | os.PathLike[str], run: Trajectory) -> None:
        steps = sorted(run.checkpoints)
        curvature = run.facts.settings.get("curvature")
        statistics: dict[str, Any] = {}
        if isinstance(curvature, dict):
            statistics = {
                "curvature": "online",
                "curvature_every": curvature["every"],
                "fisher": str(curvature["fisher"]).split()[0],
                "curvature_dtype": curvature["dtype"],
                "curvature_dense_side": curvature["dense_side"],
            }
        super().__init__(
            Path(path),
            num_checkpoints=max(1, len(steps) - 1),
            save_optimizer=run.checkpoints[steps[-1]].optimizer is not None,
            overwrite=True,
            fingerprint=run.facts.fingerprint is not None,
            **statistics,
        )
        self.recorded_steps = frozenset(steps)

    def should_record(self, step: int) -> bool:
        return step in self.recorded_steps
