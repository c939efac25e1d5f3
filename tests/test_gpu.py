"""The same scores on a GPU. Run by hand: pytest -m gpu."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import FSDPStrategy
from torch.utils.data import TensorDataset

from tda_lightning.attribution.module import AttributionModule
from tda_lightning.edits import Relabel, Removal, Replace
from tda_lightning.estimators import (
    TRAK,
    FastInfluence,
    InfluenceFunction,
    Source,
    TracIn,
    Unrolled,
)
from tda_lightning.gradients import GradientEngine
from tda_lightning.recording import TrajectoryRecorder
from tda_lightning.solvers import ConjugateGradients
from tda_lightning.store import open_trajectory
from tda_lightning.tasks import ClassificationTask, seeded_examples
from tests.attributing import CaseTask
from tests.cases import CASES
from tests.cases.training import CLASSIFIER, OPTIMIZERS, queries_of, train
from tests.recording.test_processes import Plain
from tests.runs import Numbered, adamw, fit, loader
from tests.runtime.test_random_states import require_repeatable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

ESTIMATORS = {
    "source": Source(num_segments=2),
    "source exact": Source(num_segments=2, curvature="exact"),
    "source leading": Source(num_segments=2, leading_directions=5),
    "source recorded": Source(num_segments=2, order="recorded"),
    "tracin": TracIn(),
    "influence": InfluenceFunction(),
    "influence cg": InfluenceFunction(damping=0.1, solver=ConjugateGradients(tolerance=1e-10)),
    "fastif": FastInfluence(k=4),
    "trak": TRAK(projection_dimension=4),
    "unrolled": Unrolled(),
}


@pytest.mark.parametrize("name", ["conv", "attention", "lstm/", "gru/", "norm", "embedding"])
def test_gradients_are_those_of_the_cpu(name):
    chosen = [case for case in CASES if name in case.name and not case.may_refuse][:6]
    assert chosen
    for case in chosen:
        module, batch = case.build(), case.batch()
        task = CaseTask(case.kind)
        found = []
        for device in ("cpu", "cuda"):
            module.to(device)
            placed = tuple(part.to(device) for part in batch)
            examples = torch.arange(len(batch[0]), device=device)
            names = [n for n, p in module.named_parameters() if p.requires_grad]
            engine = GradientEngine(module, names)

            def loss(module, part, _, task=task):
                return task.train_loss(module, part)

            engine.discover(loss, placed, examples)
            gradients = engine.gradients(loss, placed, examples).blocks
            found.append({n: g.dense(slice(None)).cpu() for n, g in gradients.items()})
        for block, expected in found[0].items():
            torch.testing.assert_close(found[1][block], expected, rtol=1e-8, atol=1e-10)


def test_fsdp_is_recorded_like_one_process(tmp_path):
    """Lightning's FSDPStrategy in one GPU process: what is in the files is what the CPU records."""
    for name in ("cpu", "cuda"):
        seed_everything(7, verbose=False)
        wrapped = FSDPStrategy(auto_wrap_policy={torch.nn.Linear})
        Trainer(
            accelerator=name,
            strategy=wrapped if name == "cuda" else "auto",
            devices=1,
            max_epochs=2,
            callbacks=[TrajectoryRecorder(tmp_path / name)],
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Plain(adamw), loader(Numbered(21), shuffle=True))
    expected, found = (open_trajectory(tmp_path / name) for name in ("cpu", "cuda"))
    assert found.facts.parameters == expected.facts.parameters
    assert torch.equal(found.steps.examples, expected.steps.examples)
    torch.testing.assert_close(
        found.steps.gradient_norm, expected.steps.gradient_norm, rtol=1e-3, atol=1e-5
    )
    assert sorted(found.checkpoints) == sorted(expected.checkpoints)
    for step, checkpoint in expected.checkpoints.items():
        for kind in ("parameters", "buffers"):
            ours, theirs = getattr(found.checkpoints[step], kind), getattr(checkpoint, kind)
            assert ours.keys() == theirs.keys()
            for name, tensor in theirs.items():
                torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)
        assert found.checkpoints[step].optimizer.keys() == checkpoint.optimizer.keys()
        for name, state in checkpoint.optimizer.items():
            shapes = {key: tensor.shape for key, tensor in state.items()}
            ours = found.checkpoints[step].optimizer[name]
            assert {key: tensor.shape for key, tensor in ours.items()} == shapes


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_scores_are_those_of_the_cpu(optimizer, name):
    run, module, data = train(CLASSIFIER, OPTIMIZERS[optimizer], checkpoints=(3, 6))
    scores = []
    # Last with the curvature that the GPU has left, read from memory.
    for accelerator in ("cpu", "cuda", "cuda"):
        if len(scores) < 2:
            run.curvature.clear()
            run.features.clear()
        attribution = AttributionModule(module, run, ESTIMATORS[name], ClassificationTask())
        trainer = Trainer(
            accelerator=accelerator,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        queries = TensorDataset(*queries_of(CLASSIFIER))
        scores.append(
            attribution.attribute(TensorDataset(*data), queries, 4, trainer, self_influence=True)
        )
        assert next(module.parameters()).device.type == "cpu"
    for found in scores[1:]:
        assert "cuda" in found.provenance["device"]
        # Only what was no candidate has no score.
        partial = scores[0].candidates is not None
        torch.testing.assert_close(
            found.values, scores[0].values, rtol=1e-6, atol=1e-9, equal_nan=partial
        )
        if scores[0].self_influence is not None:
            torch.testing.assert_close(
                found.self_influence, scores[0].self_influence, rtol=1e-6, atol=1e-9
            )


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "fastif"])
def test_scores_of_edits_are_those_of_the_cpu(name):
    run, module, data = train(CLASSIFIER, OPTIMIZERS["adamw"], checkpoints=(3, 6))
    example = (data[0][5] * 0.7, 1 - data[1][5])
    edits = [Removal(4), Relabel(3, 1 - int(data[1][3])), Replace(1, example)]
    scores = []
    for accelerator in ("cpu", "cuda"):
        run.curvature.clear()
        attribution = AttributionModule(module, run, ESTIMATORS[name], CaseTask("classification"))
        trainer = Trainer(
            accelerator=accelerator,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        queries = TensorDataset(*queries_of(CLASSIFIER))
        scores.append(attribution.attribute(TensorDataset(*data), queries, 4, trainer, edits=edits))
    torch.testing.assert_close(scores[1].values, scores[0].values, rtol=1e-6, atol=1e-9)


def test_buffers_and_weights_are_put_back_where_they_were():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).double()
    case = dataclasses.replace(CLASSIFIER, name="batch norm", factory=lambda: module)
    run, module, data = train(case, OPTIMIZERS["momentum"])
    queries = TensorDataset(*queries_of(case))
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.add_(1)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    attribution = AttributionModule(module, run, TracIn(), ClassificationTask())
    trainer = Trainer(accelerator="cuda", devices=1, logger=False, enable_checkpointing=False)
    attribution.attribute(TensorDataset(*data), queries, 4, trainer)
    for name, tensor in module.state_dict().items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, before[name])


def test_sampled_labels_are_those_of_the_cpu():
    torch.manual_seed(0)
    module = torch.nn.Linear(5, 4).double()
    batch = (torch.randn(7, 5, dtype=torch.float64), torch.randint(4, (7,)))
    losses = []
    for device in ("cpu", "cuda"):
        placed = tuple(part.to(device) for part in batch)
        with seeded_examples(3, torch.arange(7, device=device)):
            losses.append(ClassificationTask().sampled_loss(module.to(device), placed).cpu())
    torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_is_repeated_bit_for_bit(workers, tmp_path):
    """Dropout draws from the device's generator."""
    data = Numbered(augment=not workers)
    fit(
        tmp_path,
        lambda: loader(data, shuffle=True, num_workers=workers),
        recorder={"every_n_steps": 4},
        validation=loader(Numbered(8, seed=1)),
        val_check_interval=3,
        accelerator="cuda",
        devices=1,
    )
    run = require_repeatable(tmp_path, data, device="cuda")
    assert "cuda0" in run.steps.random[0]
