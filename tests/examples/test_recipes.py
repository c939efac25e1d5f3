"""Standard recipes around a model of transformers: gradient checkpointing with adapters, mixed
precision, data of ``datasets``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning import AttributionModule, Trajectory, TrajectoryRecorder
from tda_lightning.estimators import InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.records.errors import UnsupportedTrainingError
from tests.attributing import quiet, relative
from tests.runs import trainer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

WORDS, LENGTH = 24, 8


def llama(checkpointing: bool | None = None) -> nn.Module:
    """With adapters; ``checkpointing`` says whether it is reentrant, None for none."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=LENGTH,
        use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


class Causal(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.5)


def texts(size: int, seed: int) -> list[dict[str, list[int]]]:
    drawn = torch.randint(WORDS, (size, LENGTH), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in drawn]


def stacked(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


def loader(rows: Any) -> DataLoader:
    return DataLoader(rows, 4, collate_fn=stacked)


def values(folder: Path, module: LightningModule, estimator: Any) -> Tensor:
    attribution = AttributionModule(module, str(folder), estimator)
    train, query = loader(texts(12, 1)), loader(texts(3, 2))
    return attribution.attribute(train, query, trainer=quiet(), self_influence=False).values


def recorded(folder: Path, module: LightningModule, **options: Any) -> None:
    own = Trainer(
        max_epochs=2, callbacks=[TrajectoryRecorder(folder, num_checkpoints=3)],
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    own.fit(module, loader(texts(12, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_adapters_with_gradient_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    recorded(tmp_path / "plain", Causal(llama()))
    recorded(tmp_path / "saving", Causal(llama(reentrant)))
    for estimator in (TracIn(), InfluenceFunction(), Unrolled()):
        plain = values(tmp_path / "plain", Causal(llama()), estimator)
        found = values(tmp_path / "saving", Causal(llama(reentrant)), estimator)
        assert plain.abs().sum() > 0
        assert relative(found, plain) < 1e-5


@pytest.mark.slow
def test_training_in_mixed_precision_is_scored_in_float32(tmp_path: Path) -> None:
    """So scores are off by what the recorded weights are: bfloat16 has 8 bits."""
    recorded(tmp_path / "whole", Causal(llama()))
    recorded(tmp_path / "mixed", Causal(llama()), precision="bf16-mixed")
    for estimator in (TracIn(), InfluenceFunction(), Source()):
        whole = values(tmp_path / "whole", Causal(llama()), estimator)
        mixed = values(tmp_path / "mixed", Causal(llama()), estimator)
        assert mixed.dtype == torch.float32
        assert 0 < relative(mixed, whole) < 0.02
    with pytest.raises(UnsupportedTrainingError, match="precision=bf16-mixed; the replay is writt"):
        values(tmp_path / "mixed", Causal(llama()), Unrolled())


def test_datasets_of_hugging_face(tmp_path: Path) -> None:
    """Map-style in a shuffled order; streamed, with a copy by position for the attribution."""
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(texts(12, 1))
    draw = torch.Generator().manual_seed(3)
    shuffled = DataLoader(data, 4, shuffle=True, collate_fn=stacked, generator=draw)
    streamed = DataLoader(data.to_iterable_dataset(), 4, collate_fn=stacked)
    draw = torch.Generator().manual_seed(3)
    plainly = DataLoader(texts(12, 1), 4, shuffle=True, collate_fn=stacked, generator=draw)
    runs = {
        "plainly": (plainly, loader(texts(12, 1))),
        "shuffled": (shuffled, loader(data)),
        "in order": (loader(texts(12, 1)), loader(texts(12, 1))),
        "streamed": (streamed, loader(data)),
    }
    found = {}
    for name, (trained, given) in runs.items():
        folder = tmp_path / name
        trainer(TrajectoryRecorder(folder, every_n_steps=3)).fit(Causal(llama()), trained)
        attribution = AttributionModule(Causal(llama()), str(folder), TracIn())
        if name == "streamed":
            with pytest.raises(TypeError, match="got IterableDataset: scores belong to example"):
                attribution.attribute(streamed, loader(texts(3, 2)), trainer=quiet())
        queries = loader(texts(3, 2))
        found[name] = attribution.attribute(given, queries, trainer=quiet(), self_influence=False)
    assert torch.equal(found["shuffled"].values, found["plainly"].values)
    assert torch.equal(found["streamed"].values, found["in order"].values)
    assert not torch.equal(found["streamed"].values, found["shuffled"].values)
    assert any("IterableDataset" in note for note in found["streamed"].provenance["notes"])


class Numbered(Causal):
    """Its batches say which texts they hold."""

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.model(**{key: own for key, own in batch.items() if key != "number"}).loss


def test_a_shuffled_stream_of_hugging_face_is_unrolled(tmp_path: Path) -> None:
    """By the positions that its batches hold, with a map-style copy for the attribution."""
    datasets = pytest.importorskip("datasets")
    rows = [{**row, "number": place} for place, row in enumerate(texts(12, 1))]
    data = datasets.Dataset.from_list(rows)
    stream = data.to_iterable_dataset().shuffle(seed=2, buffer_size=6)
    recorder = TrajectoryRecorder(tmp_path / "stream", every_n_steps=3, index_key="number")

    def joined(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}

    trainer(recorder, max_epochs=2).fit(Numbered(llama()), DataLoader(stream, 4, collate_fn=joined))
    run = Trajectory.load(tmp_path / "stream")
    drawn = run.steps.examples.view(2, 12)
    assert all(sorted(epoch.tolist()) == [*range(12)] for epoch in drawn)
    assert drawn[0].tolist() != [*range(12)]
    scores = AttributionModule(Numbered(llama()), run, Unrolled()).attribute(
        DataLoader(data, 4, collate_fn=joined),
        DataLoader(rows[:3], 3, collate_fn=joined),
        trainer=quiet(),
        self_influence=False,
    )
    assert scores.provenance["certificate"]["relative_difference"] < 1e-5
