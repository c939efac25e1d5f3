"""Times attribution on a GPU in float32, TF32 and bf16, within six minutes, and writes JSON.

python -m experiments.benchmark.gpu OUTPUT.json          on a GPU
python -m experiments.benchmark.gpu OUTPUT.json --toy    tiny sizes, on whatever there is
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmark.works import mlp
from tda_lightning import AttributionModule, TrajectoryRecorder
from tda_lightning.estimators import Estimator, InfluenceFunction, Source, TracIn
from tda_lightning.examples.models.gpt import GPT
from tda_lightning.examples.models.networks import ResNet9
from tda_lightning.tasks import AttributionTask, ClassificationTask

SECONDS = 330.0  # no job begins later
# (name, Lightning's precision, whether matrix products in float32 may use TF32)
PRECISIONS = (
    ("float32", "32-true", False),
    ("tf32", "32-true", True),
    ("bf16", "bf16-mixed", False),
)
# Dense peak of one H200 or H100 SXM, FLOP/s (NVIDIA's data sheet, without sparsity).
PEAKS = {"float32": 67e12, "tf32": 494e12, "bf16": 989e12}


@dataclass(frozen=True)
class Work:
    """A network with random weights and random data."""

    name: str
    network: Callable[[], nn.Module]
    task: AttributionTask
    example: Callable[[int, torch.Generator], tuple[Tensor, ...]]
    num_train: int
    num_query: int
    batch_size: int
    estimators: dict[str, Estimator]

    def data(self, count: int, seed: int) -> TensorDataset:
        return TensorDataset(*self.example(count, torch.Generator().manual_seed(seed)))


class Trained(LightningModule):
    """A network as it is trained: by the mean of the task's losses."""

    def __init__(self, network: nn.Module, task: AttributionTask) -> None:
        super().__init__()
        self.network, self.task = network, task

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network(*inputs)

    def training_step(self, batch: tuple[Tensor, ...], _: int) -> Tensor:
        return self.task.train_loss(self, batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def small() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.ReLU(), nn.Linear(4, 10))


def images(*shape: int) -> Callable[[int, torch.Generator], tuple[Tensor, ...]]:
    return lambda count, generator: (
        torch.randn(count, *shape, generator=generator),
        torch.randint(10, (count,), generator=generator),
    )


def tokens(vocabulary: int, length: int) -> Callable[[int, torch.Generator], tuple[Tensor, ...]]:
    return lambda count, generator: (
        torch.randint(vocabulary, (count, length), generator=generator),
    )


class NextToken(AttributionTask):
    """The mean loss of the next token; of GPT-2's blocks alone, as influence functions of language
    models do it (Grosse et al. 2023, section 3.1)."""

    layers: Sequence[str] | None = ("network.blocks",)

    def train_loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        (sequence,) = batch
        logits = module(sequence)[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), sequence[:, 1:], reduction="none")
        return losses.mean(1)


def works(toy: bool) -> list[Work]:
    vocabulary, length, width, depth, heads = (
        (40, 8, 16, 2, 2) if toy else (50257, 512, 768, 12, 12)
    )
    sizes = [(24, 4, 8)] * 3 if toy else [(60_000, 1000, 4096), (10_000, 200, 512), (256, 16, 8)]
    both: dict[str, Estimator] = {"tracin": TracIn(), "ekfac": InfluenceFunction()}
    every = {**both, "source": Source(num_segments=1)}
    return [
        Work("mlp", small if toy else mlp, ClassificationTask(), images(784), *sizes[0], every),
        Work(
            "resnet9",
            lambda: ResNet9(width=1 if toy else 64),
            ClassificationTask(),
            images(3, 32, 32),
            *sizes[1],
            every,
        ),
        Work(
            "gpt2",
            lambda: GPT(vocabulary, length, width, depth, heads),
            NextToken(),
            tokens(vocabulary, length),
            *sizes[2],
            both,
        ),
    ]


def trainer(accelerator: str, precision: str, **options: object) -> Trainer:
    return Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,  # type: ignore[arg-type]
    )


def flops_each(module: nn.Module, work: Work, device: torch.device) -> float:
    """Floating-point operations of one example's forward and backward pass."""
    module.to(device)
    batch = tuple(part[:2].to(device) for part in work.data(2, 1).tensors)
    with FlopCounterMode(display=False) as counter:
        work.task.train_loss(module, batch).sum().backward()
    module.zero_grad()
    return counter.get_total_flops() / 2


def synchronised() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measured(
    work: Work, name: str, precision: tuple[str, str, bool], accelerator: str, folder: Path
) -> tuple[dict[str, object], Tensor]:
    """One estimator in one precision: its time, and the scores."""
    label, lightning_precision, tf32 = precision
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.manual_seed(0)
    module = Trained(work.network(), work.task)
    train, query = work.data(work.num_train, 1), work.data(work.num_query, 2)
    path = folder / f"{work.name}-{name}-{label}"
    recorder = TrajectoryRecorder(path, num_checkpoints=1)
    trainer(accelerator, "32-true", max_steps=2, callbacks=[recorder]).fit(
        module, DataLoader(train, work.batch_size)
    )
    device = torch.device("cuda" if accelerator == "gpu" else "cpu")
    flops = flops_each(module, work, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = synchronised()
    scores = AttributionModule(module, str(path), work.estimators[name], work.task).attribute(
        train,
        query,
        batch_size=work.batch_size,
        self_influence=False,
        trainer=trainer(accelerator, lightning_precision),
    )
    seconds = synchronised() - began
    # What a walk must do: a forward and a backward pass for each example, and its products.
    products = 2 * work.num_query * work.num_train * int(scores.provenance["trained_parameters"])
    walks = {"tracin": 1, "ekfac": 3, "source": 3}[name]
    useful = walks * work.num_train * flops + products
    found: dict[str, object] = {
        "work": work.name,
        "estimator": name,
        "precision": label,
        "train": work.num_train,
        "queries": work.num_query,
        "parameters": scores.provenance["trained_parameters"],
        "seconds": seconds,
        "examples_per_second": work.num_train / seconds,
        "useful_flops": useful,
        "utilisation": useful / seconds / PEAKS[label] if device.type == "cuda" else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }
    return found, scores.values.double()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--toy", action="store_true")
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    if accelerator == "cpu" and not given.toy:
        parser.error("no GPU was found: expected one, or --toy for a trial of the script itself.")
    machine = torch.cuda.get_device_name() if accelerator == "gpu" else "CPU"
    began, jobs = time.perf_counter(), list[dict[str, object]]()
    with tempfile.TemporaryDirectory() as folder:
        for work in works(given.toy):
            for name in work.estimators:
                exact: Tensor | None = None
                for precision in PRECISIONS:
                    if time.perf_counter() - began > SECONDS:
                        jobs.append(
                            {"work": work.name, "estimator": name, "left_out": precision[0]}
                        )
                        continue
                    found, scores = measured(work, name, precision, accelerator, Path(folder))
                    exact = scores if exact is None else exact
                    found["error"] = float((scores - exact).norm() / exact.norm())
                    jobs.append(found)
                    report = {"machine": machine, "torch": torch.__version__, "jobs": jobs}
                    given.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
