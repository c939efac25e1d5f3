"""Frozen and unfrozen parameters: a stage begins, against a loop in torch alone."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning
from rich.console import Console
from torch import nn

from tda_lightning import AttributionModule
from tda_lightning.cli.inspect_table import description_table
from tda_lightning.estimators import Source, TracIn
from tda_lightning.recording import TrajectoryRecorder
from tda_lightning.records.errors import TrajectoryFormatError, UnsupportedTrainingError
from tda_lightning.records.trajectory import StageFact, Trajectory
from tda_lightning.store import layout, open_trajectory
from tda_lightning.store.inspect import describe
from tests.attributing import quiet
from tests.plain_loop import Small, epochs, require_agreement, train
from tests.runs import Numbered, fit, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore")

BACK, HEAD = ("net.0.weight", "net.0.bias"), ("net.3.weight", "net.3.bias")
NORM = ("net.1.weight", "net.1.bias")


def sgd(net: nn.Module) -> Any:
    return torch.optim.SGD(net.parameters(), 0.1, 0.9)


def set_trained(net: nn.Module, epoch: int) -> None:
    """Everything, then without the first layer, then that alone with the head."""
    net[0].requires_grad_(epoch != 1)
    net[1].requires_grad_(epoch != 2)


class Toggles(Callback):
    """Freezes and unfreezes in the hook of that name, each epoch another part."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.toggle)

    def toggle(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        set_trained(pl_module.net, trainer.current_epoch)


class TogglesItself(Small):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        set_trained(self.net, self.current_epoch)


def record(path: Path, module: Any, *callbacks: Any, **options: Any) -> Trajectory:
    recorder = TrajectoryRecorder(path, **{"every_n_steps": 4, **options.pop("recorder", {})})
    trainer(*callbacks, recorder, **{"max_epochs": 3, **options}).fit(module, loader())
    return open_trajectory(path)


@pytest.mark.parametrize(
    "hook", ["on_train_epoch_start", "on_train_batch_start", "the module's", "accumulated"]
)
def test_a_stage_begins_where_the_trained_parameters_change(hook: str, tmp_path: Path) -> None:
    module = TogglesItself(sgd) if hook == "the module's" else Small(sgd)
    net = copy.deepcopy(module.net)
    accumulated = hook == "accumulated"
    callbacks = (
        []
        if hook == "the module's"
        else [Toggles(hook.replace("accumulated", "on_train_epoch_start"))]
    )
    divisor = 4 if accumulated else 1
    trajectory = record(tmp_path, module, *callbacks, accumulate_grad_batches=divisor)
    log = train(
        net,
        epochs(3),
        sgd(net),
        accumulate=lambda _: divisor,
        before_epoch=lambda epoch, _: set_trained(net, epoch),
    )
    require_agreement(trajectory, log)  # norms of the trained parameters only, among all
    everything = (*BACK, *NORM, *HEAD)
    per_epoch = 2 if accumulated else 6
    assert trajectory.facts.stages == (
        StageFact(0, everything),
        StageFact(per_epoch, (*NORM, *HEAD)),
        StageFact(2 * per_epoch, (*BACK, *HEAD)),
    )
    assert list(trajectory.facts.parameters) == list(everything)
    expected = {0, *range(4, 3 * per_epoch, 4), per_epoch, 2 * per_epoch, 3 * per_epoch}
    assert set(trajectory.checkpoints) == expected
    require_slices(trajectory)


def require_slices(trajectory: Trajectory) -> None:
    """Every piece of ``stages()`` against slices made by hand."""
    whole = trajectory.steps
    parts = trajectory.stages()
    starts = [stage.start for stage in trajectory.facts.stages]
    bounds = [*starts, len(whole)]
    assert len(parts) == len(starts)
    for number, part in enumerate(parts):
        start, stop = bounds[number], bounds[number + 1]
        names = trajectory.facts.stages[number].parameters
        steps = part.steps
        assert len(steps) == part.num_steps == part.last_step == stop - start
        for column in ("epoch", "learning_rate", "loss", "gradient_norm", "accumulation"):
            assert torch.equal(getattr(steps, column), getattr(whole, column)[start:stop])
        assert torch.equal(steps.clipping, whole.clipping[start:stop])
        for name, values in whole.hyperparameters.items():
            assert torch.equal(steps.hyperparameters[name], values[start:stop])
        for row in range(len(steps)):
            own, all_of_it = steps.batches(row), whole.batches(start + row)
            assert [b.tolist() for b in own] == [b.tolist() for b in all_of_it]
        assert steps.batch_offsets[0] == steps.example_offsets[0] == 0
        assert len(steps.examples) == steps.example_offsets[-1]
        assert tuple(part.facts.parameters) == names
        assert part.facts.stages == (StageFact(0, names),)
        assert part.stages() == (part,)
        kept = [s - start for s in sorted(trajectory.checkpoints) if start <= s <= stop]
        assert list(part.checkpoints) == kept and len(part.checkpoints) == len(kept)
        assert kept[0] == 0
        for step in kept:
            own, base = part.checkpoints[step], trajectory.checkpoints[start + step]
            assert own.step == step
            tensors = {**base.parameters, **base.buffers}
            assert tuple(own.parameters) == names
            assert {**own.parameters, **own.buffers}.keys() == tensors.keys()
            for name, value in {**own.buffers, **own.parameters}.items():
                assert torch.equal(value, tensors[name])
            assert not own.parameters.keys() & own.buffers.keys()
            for name in names:
                state = base.optimizer[name]
                assert own.optimizer[name].keys() == state.keys()
        with pytest.raises(KeyError):
            part.checkpoints[stop - start + 1]
        # The parts are runs: segments can be cut, and what they do not train does not move.
        assert part.segments(1)[0].checkpoints == tuple(s for s in kept if s > 0)
        first, last = part.checkpoints[0], part.checkpoints[part.last_step]
        for name in set(trajectory.facts.parameters) - set(names):
            assert torch.equal(first.buffers[name], last.buffers[name])


class Thaws(BaseFinetuning):
    """As users do: the backbone is added to the optimizer when it thaws."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.03)


def trainable(net: nn.Module) -> Any:
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1, 0.9)


@pytest.mark.parametrize("save_optimizer", [True, False])
def test_a_group_added_in_mid_run_had_no_rate_before(save_optimizer: bool, tmp_path: Path) -> None:
    module = Small(trainable)
    net = copy.deepcopy(module.net)
    net[0].requires_grad_(False)
    optimizer = trainable(net)

    def thaw(epoch: int, _: Any) -> None:
        if epoch == 1:
            net[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(net[0].parameters()), "lr": 0.03})

    options = {"save_optimizer": save_optimizer}
    trajectory = record(tmp_path, module, Thaws(), recorder=options)
    log = train(net, epochs(3), optimizer, before_epoch=thaw)
    log.rates = [rates + [0.0] * (2 - len(rates)) for rates in log.rates]
    require_agreement(trajectory, log)
    assert {len(rates) for rates in log.rates} == {2}
    assert trajectory.facts.stages == (
        StageFact(0, (*NORM, *HEAD)),
        StageFact(6, (*BACK, *NORM, *HEAD)),
    )
    assert trajectory.facts.parameters["net.0.weight"].group == 1
    assert trajectory.steps.learning_rate[6:, 1].tolist() == [0.03] * 12
    # A formula that wants one momentum for all groups finds one.
    assert bool((trajectory.steps.hyperparameters["momentum"] == 0.9).all())
    # Checkpoints of both sides hold the same names, wherever they lie in the file.
    for checkpoint in trajectory.checkpoints.values():
        assert tuple(checkpoint.parameters) == (*BACK, *NORM, *HEAD)
        assert (checkpoint.optimizer is not None) == save_optimizer
    if save_optimizer:
        require_slices(trajectory)


def test_a_group_without_a_stage_widens_the_table(tmp_path: Path) -> None:
    class Adds(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
                trainer.optimizers[0].add_param_group({"params": [frozen], "lr": 0.5})

    trajectory = record(tmp_path, Small(sgd), Adds(), recorder={"every_n_steps": 100})
    assert trajectory.steps.learning_rate.tolist() == [[0.1, 0.0]] * 6 + [[0.1, 0.5]] * 12
    assert trajectory.stages() == (trajectory,)


def test_freezing_within_a_step_is_refused(tmp_path: Path) -> None:
    class Within(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.net[0].requires_grad_(batch_idx != 3)
            return super().training_step(batch, batch_idx)

    message = r"in the middle of step 4: expected the 6 .* got 4.*on_train_epoch_start"
    with pytest.raises(UnsupportedTrainingError, match=message):
        record(tmp_path, Within(sgd), recorder={"every_n_steps": 1})
    assert open_trajectory(tmp_path).last_step == 3


def test_a_parameter_that_moves_to_another_group_is_refused(tmp_path: Path) -> None:
    class Moves(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                groups = trainer.optimizers[0].param_groups
                moved = groups[0]["params"].pop()
                trainer.optimizers[0].add_param_group({"params": [moved]})

    with pytest.raises(UnsupportedTrainingError, match=r"net\.3\.bias moved from group 0 .* 1 "):
        record(tmp_path, Small(sgd), Moves())


def test_freezing_before_the_first_step_or_after_the_last_is_no_stage(tmp_path: Path) -> None:
    class Around(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net[0].requires_grad_(False)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 18:
                pl_module.net[0].requires_grad_(True)

    trajectory = record(tmp_path, Small(sgd), Around())
    assert trajectory.facts.stages == (StageFact(0, (*NORM, *HEAD)),)
    assert tuple(trajectory.facts.parameters) == (*NORM, *HEAD)
    for checkpoint in trajectory.checkpoints.values():
        assert tuple(checkpoint.parameters) == (*NORM, *HEAD)
        assert set(BACK) <= checkpoint.buffers.keys()


def test_toggling_back_before_a_step_is_no_stage(tmp_path: Path) -> None:
    class Back(Small):
        """Freezes for a batch that makes no step."""

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net[0].requires_grad_(batch_idx != 2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    trajectory = record(tmp_path, Back(sgd))
    assert trajectory.stages() == (trajectory,)
    assert trajectory.num_steps == 15


@pytest.mark.parametrize("announced", [True, False])
def test_a_run_killed_where_a_stage_begins_is_the_run_before(
    announced: bool, tmp_path: Path
) -> None:
    """The checkpoint, then the facts: whichever was written last, what is there can be read."""
    record(tmp_path, Small(sgd), Toggles("on_train_epoch_start"), max_epochs=2)
    for file in layout.checkpoint_files(tmp_path).items():
        if file[0] > 6:
            file[1].unlink()
    if not announced:
        with h5py.File(tmp_path / layout.FACTS_FILE, "r+") as file:
            facts = json.loads(file["facts"][0])
            facts["stages"] = facts["stages"][:1]
            del file["facts"]
            text = json.dumps(facts).encode()
            file.create_dataset("facts", data=[text], dtype=h5py.string_dtype("utf-8", len(text)))
    trajectory = open_trajectory(tmp_path)
    assert trajectory.num_steps == 6
    assert trajectory.facts.stages == (StageFact(0, (*BACK, *NORM, *HEAD)),)


def test_a_lost_checkpoint_of_a_stage_is_named(tmp_path: Path) -> None:
    record(tmp_path, Small(sgd), Toggles("on_train_epoch_start"))
    layout.checkpoint_file(tmp_path, 6).unlink()
    with pytest.raises(TrajectoryFormatError, match=r"checkpoint at step 6 is missing"):
        open_trajectory(tmp_path).stages()


def test_files_of_version_1_are_refused(tmp_path: Path) -> None:
    fit(tmp_path)
    with h5py.File(tmp_path / layout.FACTS_FILE, "r+") as file:
        file.attrs["version"] = 1
        file.attrs["format"] = "tda-lightning"  # of no fixed length, as they had it
    with pytest.raises(TrajectoryFormatError, match=r"version 1, .* Record the run again"):
        open_trajectory(tmp_path)


def test_estimators_take_a_run_of_several_stages_and_each_of_them(tmp_path: Path) -> None:
    trajectory = record(tmp_path, Small(sgd), Toggles("on_train_epoch_start"))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(description_table(describe(tmp_path)))
    assert "3, from steps [0, 6, 12]" in console.export_text()
    data = Numbered()
    whole = AttributionModule(Small(), trajectory, Source(1))
    scores = whole.attribute(data, data, trainer=quiet())
    assert scores.values.shape == (22, 22)  # one training set: the stages' parts are summed
    assert [stage["steps"] for stage in scores.provenance["stages"]] == [[0, 6], [6, 12], [12, 18]]
    assert torch.allclose(scores.by_segment.sum(0), scores.values, atol=1e-6)
    for part in trajectory.stages():
        for estimator in (TracIn(), Source(1)):
            attribution = AttributionModule(Small(), part, estimator)
            scores = attribution.attribute(data, data, trainer=quiet())
            assert scores.values.isfinite().all()
            assert scores.provenance["trained_parameters"] == sum(
                torch.Size(fact.shape).numel() for fact in part.facts.parameters.values()
            )
