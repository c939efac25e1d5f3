"""Scores of one tiny GPT-2 of ``transformers``, beside kronfluence: EK-FAC and dot products.

    python -m experiments.models.speed [--train 512 --length 64 --queries 20 --repeats 3]

Both get the same weights and the same tokens, fit EK-FAC factors with labels drawn from the model,
and score every pair, with nothing cached. kronfluence knows ``nn.Linear`` and no ``Conv1D``: it is
given the same network with its layers exchanged, and leaves embeddings, norms and the head out.
Ours are timed on the same layers, and on all parameters. The floor is three times the forward and
backward pass of all examples by plain autograd: covariances, eigenvalues and scores need one each,
where nothing is kept. Times are processor time, one thread each, in one run.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from experiments.models.cases import HuggingFaceModule, Rows
from tda_lightning import AttributionModule, TrajectoryRecorder
from tda_lightning.estimators import InfluenceFunction, Source, TracIn
from tda_lightning.tasks.training_step import TrainingStepTask

VOCABULARY, WIDTH, DEPTH, HEADS = 512, 64, 2, 4
LAYERS = [
    f"transformer.h.{number}.{name}"
    for number in range(DEPTH)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]


def tiny_gpt2(length: int) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=length, n_embd=WIDTH, n_layer=DEPTH, n_head=HEADS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def tokens(size: int, length: int, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(VOCABULARY, (size, length), generator=generator)
    return Rows([{"input_ids": row, "labels": row} for row in drawn])


def processor_seconds(work: Callable[[], Any]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def ours(
    folder: Path, train: Rows, query: Rows, length: int, batch: int,
    layers: list[str] | None, estimator: Any,
) -> float:  # fmt: skip
    module = HuggingFaceModule(tiny_gpt2(length), learning_rate=1e-3)
    options: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    if not folder.exists():
        recorder = TrajectoryRecorder(folder, num_checkpoints=1)
        loader = DataLoader(train, 64, collate_fn=default_collate)
        Trainer(max_epochs=1, callbacks=[recorder], **options).fit(module, loader)
    for cached in folder.glob("curvature/*"):
        cached.unlink()
    task = None if layers is None else TrainingStepTask([f"model.{name}" for name in layers])
    attribution = AttributionModule(module, str(folder), estimator, task=task)
    return processor_seconds(
        lambda: attribution.attribute(
            DataLoader(train, batch), DataLoader(query, batch), self_influence=False
        )
    )


def floor(train: Rows, length: int, batch: int) -> float:
    """Three forward and backward passes by plain autograd."""
    model = tiny_gpt2(length).eval()

    def work() -> None:
        for tokens in DataLoader(train, batch):
            torch.autograd.grad(model(**tokens).loss, list(model.parameters()))

    return sum(processor_seconds(work) for _ in range(3))


def with_linear_layers(model: nn.Module) -> nn.Module:
    """The same network without ``Conv1D``, and with a head of its own."""
    model = copy.deepcopy(model)
    for name, part in list(model.named_modules()):
        if isinstance(part, transformers.pytorch_utils.Conv1D):
            layer = nn.Linear(*part.weight.shape)
            layer.weight.data, layer.bias.data = part.weight.data.T.contiguous(), part.bias.data
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def theirs(train: Rows, query: Rows, length: int, batch: int, strategy: str) -> float:
    """Processor time of kronfluence's scores."""
    model = tiny_gpt2(length)
    return processor_seconds(lambda: kronfluence(model, train, query, batch, strategy))


def kronfluence(model: nn.Module, train: Rows, query: Rows, batch: int, strategy: str) -> Tensor:
    """Its influence scores of :data:`LAYERS`, [query, train]."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Told(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            labels = batch["labels"][:, 1:].flatten()
            if sample:
                labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
            return F.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return LAYERS

    task = Told()
    prepared = prepare_model(with_linear_layers(model), task)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("run", prepared, task, cpu=True, output_dir=folder, disable_tqdm=True)
        analyzer.fit_all_factors(
            strategy, train, per_device_batch_size=batch,
            factor_args=FactorArguments(strategy), overwrite_output_dir=True,
        )  # fmt: skip
        analyzer.compute_pairwise_scores(
            "scores", strategy, query, train, per_device_query_batch_size=len(query),
            per_device_train_batch_size=batch, score_args=ScoreArguments(),
            overwrite_output_dir=True,
        )  # fmt: skip
        return analyzer.load_pairwise_scores("scores")["all_modules"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("train", 512), ("length", 64), ("queries", 20), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    train = tokens(arguments.train, arguments.length, 1)
    query = tokens(arguments.queries, arguments.length, 2)
    sizes = (arguments.length, arguments.batch)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        rows: dict[str, Callable[[], float]] = {
            "kronfluence, EK-FAC": lambda: theirs(train, query, *sizes, "ekfac"),
            "EK-FAC, the same layers": lambda: ours(
                run, train, query, *sizes, LAYERS, InfluenceFunction()
            ),
            "EK-FAC, all parameters": lambda: ours(
                run, train, query, *sizes, None, InfluenceFunction()
            ),
            "kronfluence, dot products": lambda: theirs(train, query, *sizes, "identity"),
            "dot products, the same layers": lambda: ours(
                run, train, query, *sizes, LAYERS, TracIn()
            ),
            "AdamW-influence (SOURCE, blocks), all parameters": lambda: ours(
                run, train, query, *sizes, None, Source(num_segments=1, leading_directions=0)
            ),
            "floor": lambda: floor(train, *sizes),
        }
        for title, row in rows.items():
            seconds = [row() for _ in range(arguments.repeats)]
            print(json.dumps({title: round(median(seconds), 2)}), flush=True)


if __name__ == "__main__":
    main()
