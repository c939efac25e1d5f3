"""The same scores on a GPU. Run by hand: pytest -m gpu."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import TensorDataset

from tda_lightning.attribution import AttributionModule
from tda_lightning.estimators import InfluenceFunction, Source, TracIn
from tda_lightning.gradients import GradientEngine
from tda_lightning.tasks import ClassificationTask, RegressionTask, example_noise
from tests.cases import CASES
from tests.cases.training import CLASSIFIER, OPTIMIZERS, queries_of, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

ESTIMATORS = {
    "source": Source(num_segments=2),
    "source exact": Source(num_segments=2, curvature="exact"),
    "source recorded": Source(num_segments=2, order="recorded"),
    "tracin": TracIn(),
    "influence": InfluenceFunction(),
}


@pytest.mark.parametrize("name", ["conv", "attention", "recurrent", "norm", "embedding"])
def test_gradients_are_those_of_the_cpu(name):
    chosen = [case for case in CASES if name in case.name and not case.may_refuse][:6]
    assert chosen
    for case in chosen:
        module, batch = case.build(), case.batch()
        task = RegressionTask() if case.kind == "regression" else ClassificationTask()
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


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_scores_are_those_of_the_cpu(optimizer, name):
    run, module, data = train(CLASSIFIER, OPTIMIZERS[optimizer], checkpoints=(3, 6))
    scores = []
    for accelerator in ("cpu", "cuda"):
        run.curvature.clear()
        attribution = AttributionModule(module, run, ESTIMATORS[name], ClassificationTask())
        trainer = Trainer(
            accelerator=accelerator,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        queries = TensorDataset(*queries_of(CLASSIFIER))
        scores.append(attribution.attribute(TensorDataset(*data), queries, 4, trainer))
    torch.testing.assert_close(scores[1].values, scores[0].values, rtol=1e-6, atol=1e-9)


def test_sampled_labels_are_those_of_the_cpu():
    torch.manual_seed(0)
    module = torch.nn.Linear(5, 4).double()
    batch = (torch.randn(7, 5, dtype=torch.float64), torch.randint(4, (7,)))
    losses = []
    for device in ("cpu", "cuda"):
        placed = tuple(part.to(device) for part in batch)
        with example_noise(3, torch.arange(7, device=device)):
            losses.append(ClassificationTask().sampled_loss(module.to(device), placed).cpu())
    torch.testing.assert_close(losses[1], losses[0])
