"""A resumed run's trajectory is that of the uninterrupted run, dataset by dataset."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from tda_lightning.recording import TrajectoryRecorder
from tda_lightning.records.errors import ResumeError, TrajectoryExistsError, TrajectoryMismatchError
from tda_lightning.store import layout, open_trajectory
from tests.resumable import Resumable, datasets, differences, resumable_loader, same, saves, train
from tests.runs import Optimizers, adamw, loader, scheduled, sgd, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run in ``run`` with a Lightning checkpoint of every step in ``kept``."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder / "run", kept=folder / "kept", every=1, recorder={"every_n_steps": 5})
    return folder


def require_equal(one: Path, other: Path) -> None:
    count, differing = differences(one, other)
    assert count > 100
    assert not differing


def test_the_comparison_notices_a_flipped_bit(whole: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(whole / "run", tmp_path / "copy"))
    require_equal(whole / "run", copy)
    with h5py.File(layout.checkpoint_file(copy, 5), "r+") as file:
        file["parameters/net.0.weight"][0, 0] += 1e-6
    assert differences(whole / "run", copy)[1] == [
        "checkpoints/00000005.h5 parameters/net.0.weight"
    ]
    layout.checkpoint_file(copy, 5).unlink()
    assert len(differences(whole / "run", copy)[1]) > 20


@pytest.mark.parametrize("step", [1, 4, 5, 6, 9, 12])
def test_steps_beyond_the_resumed_one_are_cut_and_redone(
    step: int, whole: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole / "run", tmp_path / "run"))
    (run / "checkpoints" / "00000099.h5.part").write_text("unfinished")
    (run / "notes.txt").write_text("mine")
    open_trajectory(run).curvature["0af3"] = {"layer": torch.ones(2)}
    recorder = {"every_n_steps": 5, "overwrite": True}
    path = train(run, resume=whole / "kept" / f"{step}.ckpt", recorder=recorder).callbacks[0].path
    assert path == run
    require_equal(whole / "run", run)
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert names - {"notes.txt"} == {
        str(p.relative_to(whole / "run")) for p in (whole / "run").rglob("*") if p.is_file()
    }


CASES: dict[str, dict[str, Any]] = {
    "planned schedule": {"recorder": {"num_checkpoints": 4}},
    "thinned optimizer state": {"recorder": {"every_n_steps": 2, "save_optimizer": 3}},
    "epochs": {"recorder": {"every_n_epochs": 1}, "max_epochs": 3},
    "Adam": {"optimizers": adamw, "recorder": {"every_n_steps": 4}},
    "two groups and a scheduler": {"optimizers": scheduled, "recorder": {"every_n_steps": 4}},
    "accumulation": {"accumulate_grad_batches": 2, "recorder": {"every_n_steps": 4}},
}


@pytest.mark.parametrize("case", CASES)
def test_every_way_of_recording_resumes(case: str, tmp_path: Path) -> None:
    options = CASES[case]
    train(tmp_path / "whole", kept=tmp_path / "kept", every=1, **options)
    for step in (2, 4):
        run = tmp_path / str(step)
        shutil.copytree(tmp_path / "whole", run)
        train(run, resume=tmp_path / "kept" / f"{step}.ckpt", **options)
        require_equal(tmp_path / "whole", run)


def test_a_frozen_layer_is_still_stored_once(tmp_path: Path) -> None:
    def module() -> Resumable:
        net = Resumable()
        torch.manual_seed(1)
        net.frozen = torch.nn.Linear(30, 30).requires_grad_(False)
        return net

    train(tmp_path / "whole", kept=tmp_path / "kept", module=module())
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    train(tmp_path / "run", resume=tmp_path / "kept" / "4.ckpt", module=module())
    require_equal(tmp_path / "whole", tmp_path / "run")


class Stops(Callback):
    """An interruption at step ``step`` (rows done), in hook ``hook``."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self._stop)

    def _stop(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError("as planned")


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
@pytest.mark.parametrize("before", [True, False])
def test_a_checkpoint_saved_on_exception_resumes(
    hook: str, before: bool, whole: Path, tmp_path: Path
) -> None:
    keeps = OnExceptionCheckpoint(tmp_path)
    place = "callbacks" if before else "last"
    options: dict[str, Any] = {"recorder": {"every_n_steps": 5}, "enable_checkpointing": True}
    first: list[list[int]] = []
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run", seen=first, **{place: (Stops(hook, 7), keeps)}, **options)
    assert open_trajectory(tmp_path / "run").last_step in (5, 7)
    resumed: list[list[int]] = []
    ckpt = shutil.copy(keeps.ckpt_path, tmp_path / "copy.ckpt")
    train(tmp_path / "run", resume=ckpt, seen=resumed, **options)
    trajectory, expected = open_trajectory(tmp_path / "run"), open_trajectory(whole / "run")
    rows = range(len(trajectory.steps))
    recorded = [batch.tolist() for row in rows for batch in trajectory.steps.batches(row)]
    # A batch that had been drawn and not trained on is lost to Lightning; the record is true.
    assert recorded == first[:7] + resumed
    assert torch.equal(trajectory.steps.loss[:7], expected.steps.loss[:7])
    if hook == "on_train_batch_end":
        require_equal(whole / "run", tmp_path / "run")


class SavesEarly(Callback):
    """Saves a Lightning checkpoint before the recorder sees the end of the step or epoch."""

    def __init__(self, path: Path, hook: str, step: int) -> None:
        self.path, self.step = path, step
        setattr(self, hook, self._save)

    def _save(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("hook", "step", "recorder"),
    [
        ("on_train_batch_end", 5, {"every_n_steps": 5}),
        ("on_train_batch_end", 7, {"every_n_steps": 5}),
        ("on_train_epoch_end", 6, {"every_n_epochs": 1}),
        ("on_validation_end", 6, {"every_n_epochs": 1}),
    ],
)
def test_a_callback_before_the_recorder_may_save(
    hook: str, step: int, recorder: dict[str, int], tmp_path: Path
) -> None:
    ckpt = tmp_path / "early.ckpt"
    options: dict[str, Any] = {"recorder": recorder, "enable_checkpointing": True}
    if hook == "on_validation_end":
        options["validation"] = loader()
    train(tmp_path / "run", callbacks=(SavesEarly(ckpt, hook, step),), **options)
    expected = datasets(tmp_path / "run")
    train(tmp_path / "run", resume=ckpt, **options)
    found = datasets(tmp_path / "run")
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not same(found[name], expected[name])]


