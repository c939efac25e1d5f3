"""Studies in experiments/: their own arithmetic, and their tables from what is stored."""

from __future__ import annotations

from functools import partial

import torch
from lightning.pytorch import seed_everything
from torch.utils.data import TensorDataset

from experiments.descent import descend, fresh_batches
from experiments.mislabelled import table as mislabelled
from experiments.mislabelled.edits import MeanOverSet
from experiments.two_stages import question, setting
from experiments.two_stages import table as two_stages
from experiments.two_stages.derivative import derivative
from experiments.two_stages.results import read
from experiments.two_stages.truth import TASK, started
from tda_lightning import Trajectory
from tda_lightning.evaluation import draw_subsets, measure, retrain
from tda_lightning.examples.models import MLP, Classifier


def test_the_derivative_is_that_of_replaying_both_stages(tmp_path) -> None:
    seed_everything(0, verbose=False)
    optimizer = partial(torch.optim.SGD, lr=0.3, momentum=0.9)
    module = Classifier(MLP(6, [5], 3, "tanh"), optimizer).double()

    def examples(count: int) -> TensorDataset:
        return TensorDataset(torch.randn(count, 6).double(), torch.randint(3, (count,)))

    stages, queries = [examples(120), examples(60)], examples(4)
    for number, data in enumerate(stages):
        setting.train(number, module, data, tmp_path / f"stage{number + 1}")
    runs = setting.recorded(tmp_path)
    subsets = draw_subsets(120, 0.5, 3)

    def measured(weights: torch.Tensor) -> torch.Tensor:
        middle = retrain(runs[0], module, TASK, stages[0], weights)
        whole = torch.ones(60).double()
        end = retrain(started(runs[1], middle), module, TASK, stages[1], whole)
        return measure(module, TASK, end, queries)

    step = 1e-5 * (~subsets).double()
    expected = torch.stack([measured(1 - row) - measured(1 + row) for row in step], 1) / 2e-5
    found = derivative(runs, module, stages, queries, subsets)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_the_plain_loop_is_the_recorded_training(tmp_path) -> None:
    seed_everything(0, verbose=False)
    data = TensorDataset(torch.randn(120, 1, 28, 28), torch.randint(10, (120,)))
    setting.train(0, setting.network(0), data, tmp_path / "stage1")
    run = Trajectory.load(str(tmp_path / "stage1"))
    batches = [run.steps.batches(row)[0] for row in range(run.num_steps)]
    module = setting.network(0)
    module.load_state_dict(dict(run.checkpoints[0].parameters))
    descend(module, data, batches)
    for name, expected in run.checkpoints[run.last_step].parameters.items():
        assert torch.equal(module.state_dict()[name], expected)
    # As many batches of the same sizes, in another order every epoch.
    fresh = fresh_batches(torch.arange(120), setting.EPOCHS[0], setting.BATCH_SIZE)
    assert [len(batch) for batch in fresh] == [len(batch) for batch in batches]
    first, second = (torch.cat(fresh[start : start + 3]) for start in (0, 3))
    assert torch.equal(first.sort().values, torch.arange(120))
    assert not torch.equal(first, second)
    assert set(torch.cat(fresh_batches(torch.tensor([3, 7]), 1, 50)).tolist()) == {3, 7}


def test_pictures_are_turned_by_their_own_angles() -> None:
    pixels = torch.rand(3, 1, 28, 28)
    found = setting.rotate(pixels, torch.tensor([0, 90, 180]))
    expected = [torch.rot90(picture, turns, (1, 2)) for turns, picture in enumerate(pixels)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-4)


def test_a_set_is_measured_by_its_mean() -> None:
    seed_everything(0, verbose=False)
    module, task = setting.network(0), MeanOverSet()
    inputs, labels = torch.randn(2, 5, 1, 28, 28), torch.randint(10, (2, 5))
    expected = [task.train_loss(module, pair).mean() for pair in zip(inputs, labels, strict=True)]
    torch.testing.assert_close(task.measurement(module, (inputs, labels)), torch.stack(expected))


def test_two_stages_shows_what_is_stored() -> None:
    results = read(two_stages.HERE / "results")
    rows, text = two_stages.judged(results), (two_stages.HERE / "README.md").read_text()
    for block in (two_stages.recorded, two_stages.hindsight, two_stages.agreement):
        assert block(results) in text
    assert two_stages.table(rows) in text
    assert two_stages.figure(rows) == (two_stages.HERE / "results" / "lds.svg").read_text()
    assert question.table() in text


def test_mislabelled_shows_what_is_stored() -> None:
    results, text = mislabelled.read(), (mislabelled.HERE / "README.md").read_text()
    for block in mislabelled.blocks(results).values():
        assert block in text
    for name, drawing in mislabelled.figures(results).items():
        assert drawing == (mislabelled.HERE / "results" / name).read_text()
