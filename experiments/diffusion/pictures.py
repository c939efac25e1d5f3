"""A report with pictures: generated samples and their proponents, after a longer training.

TracIn and ReTrac walk all steps of a run for its own draws of the noise, which is long by then;
influence functions take the final weights alone.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from experiments.diffusion.outliers import final, renderer
from experiments.diffusion.picture import contact_sheet
from experiments.diffusion.setting import SIZE, denoiser, samples, trained
from tda_lightning import AttributionModule
from tda_lightning.estimators import InfluenceFunction
from tda_lightning.examples.data import OutlierImages
from tda_lightning.report import write_report
from tda_lightning.tasks import DiffusionTask

GENERATED, TOP = 12, 8


def run(root: str, folder: Path, epochs: int = 60) -> None:
    """Train, sample, score, and write ``report.html`` and ``proponents.png`` into ``folder``."""
    torch.set_num_threads(1)
    data = OutlierImages(root=root, size=SIZE, num_query=8)
    module = denoiser()
    began = time.process_time()
    if not (folder / "trajectory.h5").exists():
        trained(folder, module, data, epochs)
    module = final(module, folder)
    held_out = torch.stack([image for (image,) in data.query_dataset])  # type: ignore[attr-defined]
    queries = TensorDataset(torch.cat([held_out, samples(module, GENERATED)]))
    task = DiffusionTask(timesteps=(100, 300, 500), draws=4)
    attribution = AttributionModule(module, str(folder), InfluenceFunction(), task)
    scores = attribution.attribute(data.train_dataset, queries, batch_size=64, self_influence=False)
    shown = [0, len(held_out) - 1, *range(len(held_out), len(queries))]
    sheet = contact_sheet(data.train_dataset, queries, shown, {"influence": scores}, TOP)
    (folder / "proponents.png").write_bytes(sheet)
    write_report(scores, folder / "report.html", render=renderer(data, queries))
    outliers = data.is_outlier("train")
    for query in range(len(held_out), len(queries)):
        top = scores.proponents(query, TOP)[0]
        print(f"sample {query - len(held_out)}: {float(outliers[top].float().mean()):.2f} MNIST")
    print(f"{time.process_time() - began:.0f} s of processor")
