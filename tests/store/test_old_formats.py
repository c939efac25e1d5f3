"""Files of format 2 stay readable: those in tests/fixtures/format_2 hold what is beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule, Scores, Trajectory
from tda_lightning.estimators import FastInfluence, Source, Unrolled
from tda_lightning.estimators.source import segments
from tda_lightning.tasks import ClassificationTask, LanguageModelingTask

pytestmark = pytest.mark.filterwarnings("ignore")
FIXTURES = Path(__file__).parents[1] / "fixtures" / "format_2"
RUNS = ("one_stage", "two_stages")


# What was trained


class Classifier(LightningModule):
    """Of the run in two stages: dropout, a running statistic, a bfloat16 buffer, a frozen bias."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.2), nn.Linear(3, 2)
        )
        self.net[4].bias.requires_grad_(False)
        self.shift = nn.Embedding(4, 2)
        self.register_buffer("scale/of%outputs", torch.tensor([1.5], dtype=torch.bfloat16))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs) + self.shift((2 + 2 * inputs[:, 0]).long().clamp(0, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        weights = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() == 1]
        groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "lr": 0.05}]
        optimizer = torch.optim.AdamW(groups, lr=0.02)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "epoch"}]


class Tokens(LightningModule):
    """Of the run in one stage: a model of the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Linear(3, 5)).double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0][:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.5, 0.5, weight_decay=0.01)


def classes_data(size: int, first: int = 0) -> TensorDataset:
    inputs = torch.arange(first, first + 6 * size).view(size, 6).mul(0.37).sin()
    return TensorDataset(inputs, (inputs.sum(1) > 0).long())


def tokens_data(size: int, first: int = 0) -> TensorDataset:
    rows = torch.arange(first, first + size)[:, None]
    return TensorDataset((rows * torch.arange(1, 6) + torch.arange(5) ** 2) % 5)


# What the files hold, by name, as JSON has it


def flattened(prefix: str, value: Any) -> dict[str, Any]:
    """Of a tensor its type and shape, and its numbers or, of many, their digest."""
    if isinstance(value, Tensor):
        about = [str(value.dtype), list(value.shape)]
        if value.numel() <= 100:
            return {prefix: [*about, value.flatten().tolist()]}
        return {prefix: [*about, sha256(value.contiguous().numpy().tobytes()).hexdigest()]}
    if isinstance(value, Mapping):
        parts = [flattened(f"{prefix}/{name}", part) for name, part in value.items()]
        return {name: part for item in parts for name, part in item.items()}
    return {prefix: json.loads(json.dumps(value, default=str))}


def steps_of(run: Trajectory) -> dict[str, Any]:
    names = (
        "epoch",
        "learning_rate",
        "loss",
        "gradient_norm",
        "accumulation",
        "clipping",
        "batch_offsets",
        "example_offsets",
        "examples",
        "hyperparameters",
    )
    out = {name: getattr(run.steps, name) for name in names}
    random = {str(batch): dict(states) for batch, states in run.steps.random.items()}
    return flattened("steps", {**out, "random": random})


def facts_of(run: Trajectory) -> dict[str, Any]:
    facts = run.facts
    parameters = {
        name: [list(fact.shape), fact.dtype, fact.group] for name, fact in facts.parameters.items()
    }
    stages = [[one.start, list(one.parameters), one.new_optimizer] for one in facts.stages]
    return {
        "facts/parameters": parameters,
        "facts/optimizer": facts.optimizer,
        "facts/num_examples": facts.num_examples,
        "facts/fingerprint": dict(facts.fingerprint or {}),
        "facts/stages": stages,
        "facts/settings": json.loads(json.dumps(dict(facts.settings), default=str)),
    }


def checkpoints_of(run: Trajectory) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for step in sorted(run.checkpoints):
        one = run.checkpoints[step]
        parts = {name: getattr(one, name) for name in ("parameters", "buffers", "random")}
        states = {name: dict(state) for name, state in (one.optimizer or {}).items()}
        out |= flattened(f"checkpoints/{step}", {**parts, "optimizer": states})
    return out


def statistics_of(run: Trajectory) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for (start, stop), blocks in run.statistics.items():
        for name, block in blocks.items():
            prefix = f"statistics/{start}-{stop}/{name}"
            sums = {part: getattr(block, part) for part in block.SUMS}
            out |= flattened(prefix, sums)
            out[f"{prefix}/of"] = [list(block.parameters), list(block.shape)]
    return out


def caches_of(run: Trajectory) -> dict[str, Any]:
    caches = {"curvature": run.curvature, "unfinished": run.unfinished, "features": run.features}
    return {
        name: value
        for kind, cache in caches.items()
        for key in cache
        for name, value in flattened(f"{kind}/{key}", cache[key]).items()
    }


def scores_of(path: Path, **options: Any) -> dict[str, Any]:
    scores = Scores.load(path, **options)
    names = ("values", "by_segment", "self_influence", "by_token", "candidates")
    held = {name: getattr(scores, name) for name in names}
    present = {name: value for name, value in held.items() if value is not None}
    return flattened(
        f"scores/{path.stem}",
        {**present, "provenance": json.dumps(dict(scores.provenance), sort_keys=True)},
    )


def truth_of(path: Path) -> dict[str, Any]:
    from tda_lightning.store.ground_truth_file import read_ground_truth

    truth = read_ground_truth(path)
    names = ("subsets", "seeds", "outcomes", "done", "seconds", "baseline", "classes")
    out = flattened("truth", {name: getattr(truth, name) for name in names})
    out["truth/of"] = [truth.protocol, dict(truth.configuration), dict(truth.made_by)]
    return out


def contents_of(folder: Path) -> dict[str, Any]:
    """Everything in a trajectory's folder."""
    run = Trajectory.load(str(folder))
    out = {**facts_of(run), **steps_of(run), **checkpoints_of(run)}
    out |= {**statistics_of(run), **caches_of(run)}
    for path in sorted((folder / "scores").glob("*.h5")):
        out |= scores_of(path)
    for path in sorted((folder / "ground_truth").glob("*.h5")):
        out |= truth_of(path)
    return out


