"""The recorded step table under random options: equal to a log that the module keeps itself, and
to a simulation of what a loader hands out."""

from __future__ import annotations

import contextlib
import io
import math
import os
import tempfile
import warnings
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import BatchSampler, RandomSampler

from tda_lightning.recording import TrajectoryRecorder
from tda_lightning.store import open_trajectory
from tests.runs import Numbered, loader, trainer

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@dataclass
class Options:
    """One training run."""

    size: int
    batch_size: int
    drop_last: bool
    shuffle: bool
    epochs: int
    accumulate: int
    limit: int | float
    interval: str | None  # of the scheduler
    clip: float | None
    by_value: bool
    optimizer: str
    kept: int  # every so many steps

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch."""
        count = self.size / self.batch_size
        whole = math.floor(count) if self.drop_last else math.ceil(count)
        return min(whole, self.limit) if isinstance(self.limit, int) else int(whole * self.limit)


OPTIONS = st.builds(
    Options,
    size=st.integers(4, 17),
    batch_size=st.integers(1, 5),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    epochs=st.integers(1, 3),
    accumulate=st.integers(1, 5),
    limit=st.one_of(st.integers(1, 6), st.sampled_from([0.5, 1.0])),
    interval=st.sampled_from([None, "step", "epoch"]),
    clip=st.sampled_from([None, 0.05, 0.5, 100.0]),
    by_value=st.booleans(),
    optimizer=st.sampled_from(["sgd", "adamw"]),
    kept=st.integers(3, 9),
)


class Logged(LightningModule):
    """Keeps a log of its own."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.net = nn.Linear(3, 1)
        self.rows: list[dict[str, Any]] = []
        self.seen: list[list[int]] = []
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, index = batch
        loss = (self.net(x) - y).square().mean()
        self.seen.append(index.tolist())
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradient = torch.cat([p.grad.reshape(-1) for p in self.parameters()])
        self.rows.append(
            {
                "epoch": self.current_epoch,
                "rates": [group["lr"] for group in optimizer.param_groups],
                "norm": float(gradient.norm()),
                "clipping": self.clipping(gradient),
                "batches": self.seen,
                "loss": float(np.mean(self.losses)),
            }
        )
        self.seen, self.losses = [], []

    def clipping(self, gradient: Tensor) -> float:
        """By the formulas; Lightning clips after this hook."""
        limit, norm = self.options.clip, float(gradient.norm())
        if limit is None or norm == 0:
            return 1.0
        if self.options.by_value:
            return float(gradient.clamp(-limit, limit).norm()) / norm
        return min(1.0, limit / (norm + 1e-6))

    def configure_optimizers(self) -> Any:
        groups = [{"params": [self.net.weight]}, {"params": [self.net.bias], "lr": 0.02}]
        kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
        optimizer = kinds[self.options.optimizer](groups, lr=0.1)
        if self.options.interval is None:
            return optimizer
        scheduler = ExponentialLR(optimizer, 0.8)
        return [optimizer], [{"scheduler": scheduler, "interval": self.options.interval}]


def simulated(options: Options) -> list[list[list[list[int]]]]:
    """Indices of the batches of every step, epoch by epoch, by torch's samplers alone."""
    generator = torch.Generator().manual_seed(5)
    examples = range(options.size)
    order = RandomSampler(examples, generator=generator) if options.shuffle else examples
    sampler = BatchSampler(order, options.batch_size, options.drop_last)
    found = []
    for _ in range(options.epochs):
        torch.empty((), dtype=torch.int64).random_(generator=generator)  # the workers' seed
        batches = list(islice(sampler, options.per_epoch))
        found.append(
            [
                batches[first : first + options.accumulate]
                for first in range(0, len(batches), options.accumulate)
            ]
        )
    return found


@hypothesis.settings(
    deadline=None,
    max_examples=25,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(OPTIONS)
def test_the_step_table_is_the_log(options: Options) -> None:
    hypothesis.assume(options.per_epoch > 0)
    algorithm = "value" if options.by_value else "norm"
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seed_everything(0, verbose=False)
        module = Logged(options)
        data = loader(
            Numbered(options.size),
            options.batch_size,
            shuffle=options.shuffle,
            drop_last=options.drop_last,
            generator=torch.Generator().manual_seed(5),
        )
        recorder = TrajectoryRecorder(Path(folder), every_n_steps=options.kept)
        with contextlib.redirect_stderr(io.StringIO()):
            trainer(
                recorder,
                max_epochs=options.epochs,
                accumulate_grad_batches=options.accumulate,
                limit_train_batches=options.limit,
                gradient_clip_val=options.clip,
                gradient_clip_algorithm=algorithm,
            ).fit(module, data)
        trajectory = open_trajectory(folder)
        require_equal(trajectory, module, options)


def require_equal(trajectory: Any, module: Logged, options: Options) -> None:
    steps, rows = trajectory.steps, module.rows
    epochs = simulated(options)
    assert len(steps) == len(rows) == sum(map(len, epochs))
    assert steps.epoch.tolist() == [row["epoch"] for row in rows]
    assert steps.epoch.tolist() == [e for e, groups in enumerate(epochs) for _ in groups]
    assert steps.learning_rate.tolist() == [row["rates"] for row in rows]
    recorded = [[batch.tolist() for batch in steps.batches(row)] for row in range(len(steps))]
    assert recorded == [row["batches"] for row in rows]
    assert recorded == [batches for groups in epochs for batches in groups]
    assert steps.accumulation.tolist() == [options.accumulate] * len(rows)
    for column, name in (("loss", "loss"), ("gradient_norm", "norm"), ("clipping", "clipping")):
        expected = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        torch.testing.assert_close(getattr(steps, column), expected, rtol=1e-5, atol=1e-7)
    if options.clip is None:
        assert bool((steps.clipping == 1).all())
    kept = {0, len(rows), *range(options.kept, len(rows) + 1, options.kept)}
    assert set(trajectory.checkpoints) == kept
    last = trajectory.checkpoints[len(rows)].parameters
    assert all(torch.equal(last[n], p.detach()) for n, p in module.named_parameters())
