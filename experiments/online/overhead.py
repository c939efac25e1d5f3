"""What recording costs: the time of training with it over the time without, in alternating runs.

python experiments/online/overhead.py experiment=cifar10_resnet9 +steps=82 data.root=FOLDER
python experiments/online/overhead.py experiment=wikitext2_gpt +steps=354 data.root=FOLDER

Checkpoints are as far apart as in the shipped experiment, curvature is gathered as often as by
default. The first checkpoint and the last are part of every run, so a short one pays more for them.
"""

from __future__ import annotations

import logging
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, seed_everything
from omegaconf import DictConfig, OmegaConf

from tda_lightning import TrajectoryRecorder

MODES: dict[str, dict[str, Any] | None] = {
    "without": None,
    "checkpoints": {},
    "online": {"curvature": "online"},
}


@hydra.main(version_base="1.3", config_path="../../conf", config_name="train")
def main(config: DictConfig) -> None:
    """Train in turn with every mode, and compare."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    steps, rounds = config.get("steps", 96), config.get("rounds", 5)
    if config.get("threads"):
        torch.set_num_threads(config.threads)
    folder = Path(tempfile.mkdtemp())
    config.output = str(folder)
    data = instantiate(config.data, _convert_="all")
    data.setup()
    whole = config.trainer.max_epochs * -(-len(data.train_dataset) // config.data.batch_size)
    every = whole // config.recorder.num_checkpoints
    print(f"{config.name}: {steps} of {whole} steps, a checkpoint every {every}")
    seconds: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    for number in range(rounds + 1):
        for mode, settings in MODES.items():
            taken = fit(config, data, steps, folder / mode, every, settings)
            if number:  # the first round warms up
                seconds[mode].append(taken)
        taken_now = {mode: round(all_[-1][0], 2) for mode, all_ in seconds.items() if all_}
        print(f"round {number}:", taken_now, flush=True)
    for mode in list(MODES)[1:]:
        for clock, name in enumerate(("wall clock", "processor")):
            pairs = zip(seconds[mode], seconds["without"], strict=True)
            ratios = sorted(taken[clock] / plain[clock] for taken, plain in pairs)
            print(
                f"{mode}, {name}: median ratio {statistics.median(ratios):.3f} "
                f"({ratios[0]:.3f} to {ratios[-1]:.3f}, {rounds} rounds)"
            )
    sizes(folder / "online")
    shutil.rmtree(folder)


def fit(
    config: DictConfig, data: Any, steps: int, path: Path, every: int, settings: Any
) -> tuple[float, float]:
    """Seconds of ``Trainer.fit``: on the wall clock, and of processor time."""
    seed_everything(config.seed, verbose=False)
    shutil.rmtree(path, ignore_errors=True)
    module = instantiate(config.model, _convert_="all")
    callbacks: list[Callback] = []
    if settings is not None:
        callbacks.append(TrajectoryRecorder(path, every_n_steps=every, **settings))
    options = OmegaConf.to_container(config.trainer, resolve=True)
    options = {**options, "max_epochs": -1, "max_steps": steps, "enable_progress_bar": False}
    trainer = instantiate(options, callbacks=callbacks)
    start, busy = time.perf_counter(), time.process_time()
    trainer.fit(module, datamodule=data)
    return time.perf_counter() - start, time.process_time() - busy


def sizes(path: Path) -> None:
    """Bytes of a checkpoint over those of what it holds, and of an interval's statistics."""
    from tda_lightning import Trajectory

    trajectory = Trajectory.load(str(path))
    file = path / "checkpoints" / f"{trajectory.last_step:08d}.h5"
    checkpoint = trajectory.checkpoints[trajectory.last_step]
    tensors = list(checkpoint.parameters.values())
    tensors += [t for state in (checkpoint.optimizer or {}).values() for t in state.values()]
    held = sum(tensor.nbytes for tensor in tensors)
    size = file.stat().st_size
    print(f"checkpoint: {size:,} bytes for {held:,} of parameters and state ({size / held:.4f})")
    for one in sorted((path / "statistics").glob("*.h5"))[:1]:
        print(f"statistics of an interval: {one.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