def expected_of(name: str) -> dict[str, Any]:
    """What the fixtures' files hold by the code that wrote them."""
    everything = json.loads((FIXTURES / "expected.json").read_text())
    prefix = f"{name}/"
    return {k.removeprefix(prefix): v for k, v in everything.items() if k.startswith(prefix)}


# The tests


@pytest.mark.parametrize("name", RUNS)
def test_every_file_holds_what_was_written(name: str) -> None:
    # As text: there NaN equals NaN.
    got, expected = contents_of(FIXTURES / name), expected_of(name)
    assert sorted(got) == sorted(expected)
    for key, value in expected.items():
        assert json.dumps(got[key]) == json.dumps(value), key


def test_the_fixtures_have_every_dataset_of_the_layout() -> None:
    both = [*expected_of("one_stage"), *expected_of("two_stages")]
    for part in (
        "steps/random/",
        "steps/hyperparameters/momentum",
        "steps/hyperparameters/beta1",
        "checkpoints/0/",
        "/optimizer/net.2.weight/momentum_buffer",
        "/optimizer/net.4.weight/exp_avg_sq",
        "/random/python",
        "/random/numpy",
        "/random/torch",
        "/buffers/scale",
        "/buffers/net.4.bias",
        "statistics/",
        "curvature/",
        "unfinished/",
        "features/",
        "scores/source/by_segment",
        "scores/source/self_influence",
        "scores/unrolled/by_token",
        "scores/fastif/candidates",
        "truth/classes",
    ):
        assert any(part in name for name in both), part
    shapes = [
        value[1]
        for name, value in expected_of("two_stages").items()
        if name.startswith("statistics/") and name.endswith(("/left", "/right"))
    ]
    sides = {len(shape) + (len(shape) > 2 and shape[1] == shape[2]) for shape in shapes}
    assert sides == {2, 3, 4}  # a diagonal, a sketch, a matrix


def test_a_run_in_stages_is_cut_where_it_was() -> None:
    first, second = Trajectory.load(str(FIXTURES / "two_stages")).stages()
    always = {"net.4.weight", "shift.weight"}
    assert set(first.facts.parameters) == {"net.0.weight", "net.0.bias"} | always
    assert set(second.facts.parameters) == {"net.1.weight", "net.1.bias"} | always
    assert first.num_steps + second.num_steps == 4


def test_a_scores_file_is_read_mapped_and_in_part() -> None:
    for path in sorted((FIXTURES / "one_stage" / "scores").glob("*.h5")):
        whole, mapped = Scores.load(path), Scores.load(path, mapped=True)
        part = Scores.load(path, queries=slice(1, 2))
        for name in ("values", "by_segment", "self_influence", "by_token", "candidates"):
            held, other = getattr(whole, name), getattr(mapped, name)
            assert (held is None) == (other is None)
            if held is not None:
                assert torch.equal(held.nan_to_num(7), other.nan_to_num(7))
        assert torch.equal(part.values.nan_to_num(7), whole.values[1:2].nan_to_num(7))


@pytest.mark.parametrize(
    ("estimator", "name"),
    [
        (lambda: Source(num_segments=2, leading_directions=0), "source"),
        (lambda: FastInfluence(k=3, layer="net.1"), "fastif"),
        (lambda: Unrolled(token_weights=True), "unrolled"),
    ],
)
def test_the_recorded_run_still_has_the_scores_that_it_had(
    estimator: Any, name: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(FIXTURES / "one_stage", run)  # whoever scores keeps curvature beside the run
    attribution = AttributionModule(Tokens(), str(run), estimator(), LanguageModelingTask())
    got = attribution.attribute(
        tokens_data(8), tokens_data(3, 1), batch_size=4, trainer=_quiet(), self_influence=True
    )
    expected = Scores.load(FIXTURES / "one_stage" / "scores" / f"{name}.h5")
    for part in ("values", "by_segment", "self_influence", "by_token", "candidates"):
        value, other = getattr(got, part), getattr(expected, part)
        assert (value is None) == (other is None), part
        if other is not None:
            largest = float(other.nan_to_num(0).abs().max())
            torch.testing.assert_close(
                value, other, rtol=0, atol=1e-9 * largest, equal_nan=True, msg=part
            )


def test_curvature_recorded_in_two_stages_still_gives_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Written when a bias before BatchNorm was still moved by gradients that training did not feel.
    monkeypatch.setattr(segments, "felt", lambda session, step: {})
    run = tmp_path / "run"
    shutil.copytree(FIXTURES / "two_stages", run)
    attribution = AttributionModule(
        Classifier(), str(run), Source(num_segments=1, statistics="recorded"), ClassificationTask()
    )
    scores = attribution.attribute(classes_data(11), classes_data(2, 5), trainer=_quiet())
    _, shape, numbers = expected_of("two_stages scores")["values"]
    expected = torch.tensor(numbers).view(shape)
    largest = float(expected.abs().max())
    torch.testing.assert_close(scores.values, expected, rtol=0, atol=1e-5 * largest)


def _quiet() -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
