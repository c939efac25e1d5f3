"""The outlier test of Xie et al. (2024, 2401.09031): 200 MNIST zeros among CIFAR-10 aeroplanes.

What is measured, over the queries' 10 strongest proponents:

- the share of MNIST among those of held-out zeros, and of held-out aeroplanes;
- the overlap: the share that two aeroplanes have in common, over all pairs;
- generally influential examples: those among the proponents of at least a quarter of all queries;
- the bias by timestep: the mean size of a score at the timestep where it is largest, over that at
  the timestep where it is smallest.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from experiments.diffusion.picture import contact_sheet
from experiments.diffusion.setting import RESULTS, SIZE, TIMESTEPS, denoiser, samples, trained
from tda_lightning import AttributionModule, Scores, Trajectory
from tda_lightning.estimators import InfluenceFunction, Retrac, TracIn
from tda_lightning.estimators.base import Estimator
from tda_lightning.examples.data import OutlierImages
from tda_lightning.examples.data.outliers import as_pixels
from tda_lightning.examples.models import Denoiser
from tda_lightning.records.rendered import Rendered
from tda_lightning.report import write_report
from tda_lightning.tasks import DiffusionTask

TOP, GENERATED = 10, 6
ESTIMATORS: dict[str, tuple[Estimator, int]] = {  # with draws of the noise
    "TracIn": (TracIn(), 2),
    "ReTrac": (Retrac(), 2),
    "influence (EK-FAC)": (InfluenceFunction(), 2),
}


def run(root: str, folder: Path, epochs: int = 12, diffusers: bool = False) -> None:
    """Train, score held-out images and samples, and keep what was measured."""
    torch.set_num_threads(1)
    data = OutlierImages(root=root, size=SIZE, num_query=20)
    module = denoiser(diffusers)
    began = time.process_time()
    if not (folder / "trajectory.h5").exists():
        trained(folder, module, data, epochs)
    seconds = {"training": time.process_time() - began}
    held_out = torch.stack([image for (image,) in data.query_dataset])  # type: ignore[attr-defined]
    module = final(module, folder)
    queries = TensorDataset(torch.cat([held_out, samples(module, GENERATED)]))
    outliers, zeros = data.is_outlier("train"), data.is_outlier("query")
    measured: dict[str, dict[str, float]] = {}
    rows: dict[str, Scores] = {}
    for name, (estimator, draws) in ESTIMATORS.items():
        began = time.process_time()
        task = DiffusionTask(timesteps=TIMESTEPS, by_timestep=True)
        attribution = AttributionModule(module, str(folder), estimator, task)
        scores = attribution.attribute(
            data.train_dataset, queries, batch_size=64, draws=draws, self_influence=False
        )
        seconds[name] = time.process_time() - began
        rows[name] = scores
        measured[name] = judged(scores, outliers, zeros)
        print(name, measured[name], f"{seconds[name]:.0f} s", flush=True)
        setup = {"epochs": epochs, "train": len(outliers), "zeros": int(outliers.sum())}
        setup |= {"size": SIZE, "held_out": len(held_out), "generated": GENERATED, "top": TOP}
        found = {"setup": setup, "seconds": seconds, "measured": measured}
        RESULTS.mkdir(exist_ok=True)
        suffix = "_diffusers" if diffusers else ""
        (RESULTS / f"outliers{suffix}.json").write_text(json.dumps(found, indent=1))
    if not diffusers:
        shown = [int(zeros.nonzero()[0]), 0, *range(len(held_out), len(held_out) + 4)]
        sheet = contact_sheet(data.train_dataset, queries, shown, rows, 6)
        (folder / "proponents.png").write_bytes(sheet)
        write_report(rows["ReTrac"], folder / "report.html", render=renderer(data, queries))


def judged(scores: Scores, outliers: Tensor, zeros: Tensor) -> dict[str, float]:
    """The numbers above; ``zeros``: which of the first queries are MNIST."""
    top = [set(scores.proponents(query, TOP)[0].tolist()) for query in range(len(zeros))]
    share = torch.tensor([float(outliers[sorted(own)].float().mean()) for own in top])
    planes = [own for own, zero in zip(top, zeros.tolist(), strict=True) if not zero]
    pairs = list(itertools.combinations(planes, 2))
    common = sum(len(first & second) for first, second in pairs) / len(pairs) / TOP
    often = sum(sum(n in own for own in top) >= len(top) / 4 for n in range(len(outliers)))
    assert scores.by_timestep is not None
    sizes = scores.by_timestep.abs().mean((1, 2))
    return {
        "mnist_of_zeros": float(share[zeros].mean()),
        "mnist_of_planes": float(share[~zeros].mean()),
        "overlap": common,
        "generally_influential": float(often),
        "distinct": float(len(set().union(*top))),
        "size_by_timestep": float(sizes.max() / sizes.min()),
    }


def final(module: Denoiser, folder: Path) -> Denoiser:
    """The module at the last weights of its run."""
    run = Trajectory.load(str(folder))
    module.load_state_dict(run.checkpoints[run.last_step].parameters, strict=False)
    return module


def renderer(data: OutlierImages, queries: TensorDataset) -> Callable[[str, int], Rendered]:
    """How a report shows training images, held-out images and the samples after them."""
    held_out = len(data.is_outlier("query"))

    def render(split: str, index: int) -> Rendered:
        if split == "train" or index < held_out:
            return data.render(split, index)
        return Rendered(caption="generated", image=as_pixels(queries[index][0]))

    return render
