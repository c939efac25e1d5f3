"""What the scripts of experiments/peers tell the other libraries, and what they make of it."""

import pytest
import torch
from torch import nn

from experiments.peers import command
from experiments.peers.recorded import (
    class_losses,
    drawn_classes,
    drawn_numbers,
    drawn_tokens,
    open_run,
    squared_errors,
    token_losses,
)
from experiments.peers.trak import projection_dimension
from tda_lightning import Scores
from tda_lightning.cli import main as tda

CASES = [
    (class_losses, drawn_classes, (3,)),
    (squared_errors, drawn_numbers, (3,)),
    (token_losses, drawn_tokens, (4, 3)),
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers") / "digits"
    small = ["data.num_train=40", "data.num_query=3", "trainer.max_epochs=1", "threads=1"]
    assert tda(["train", "experiment=digits", *small, f"output={folder}"]) == 0
    return folder


@pytest.mark.parametrize(("losses", "draw", "shape"), CASES)
def test_drawn_targets_give_the_gauss_newton_matrix_of_the_told_loss(losses, draw, shape):
    torch.manual_seed(0)
    outputs = torch.randn(1, *shape, dtype=torch.float64)
    targets = draw(outputs)

    def flat(point):
        return losses(point.view(1, *shape), targets).sum()

    hessian = torch.autograd.functional.hessian(flat, outputs.flatten())
    many = outputs.expand(40_000, *shape).clone().requires_grad_()
    (gradients,) = torch.autograd.grad(losses(many, draw(many.detach())).sum(), many)
    fisher = gradients.flatten(1).T @ gradients.flatten(1) / len(many)
    torch.testing.assert_close(fisher, hessian, rtol=0.0, atol=0.06 * float(hessian.max()))


def test_a_run_is_opened_at_its_last_checkpoint(recorded):
    run = open_run(recorded, None, "cpu")
    assert run.scale == pytest.approx(1.0)
    last = run.trajectory.checkpoints[run.trajectory.last_step].parameters
    for name, parameter in run.module.named_parameters():
        assert torch.equal(parameter, last[name])
    assert not run.module.training
    assert run.steps == sorted(run.steps) and run.steps[-1] == run.trajectory.last_step


def test_a_loss_that_is_no_multiple_of_the_told_one_is_refused(recorded):
    config = (recorded / "config.yaml").read_text()
    smoothed = config.replace("label_smoothing: 0.0", "label_smoothing: 0.2")
    assert smoothed != config
    try:
        (recorded / "config.yaml").write_text(smoothed)
        with pytest.raises(ValueError, match="not a multiple of class_losses"):
            open_run(recorded, None, "cpu")
    finally:
        (recorded / "config.yaml").write_text(config)


def test_each_damping_has_a_file_of_its_own(tmp_path):
    parser = command.parser("kronfluence", None, "About.")
    output = tmp_path / "kronfluence.h5"
    arguments = parser.parse_args(
        ["RUN", "--output", str(output), "--damping", "default", "1e-4", "0.01"]
    )
    assert command.start(arguments) == {
        "default": output,
        "1e-4": tmp_path / "kronfluence-1e-4.h5",
        "0.01": tmp_path / "kronfluence-0.01.h5",
    }
    (tmp_path / "kronfluence-1e-4.h5").touch()
    with pytest.raises(FileExistsError, match="--overwrite"):
        command.start(arguments)


def test_a_projection_must_leave_invertible_moments():
    assert projection_dimension(None, 10_000) == 2048
    assert projection_dimension(None, 300) == 150
    with pytest.raises(ValueError, match="between 1 and the number of training examples, 300"):
        projection_dimension(301, 300)


@pytest.mark.parametrize("name", ["kronfluence", "captum", "trak"])
def test_scores_of_a_library_are_ours_in_sign(recorded, tmp_path, monkeypatch, name):
    from importlib import import_module

    package = {"kronfluence": "kronfluence", "captum": "captum.influence", "trak": "trak"}[name]
    pytest.importorskip(package)
    library = import_module(f"experiments.peers.{name}")
    file = tmp_path / f"{name}.h5"
    monkeypatch.setattr("sys.argv", [name, str(recorded), "--output", str(file), "--threads", "1"])
    library.main()
    scores = Scores.load(file)
    assert scores.values.shape == (3, 40)
    assert scores.provenance["seconds"] > 0
    # Examples of a query's own class help it more than others do.
    run = open_run(recorded, None, "cpu")
    labels = torch.tensor([int(run.train[n][1]) for n in range(40)])
    for row, (_, label) in zip(scores.values, run.query, strict=True):
        same = labels == int(label)
        assert row[same].mean() > row[~same].mean()


def test_a_tied_weight_is_seen_once():

    from experiments.peers.kronfluence import left_out

    network = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 5, bias=False))
    assert left_out(network) == ["0.weight", "1.weight", "1.bias"]
    network[2].weight = network[0].weight
    assert left_out(network) == ["1.weight", "1.bias"]
