"""What the table needs, kept beside it: ``results/MODEL_KIND.npz``, without pickles.

``outcomes_SEED`` float32 [subset, query]; ``scores`` float16 [row, query, train] in multiples of
``unit``, float32 [row, query]; ``rows``, the titles; ``seconds`` of processor time for each row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FOLDER = Path(__file__).parent / "results"


@dataclass
class Results:
    """Of one model, fine-tuned in one way."""

    path: Path
    arrays: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, model: str, kind: str) -> Results:
        """Empty if there is no file yet."""
        made = cls(FOLDER / f"{model}_{kind}.npz")
        if made.path.exists():
            with np.load(made.path, allow_pickle=False) as kept:
                made.arrays = {n: kept[n] for n in kept.files if n.startswith("outcomes_")}
                made.seconds = json.loads(str(kept["seconds"]))
                values = kept["scores"].astype(np.float32) * kept["unit"][..., None]
                pairs = zip(made.seconds, torch.from_numpy(values), strict=True)
                made.scores = dict(pairs)
        return made

    def add(self, name: str, outcomes: Tensor) -> None:
        self.arrays[name] = outcomes.float().numpy()
        self._write()

    def add_scores(self, title: str, values: Tensor, seconds: float) -> None:
        self.scores[title], self.seconds[title] = values.float(), round(seconds, 1)
        self._write()

    def outcomes(self, *seeds: int) -> Tensor:
        """[subset, seed, query]"""
        return torch.stack([torch.from_numpy(self.arrays[f"outcomes_{n}"]) for n in seeds], 1)

    def _write(self) -> None:
        values = torch.stack(list(self.scores.values())) if self.scores else torch.zeros(0, 1, 1)
        unit = values.abs().amax(-1).clamp_min(1e-30)
        aside = self.path.with_suffix(".part.npz")
        np.savez_compressed(
            aside,
            scores=(values / unit[..., None]).half().numpy(),
            unit=unit.numpy(),
            seconds=np.array(json.dumps(self.seconds)),
            **self.arrays,
        )
        aside.replace(self.path)