def test_a_resume_in_mid_accumulation_records_what_the_step_was_made_of(tmp_path: Path) -> None:
    class Saves(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_progress.total.ready == 3:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    options: dict[str, Any] = {"accumulate_grad_batches": 2, "enable_checkpointing": True}
    train(tmp_path / "run", last=(Saves(),), **options)
    resumed = Resumable()
    with pytest.warns(UserWarning, match="after 1 accumulated batches"):
        trainer(TrajectoryRecorder(tmp_path / "run"), **options).fit(
            resumed, resumable_loader(), ckpt_path=tmp_path / "mid.ckpt"
        )
    steps = open_trajectory(tmp_path / "run").steps
    recorded = [b.tolist() for row in range(1, len(steps)) for b in steps.batches(row)]
    assert recorded == resumed.seen
    assert len(steps.batches(1)) == 1


def test_more_epochs_go_on_with_the_trajectory(tmp_path: Path) -> None:
    options: dict[str, Any] = {"recorder": {"every_n_steps": 5}}
    train(tmp_path / "whole", max_epochs=3, **options)
    made = train(tmp_path / "run", max_epochs=2, enable_checkpointing=True, **options)
    made.save_checkpoint(tmp_path / "end.ckpt")
    assert list(open_trajectory(tmp_path / "run").checkpoints) == [0, 5, 10, 12]
    train(tmp_path / "run", max_epochs=3, resume=tmp_path / "end.ckpt", **options)
    _, differing = differences(tmp_path / "whole", tmp_path / "run")
    assert differing == ["trajectory.h5 facts"]
    settings = open_trajectory(tmp_path / "run").facts.settings
    assert settings["changes"] == [{"step": 12, "name": "max_epochs", "before": 2, "after": 3}]
    # The plan of a longer run holds from the resumed step on; what was kept stays.
    train(tmp_path / "p", recorder={"num_checkpoints": 3}, kept=tmp_path / "k", every=8)
    train(
        tmp_path / "p", recorder={"num_checkpoints": 3}, resume=tmp_path / "k/8.ckpt", max_epochs=4
    )
    assert list(open_trajectory(tmp_path / "p").checkpoints) == [0, 4, 8, 16, 24]


def test_a_finished_run_is_left_as_it_is(whole: Path, tmp_path: Path) -> None:
    made = train(tmp_path / "run", recorder={"every_n_steps": 5}, enable_checkpointing=True)
    made.save_checkpoint(tmp_path / "end.ckpt")
    # Killed after the last Lightning checkpoint: the last checkpoint of ours is missing.
    layout.checkpoint_file(tmp_path / "run", 12).unlink()
    train(tmp_path / "run", recorder={"every_n_steps": 5}, resume=tmp_path / "end.ckpt")
    require_equal(whole / "run", tmp_path / "run")


def test_a_second_fit_goes_on_with_the_trajectory(tmp_path: Path) -> None:
    module = Resumable()
    made = trainer(TrajectoryRecorder(tmp_path / "run", every_n_steps=5))
    made.fit(module, loader(shuffle=True))
    made.fit_loop.max_epochs = 3
    made.fit(module, loader(shuffle=True))
    trajectory = open_trajectory(tmp_path / "run")
    assert list(trajectory.checkpoints) == [0, 5, 10, 12, 15, 18]
    rows = range(len(trajectory.steps))
    assert [b.tolist() for row in rows for b in trajectory.steps.batches(row)] == module.seen
    assert trajectory.steps.loss.tolist() == module.losses
    assert trajectory.facts.settings["fits"] == [12]
    # Another module is another run.
    made.fit_loop.max_epochs = 4
    with pytest.raises(ResumeError, match="step 18 with other weights"):
        made.fit(Resumable(), loader())
    assert open_trajectory(tmp_path / "run").num_steps == 18


# What cannot be continued: an error that says what to do, and nothing is touched.


def other_data() -> Any:
    made = resumable_loader()
    made.dataset.x += 1  # type: ignore[attr-defined]
    return made


def one_group(module: Any) -> Any:
    return torch.optim.SGD([*module.net[0].parameters(), *module.net[1].parameters()], lr=0.1)


@pytest.mark.parametrize(
    ("prepare", "options", "error", "message"),
    [
        (shutil.rmtree, {}, ResumeError, "trajectory is missing"),
        ("another", {}, ResumeError, "that of another run"),
        ("truncated", {}, ResumeError, r"expected the steps 1 to 5.*got 1 to 0"),
        ("unkept", {}, ResumeError, r"checkpoints at steps \[0, 5\].*\[5\] are missing"),
        (None, {"loader": other_data}, TrajectoryMismatchError, "not the recorded one"),
        (None, {"optimizers": adamw}, TrajectoryMismatchError, "expected SGD, got AdamW"),
        (None, {"elsewhere": True}, ResumeError, r"step 7.*missing: No trajectory in .*new"),
        (None, {"unrecorded": True}, ResumeError, "starts at step 7.*Resume.*ckpt_path"),
    ],
)
def test_what_cannot_be_continued_is_refused(
    prepare: Any, options: dict[str, Any], error: Any, message: str, whole: Path, tmp_path: Path
) -> None:
    run, ckpt = Path(shutil.copytree(whole / "run", tmp_path / "run")), whole / "kept" / "7.ckpt"
    if prepare == "another":
        shutil.rmtree(run)
        train(run)
    elif prepare == "truncated":
        for _, _, path in layout.steps_files(run):
            path.unlink()
    elif prepare == "unkept":
        layout.checkpoint_file(run, 5).unlink()
    elif prepare is not None:
        prepare(run)
    optimizers: Optimizers = options.get("optimizers", sgd)
    if options.get("unrecorded"):
        train(None, kept=tmp_path / "kept", every=7)
        ckpt = tmp_path / "kept" / "7.ckpt"
    target = tmp_path / "new" if options.get("elsewhere") else run
    if "optimizers" in options:  # Lightning would fail on the state of another optimizer
        content = torch.load(ckpt)
        content["optimizer_states"] = [adamw(Resumable()).state_dict()]
        ckpt = tmp_path / "other.ckpt"
        torch.save(content, ckpt)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.h5")}
    module = Resumable(optimizers)
    made = options.get("loader", resumable_loader)()
    recorder = {"every_n_steps": 5, "overwrite": True}
    with pytest.raises(error, match=message):
        train(target, resume=ckpt, module=module, loader=made, recorder=recorder)
    assert module.seen == []
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.h5")} == before
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.rglob("*.lock"))


