"""A training that can be interrupted anywhere, and a comparison of two recorded folders."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Sampler

from tda_lightning.recording import TrajectoryRecorder
from tests.runs import Net, Numbered, Optimizers, trainer

# Settings that two recordings of one run do not share.
EXCLUDED = {
    "run_id": "each recording draws its own",
    "created": "the time of day",
}


class Resumable(Net):
    """Dropout goes on where it was: Lightning itself keeps no random states."""

    def __init__(self, optimizers: Optimizers | None = None) -> None:
        super().__init__(optimizers)
        self._random: torch.Tensor | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._random = checkpoint["random"]

    def on_train_start(self) -> None:
        if self._random is not None:
            torch.set_rng_state(self._random)
            self._random = None


class EpochOrder(Sampler):
    """The order of examples is a function of the epoch; the first ``skip`` were had already."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch, self.skip, self.drawn = size, 0, 0, 0

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch))
        skip, self.skip = self.skip, 0
        self.drawn = skip
        for index in order[skip:].tolist():
            self.drawn += 1
            yield index


class ResumableLoader(DataLoader):
    """What Lightning asks of a loader that is to be resumed in mid-epoch."""

    def state_dict(self) -> dict[str, int]:
        drawn = self.sampler.drawn  # type: ignore[union-attr]
        return {"skip": 0 if drawn == len(self.sampler) else drawn}  # type: ignore[arg-type]

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.skip = state["skip"]  # type: ignore[union-attr]


def resumable_loader(size: int = 22, **options: Any) -> ResumableLoader:
    # A generator of its own: making an iterator draws from it.
    options = {"generator": torch.Generator(), "batch_size": 4, **options}
    return ResumableLoader(Numbered(size), sampler=EpochOrder(size), **options)


def train(
    path: Path | None,
    *,
    kept: Path | None = None,
    every: int = 4,
    resume: Path | None = None,
    module: Any = None,
    seen: list[list[int]] | None = None,
    optimizers: Optimizers | None = None,
    loader: Any = None,
    validation: Any = None,
    callbacks: tuple[Any, ...] = (),
    last: tuple[Any, ...] = (),
    recorder: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Train, recording to ``path``; Lightning checkpoints go to ``kept`` as ``<step>.ckpt``.

    ``callbacks`` stand before the recorder, ``last`` after it. ``seen`` takes the indices of the
    batches; a ``module`` that is passed has other weights than the seeded one that is not.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*(trainer|connectors|loops)")
        seed_everything(7, verbose=False)
        module = module or Resumable(optimizers)
        module.seen = module.seen if seen is None else seen
        recorders = [TrajectoryRecorder(path, **(recorder or {}))] if path else []
        keeps = [saves(kept, every)] if kept else []
        everything = (*callbacks, *recorders, *last, *keeps)
        options.setdefault("enable_checkpointing", bool(keeps))
        if path is not None:
            # Lightning's own checkpoints would else go to the working folder.
            options.setdefault("default_root_dir", path.parent)
        made = trainer(*everything, **options)
        made.fit(module, loader or resumable_loader(), validation, ckpt_path=resume)
    return made


def saves(folder: Path, every: int, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder,
        filename="{step}",
        auto_insert_metric_name=False,
        every_n_train_steps=every,
        save_top_k=-1,
        **options,
    )


def datasets(folder: Path) -> dict[str, Any]:
    """Every dataset and attribute of every HDF5 file below ``folder``, by name."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.h5")):
        name = str(path.relative_to(folder))
        with h5py.File(path) as file:
            found.update({f"{name} @{key}": value for key, value in file.attrs.items()})

            def visit(at: str, item: Any, name: str = name) -> None:
                found.update({f"{name} {at} @{key}": v for key, v in item.attrs.items()})
                if isinstance(item, h5py.Dataset):
                    found[f"{name} {at}"] = item[()]

            file.visititems(visit)
    facts = json.loads(found["trajectory.h5 facts"][0])
    facts["settings"] = {k: v for k, v in facts["settings"].items() if k not in EXCLUDED}
    found["trajectory.h5 facts"] = facts
    return found


def differences(one: Path, other: Path) -> tuple[int, list[str]]:
    """How many datasets were compared, and the names of those that are not the same."""
    a, b = datasets(one), datasets(other)
    names = sorted({*a, *b})
    shared = {name for name in names if name in a and name in b and same(a[name], b[name])}
    return len(names), [name for name in names if name not in shared]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and a == b
