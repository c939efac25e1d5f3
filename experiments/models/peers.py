r"""One tiny GPT-2 attributed by ours and by dattri-llm, bergson and kronfluence: time, and LDS.

    pip install --no-deps --target PEERS dattri dattri-llm bergson \
        simple-parsing docstring-parser natsort petname jaxtyping wadler-lindig ml-dtypes torchopt
    PYTHONPATH=PEERS:. python -m experiments.models.peers [ROW ...]

The texts are walks through the tables of eight topics, so that there is something to learn. All
train the same network by AdamW at a constant rate on the same batches, and score the layers of
attention and MLP, or all parameters where a row says so. The truth: 40 replays of the run with half
of the texts. A row in ``results_peers.json`` is not run again; seconds are processor seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from experiments.models.cases import HuggingFaceModule, Rows
from experiments.models.speed import (
    LAYERS,
    VOCABULARY,
    kronfluence,
    processor_seconds,
    tiny_gpt2,
    with_linear_layers,
)
from tda_lightning import AttributionModule, Trajectory, TrajectoryRecorder
from tda_lightning.estimators import InfluenceFunction, Source, TracIn
from tda_lightning.evaluation import (
    draw_subsets,
    interval_over_subsets,
    measure,
    retrain_each,
)
from tda_lightning.tasks import TrainingStepTask

RESULTS = Path(__file__).parent / "results_peers.json"
TRAIN, QUERIES, LENGTH, BATCH, EPOCHS, RATE = 512, 20, 64, 16, 2, 3e-3
TOPICS, SUBSETS = 8, 40


def texts(size: int, seed: int) -> Rows:
    """Every topic has a table of followers; one word in five is any word."""
    tables = torch.stack(
        [
            torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(topic))
            for topic in range(TOPICS)
        ]
    )
    generator = torch.Generator().manual_seed(100 + seed)
    rows = []
    for number in range(size):
        words = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        kept = torch.rand(LENGTH, generator=generator) < 0.8
        for place in range(1, LENGTH):
            if kept[place]:
                words[place] = tables[number % TOPICS, words[place - 1]] % 64
        rows.append({"input_ids": words, "labels": words})
    return Rows(rows)


def network() -> nn.Module:
    """Without ``Conv1D``, which not all of them know."""
    return with_linear_layers(tiny_gpt2(LENGTH))


def module() -> HuggingFaceModule:
    made = HuggingFaceModule(network(), learning_rate=RATE)
    made.configure_optimizers = lambda: torch.optim.AdamW(  # type: ignore[method-assign]
        made.parameters(), lr=RATE, weight_decay=0.0
    )
    return made


def order() -> list[list[int]]:
    """The batches of dattri-llm: one shuffle of all epochs."""
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(range(EPOCHS * TRAIN), BATCH, shuffle=True, generator=generator)
    return [[int(n) % TRAIN for n in batch] for batch in loader]


def fit(folder: Path | None, train: Rows, **recorder: Any) -> HuggingFaceModule:
    made = module()
    callbacks = [] if folder is None else [TrajectoryRecorder(folder, **recorder)]
    trainer = Trainer(
        max_epochs=1, callbacks=callbacks, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(made, DataLoader(train, batch_sampler=order(), collate_fn=default_collate))
    return made


class Study:
    """What all rows share: data, the recorded run and the truth."""

    def __init__(self, folder: Path) -> None:
        self.train, self.query = texts(TRAIN, 1), texts(QUERIES, 2)
        self.folder, self.run = folder, folder / "run"
        fit(self.run, self.train, num_checkpoints=3)
        self._truth: tuple[Tensor, Tensor] | None = None

    @property
    def trained(self) -> nn.Module:
        """The network at the end of the run."""
        run, made = Trajectory.load(self.run), module()
        made.load_state_dict(run.checkpoints[run.last_step].parameters, strict=False)
        return made.model.eval()

    def truth(self) -> tuple[Tensor, Tensor]:
        """Halves of the texts, and the queries' losses after the run with each."""
        if self._truth is None:
            run, made = Trajectory.load(self.run), module()
            subsets = draw_subsets(TRAIN, 0.5, SUBSETS)
            loader = DataLoader(self.train, 64)
            states = retrain_each(run, made, None, loader, subsets.float(), together=1)
            found = [
                measure(made, None, state, DataLoader(self.query, QUERIES), trajectory=run)
                for state in states
            ]
            self._truth = subsets, torch.stack(found)
        return self._truth

    def lds(self, scores: Tensor) -> list[float]:
        subsets, outcomes = self.truth()
        found = interval_over_subsets(scores, subsets, outcomes)
        return [round(value, 3) for value in (found.value, found.low, found.high)]

    # Ours.

    def ours(
        self, estimator: Any, layers: list[str] | None = LAYERS, run: Path | None = None
    ) -> Tensor:
        task = None if layers is None else TrainingStepTask([f"model.{name}" for name in layers])
        attribution = AttributionModule(module(), str(run or self.run), estimator, task=task)
        found = attribution.attribute(
            DataLoader(self.train, 64), DataLoader(self.query, QUERIES), self_influence=False
        )
        return found.values

    # dattri-llm.

    def dattri(self, name: str) -> Tensor:
        from dattri_llm import AttributionArguments, AttributionTask, HookManagerConfig
        from dattri_llm.attribution import AdamWInfluenceAttributor, TracInAttributor

        config = HookManagerConfig(hook_types=dict.fromkeys(LAYERS, "linear_io"))
        with tempfile.TemporaryDirectory() as folder:
            arguments = AttributionArguments(
                output_dir=folder, per_device_train_batch_size=BATCH if name == "adamw" else 64,
                per_device_eval_batch_size=QUERIES, learning_rate=RATE, weight_decay=0.0,
                lr_scheduler_type="constant", max_grad_norm=None, seed=0, data_seed=0,
            )  # fmt: skip
            model = network() if name == "adamw" else copy.deepcopy(self.trained)
            task = AttributionTask(lambda m, batch: m(**batch).loss, model)
            if name == "adamw":
                repeated = Rows(self.train.rows * EPOCHS)
                made = AdamWInfluenceAttributor(arguments, task=task)
                (cached,) = made.cache(repeated, self.query, hook_config=config)
                score = made.attribute_from_cache(*cached, propagation="test")
                return -self._in_order(score)  # of a loss that falls
            score = TracInAttributor(arguments, task=task).attribute(
                self.train, self.query, hook_config=config
            )
            return self._in_order(score)

    def _in_order(self, score: Any) -> Tensor:
        """[query, train]; rows come by hashes of what they hold."""
        from dattri_llm.utils import hashing

        names, matrix = score.agnostic_matrix()
        places = {name: place for place, name in enumerate(names)}
        own = [hashing.hash_sample(row) for row in self.train.rows]
        return matrix[[places[name] for name in own]].T

    def covariances(self) -> None:
        """Training with dattri-llm's callback of covariances."""
        from dattri_llm import HookManager, HookManagerConfig
        from dattri_llm.gradient.callbacks import KroneckerCovarianceCallback

        model = network()
        config = HookManagerConfig(hook_types=dict.fromkeys(LAYERS, "linear_io"))
        manager = HookManager(model, config=config, callbacks=[KroneckerCovarianceCallback()])
        with manager.collect():
            self.loop(model)
        manager.remove()

    def loop(self, model: nn.Module) -> None:
        """The same training by a plain loop."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
        for batch in DataLoader(self.train, batch_sampler=order()):
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    # bergson.

    def bergson(self) -> Tensor:
        """Gradient dot products at the end of the run."""
        from bergson import CollectorComputer, InMemoryCollector
        from bergson.config.config import IndexConfig
        from bergson.gradients import GradientProcessor
        from datasets import Dataset

        found, model = [], self.trained
        for rows in (self.query, self.train):
            with tempfile.TemporaryDirectory() as folder:
                data = Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in rows])
                config = IndexConfig(run_path=folder, projection_dim=0)
                Path(config.partial_run_path).mkdir(parents=True, exist_ok=True)
                collector = InMemoryCollector(
                    model=model.base_model, data=data, cfg=config,
                    processor=GradientProcessor(projection_dim=None),
                    target_modules={name.removeprefix("transformer.") for name in LAYERS},
                )  # fmt: skip
                batches = [[*part] for part in torch.arange(len(rows)).split(64)]
                computer = CollectorComputer(
                    model, data, collector=collector, cfg=config,
                    batches=[[int(n) for n in part] for part in batches],
                )  # fmt: skip
                computer.run_with_collector_hooks("gradients")
                found.append(torch.cat([own.float() for own in collector.gradients.values()], 1))
        return found[0] @ found[1].T


def rows(study: Study) -> dict[str, Callable[[], Tensor | None]]:
    online = study.folder / "online"
    return {
        "training by a plain loop": lambda: study.loop(network()),
        "training by Lightning": lambda: void(fit(None, study.train)),
        "training with the recorder": lambda: void(
            fit(study.folder / "again", study.train, num_checkpoints=3)
        ),
        "training with the recorder, curvature online": lambda: void(
            fit(online, study.train, num_checkpoints=3, curvature="online")
        ),
        "training with dattri-llm's covariances": lambda: study.covariances(),
        "TracIn, last checkpoint: dattri-llm": lambda: study.dattri("tracin"),
        "gradient dot products: bergson": lambda: study.bergson(),
        "TracIn, three checkpoints: ours": lambda: study.ours(TracIn()),
        "EK-FAC: kronfluence": lambda: kronfluence(
            study.trained, study.train, study.query, 64, "ekfac"
        ),
        "EK-FAC: ours": lambda: study.ours(InfluenceFunction()),
        "SOURCE, blocks: ours": lambda: study.ours(Source(leading_directions=0)),
        "SOURCE, blocks, all parameters: ours": lambda: study.ours(
            Source(leading_directions=0), None
        ),
        "SOURCE, all parameters: ours": lambda: study.ours(Source(), None),
        "AdamW-influence, with its training: dattri-llm": lambda: study.dattri("adamw"),
    }


def void(value: object) -> None:
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help="titles that begin so; all by default")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        study = Study(Path(folder))
        for title, row in rows(study).items():
            if title in known or (options.rows and not title.startswith(tuple(options.rows))):
                continue
            found: list[Tensor | None] = []
            try:
                seconds = processor_seconds(lambda row=row, found=found: found.append(row()))
            except Exception as error:  # of theirs: the reason is kept
                print(title, type(error).__name__, str(error)[:300], flush=True)
                continue
            known[title] = {"seconds": round(seconds, 2)}
            if found[0] is not None:
                known[title]["lds"] = study.lds(found[0])
            print(title, known[title], flush=True)
            RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