def test_a_moved_folder_is_found(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole / "run", tmp_path / "moved"))
    train(run, resume=whole / "kept" / "7.ckpt", recorder={"every_n_steps": 5})
    require_equal(whole / "run", run)


def test_starting_over_is_not_resuming(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole / "run", tmp_path / "run"))
    with pytest.raises(TrajectoryExistsError):
        train(run, recorder={"every_n_steps": 5})
    train(run, recorder={"every_n_steps": 5, "overwrite": True})
    require_equal(whole / "run", run)


def test_two_recorders_resume_each_its_own(tmp_path: Path) -> None:
    def recorders(name: str) -> tuple[TrajectoryRecorder, ...]:
        return (TrajectoryRecorder(tmp_path / name, every_n_steps=3),)

    recorder = {"every_n_steps": 5}
    kept = tmp_path / "kept"
    train(tmp_path / "a", recorder=recorder, last=recorders("b"), kept=kept)
    for name in "ab":
        shutil.copytree(tmp_path / name, tmp_path / f"whole {name}")
    train(tmp_path / "a", recorder=recorder, last=recorders("b"), resume=kept / "4.ckpt")
    for name in "ab":
        require_equal(tmp_path / f"whole {name}", tmp_path / name)


def test_the_state_is_plain(whole: Path) -> None:
    content = torch.load(whole / "kept" / "7.ckpt", weights_only=True)
    (state,) = (s for k, s in content["callbacks"].items() if k.startswith("TrajectoryRecorder"))
    assert state["global_step"] == 7
    assert state["rows_on_disk"] == 5
    assert len(state["rows"]["loss"]) == 2
    assert state["checkpoints"] == [0, 5]


def test_parts_travel_with_the_state(tmp_path: Path) -> None:
    class Counts(Callback):
        def __init__(self) -> None:
            self.count = 0

        def on_train_batch_start(self, *_: Any) -> None:
            self.count += 1

        def state_dict(self) -> dict[str, Any]:
            return {}

    class Part:
        def __init__(self, counts: Counts) -> None:
            self.counts = counts

        def state_dict(self) -> dict[str, Any]:
            return {"count": torch.tensor(self.counts.count)}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.counts.count = int(state_dict["count"])

    totals = []
    for resume in (None, tmp_path / "kept" / "4.ckpt"):
        counts = Counts()
        recorder = TrajectoryRecorder(tmp_path / "run")
        recorder.parts["counts"] = Part(counts)
        made = trainer(counts, recorder, saves(tmp_path / "kept", 4), enable_checkpointing=True)
        made.fit(Resumable(), resumable_loader(), ckpt_path=resume)
        totals.append(counts.count)
    assert totals == [12, 12]
