"""The command line, from training to the report, on a tiny run of the digits."""

import os
import re
import shutil
import signal
import subprocess
import sys

import h5py
import pytest
import torch
from omegaconf import OmegaConf

from tda_lightning import Scores, Trajectory
from tda_lightning.cli import main
from tda_lightning.cli.recorded_run import load_parts
from tda_lightning.cli.run_config import build, load_config
from tda_lightning.evaluation import Estimate, Smoothness

TINY = ["experiment=digits", "data.num_train=60", "data.num_query=3", "trainer.max_epochs=2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with runs/digits, attributed by SOURCE."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", *TINY]) == 0
        assert main(["attribute", "trajectory=runs/digits", "estimator=source"]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of the finished run to work on and to spoil; the working directory holds it."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "digits"


def test_training_leaves_a_trajectory_and_its_configuration(run, tmp_path):
    trajectory = Trajectory.load(str(run))
    assert trajectory.num_steps == 4
    config = load_config(run)
    assert config.data.num_train == 60
    assert config.made_by.command.startswith("tda train experiment=digits data.num_train=60")
    assert "torch" in config.made_by.versions
    # Hydra leaves nothing of its own behind.
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["digits"]


def test_an_index_is_built_in_parts_and_searched(run, capsys):
    small = ["index", "runs/digits", "estimator=tracin", "bytes_per_example=64"]
    assert main([*small, "part=2/2,1/2", "--multirun"]) == 0
    assert "belong to other parts" in capsys.readouterr().out  # after the first of them
    assert main([*small, "search=true", "k=2", "rerank=5"]) == 0
    out = capsys.readouterr().out
    assert "Indexed 60 examples in" in out
    assert "Best examples" in out
    assert (run / "index" / "tracin" / "index.h5").exists()
    assert main([*small, "bytes_per_example=32"]) == 1  # another index, which is kept
    assert main([*small, "part=3/2"]) == 1


def test_unlearning_writes_weights_and_compares_them(run, capsys):
    assert main(["unlearn", "runs/digits", "remove=[3,17]"]) == 0
    out = capsys.readouterr().out
    assert "Unlearned 2 training examples: runs/digits/unlearned.pt" in out
    for name in (
        "retrained weights",
        "distance to the retrained",
        "mean loss of what was removed",
        "mean loss of what stays",
        "accuracy of the queries",
        "accuracy of what was removed",
    ):
        assert name in out
    moved = torch.load(run / "unlearned.pt")
    before = Trajectory.load(str(run)).checkpoints[4].parameters
    assert any(not torch.equal(moved[name], value) for name, value in before.items())
    assert main(["unlearn", "runs/digits", "remove=[3,17]"]) == 1
    assert "already holds weights" in capsys.readouterr().err
    assert main(["unlearn", "runs/digits", "remove=three", "overwrite=true"]) == 1
    assert "remove=[3,17]" in capsys.readouterr().err


def test_scores_say_how_they_were_made(run):
    scores = Scores.load(run / "scores" / "source.h5")
    assert scores.values.shape == (3, 60)
    assert scores.self_influence is None
    made = scores.provenance
    assert any(note.startswith("No self-influence: with this est") for note in made["notes"])
    assert made["command"] == "tda attribute trajectory=runs/digits estimator=source"
    assert made["config"]["estimator"]["num_segments"] == 3
    assert {"torch", "lightning", "tda-lightning"} <= set(made["versions"])
    assert len(made["predictions"]) == 3


def test_draws_reach_the_task_of_every_command(run, capsys):
    config = OmegaConf.create({"data": {}, "trust_config": False, "draws": 3})
    assert load_parts(config, load_config(run))[2].draws == 3
    assert main(["attribute", "trajectory=runs/digits", "estimator=tracin", "draws=0"]) == 1
    assert "draws must be at least 1" in capsys.readouterr().err
    for command in ("attribute", "plan", "evaluate"):
        assert main([command, "--cfg", "job"]) == 0
        assert "draws: null" in capsys.readouterr().out


def test_scores_where_half_of_the_data_would_be_gone(run, capsys):
    command = ["attribute", "trajectory=runs/digits", "estimator=tracin", "keep=0.5"]
    assert main([*command, "draws=2"]) == 0
    assert main(command) == 0
    path = run / "scores" / "tracin-keep-0.5.h5"
    assert Scores.load(path).provenance["what_if"]["weights"] == "uniform"
    assert (run / "scores" / "tracin-keep-0.5-draws-2.h5").exists()
    assert main(["report", f"scores={path}"]) == 0
    page = path.with_suffix(".html").read_text(encoding="utf-8")
    assert "What if about half of the training data were gone" in page
    assert "best for groups of the size asked about" in page
    assert main(["plan", "runs/digits", "estimator=tracin", "keep=0.5"]) == 0
    capsys.readouterr()
    assert main(["inspect", "runs/digits"]) == 0
    out = capsys.readouterr().out
    assert "what-if run" in out and "every example at weight 0.5" in out
    assert main([*command, "keep=1.5", "overwrite=true"]) == 1
    assert "keep is the share of the training data" in capsys.readouterr().err


def test_a_report_and_an_inspection(run, capsys):
    assert main(["report", "scores=runs/digits/scores/source.h5"]) == 0
    page = run / "scores" / "source.html"
    assert "<img" in page.read_text(encoding="utf-8")
    assert main(["inspect", "runs/digits"]) == 0
    out = capsys.readouterr().out
    assert "runs/digits/scores/source.html" in out
    assert "SGD" in out


def test_plans_of_an_attribution(run, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(["plan", "trajectory=runs/digits", "estimators.source.num_segments=2"]) == 0
    out = capsys.readouterr().out
    assert "60 training examples for 3 queries" in out
    for name in ("source", "source_recorded", "tracin", "influence", "fastif", "trak", "unrolled"):
        assert name in out
    assert "not possible" not in out
    assert main(["plan", "runs/digits", "estimator=tracin"]) == 0
    out = capsys.readouterr().out
    assert "TracIn: time" in out
    assert "preparation" in out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_exact_unrolling_from_the_plan_to_the_report(run, capsys):
    given = ["runs/digits", "estimator=unrolled", "estimator.last_steps=3"]
    assert main(["plan", *given]) == 0
    assert "backwards" in capsys.readouterr().out
    assert main(["attribute", *given, "relabel={3: 7}"]) == 0
    file = run / "scores" / "unrolled-last_steps-3-relabel-3-7.h5"
    made = Scores.load(file).provenance
    assert made["certificate"]["bit_equal"]
    assert made["edits"] == [{"kind": "Relabel", "index": 3, "label": 7}]
    assert main(["report", f"scores={file}"]) == 0
    page = file.with_suffix(".html").read_text(encoding="utf-8")
    assert "recorded checkpoints that it passes bit for bit" in page
    assert "Only the effect of an example on the last 3 of 4 steps" in page
    assert "relabel of example 3 as 7" in page


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], ["torch", "hydra", "lightning"]),
        (["inspect", "runs/digits"], ["torch", "lightning", "scipy"]),
        (["report", "scores.h5"], ["lightning", "tda_lightning.estimators"]),
        (["export", "scores.h5", "format=csv"], ["lightning", "tda_lightning.estimators"]),
    ],
)
def test_commands_import_only_what_they_need(run, tmp_path, arguments, absent):
    """Lightning takes seconds to import, and torch more than one."""
    if arguments[0] == "export":
        pytest.importorskip("pandas")
    # Scores alone: the report of a recorded run shows its data, and data modules are Lightning's.
    Scores(torch.zeros(2, 3)).save(tmp_path / "scores.h5")
    code = (
        "import sys; from tda_lightning.cli import main; "
        f"status = main({arguments!r}); "
        f"print('loaded', sorted(set({absent!r}) & sys.modules.keys()), status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "loaded [] 0", done.stderr


def test_an_impossible_estimator_is_no_reason_to_hide_the_others(run, capsys):
    given = ["plan", "trajectory=runs/digits", "estimators.source.num_segments=50"]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert "not possible" in out
    assert "source: Segment" in out
    assert "tracin" in out
    given = ["plan", "trajectory=runs/digits", "estimator=source", "estimator.num_segments=50"]
    assert main(given) == 1
    assert "holds no checkpoint" in capsys.readouterr().err


def test_a_check_of_gradients_replay_and_smoothness(run, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(["check", "runs/digits", "directions=3", "fraction=0.1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Engine against plain autograd" in out
    assert "A replay with all weights 1 lands on the recorded end, bit for bit." in out
    assert "Smoothness (10 replays" in out
    for word in ("metasmoothness", "halfway", "near", "95% interval"):
        assert word in out
    assert re.search("(Smooth|Rough|Undecided): ", out)
    assert "What to ask" in out and "keep=0.5" in out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_rough_run_is_a_finding_not_a_failure(run, monkeypatch, capsys):
    unlike = Estimate(torch.zeros(2), 0.0, -0.1, 0.1)
    found = Smoothness(unlike, unlike, unlike, 0.05, 0.001, 0.5, 0.0, 8, 1.0)
    monkeypatch.setattr("tda_lightning.cli.commands.check.smoothness", lambda *_, **__: found)
    assert main(["check", "runs/digits"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "misses the recorded end by 5.0e-01 of the way" in out
    assert "Usual causes: another device" in out
    assert "Rough: half of leaving out" in out


def test_a_check_of_a_run_that_cannot_be_replayed(tmp_path, monkeypatch, capsys):
    """The engine is checked all the same."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TINY, "trainer.precision=bf16-mixed"]) == 0
    assert main(["check", "runs/digits"]) == 1
    out, error = capsys.readouterr()
    assert "Engine against plain autograd" in out
    assert "Smoothness" not in out
    assert "trained with precision=bf16-mixed" in error
    assert "Whether the run is smooth is therefore not known" in error


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("directions=2", "needs at least 3 directions"),
        ("fraction=2", "fraction must be between 0 and 1"),
        ("data.num_query=2", "at least 3 queries, got 2"),
        ("+data.num_train=50", "expected 60 examples, got 50"),
        ("device=nowhere", "nowhere"),
    ],
)
def test_impossible_checks_are_answered_in_words(given, message, run, capsys):
    assert main(["check", "runs/digits", given]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_plan_of_a_recording(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *TINY]) == 0
    assert "Recording of 4 steps" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_moved_run_is_still_reported(run, tmp_path, monkeypatch):
    run.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["report", "scores/source.h5", "output=page.html", "queries=[2]"]) == 0
    assert "<img" in (tmp_path / "elsewhere" / "page.html").read_text(encoding="utf-8")


def test_several_estimators_in_one_sweep(run):
    given = ["trajectory=runs/digits", "estimator=tracin,influence", "data.num_query=2"]
    assert main(["attribute", "--multirun", *given]) == 0
    for name in ("tracin", "influence"):
        assert Scores.load(run / "scores" / f"{name}.h5").values.shape == (2, 60)


def test_settings_of_an_estimator_name_its_file(run):
    assert main(["attribute", "runs/digits", "estimator.num_segments=2"]) == 0
    file = run / "scores" / "source-num_segments-2.h5"
    assert len(Scores.load(file).by_segment) == 2
    assert main(["report", str(file)]) == 0


def test_without_a_task_the_training_step_gives_the_same_scores(run):
    given = ["runs/digits", "estimator=tracin"]
    assert main(["attribute", *given]) == 0
    assert main(["attribute", *given, "task=none", "scores=none.h5"]) == 0
    expected = Scores.load(run / "scores" / "tracin.h5").values
    torch.testing.assert_close(Scores.load("none.h5").values, expected)


def test_runs_of_a_sweep_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--multirun", *TINY, "seed=0,1"]) == 0
    folders = sorted((tmp_path / "runs" / "digits").iterdir())
    assert [folder.name.split("-")[-2:] for folder in folders] == [["seed", "0"], ["seed", "1"]]
    first, second = (load_config(folder) for folder in folders)
    assert (first.seed, second.seed) == (0, 1)


def test_help(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    commands = ("train", "plan", "attribute", "check", "evaluate", "report", "export", "inspect")
    assert all(f"tda {command}" in out for command in commands)
    assert main([]) == 2


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("evaporate x=1", 2, "there is no command 'evaporate'. Commands: train, plan"),
        ("train experiment=nonsense", 1, "Could not find 'experiment/nonsense'"),
        ("train experiment=digits data.flip_fraction=2", 1, "flip_fraction must be in [0, 1)"),
        ("train experiment=concrete data.root=nowhere", 1, "Missing data files: nowhere/uci"),
        ("attribute", 1, "Expected trajectory, got none. For example: tda attribute"),
        ("attribute trajectory=nowhere", 1, "No trajectory in nowhere"),
        ("check", 1, "Expected trajectory, got none. For example: tda check trajectory=FOLDER"),
        ("report", 1, "Expected scores, got none. For example: tda report scores=FILE"),
        ("export", 1, "Expected scores, got none. For example: tda export scores=FILE"),
        ("report nowhere.h5", 1, "There is no scores file at nowhere.h5"),
        ("inspect (no)[where]", 1, "No trajectory in (no)[where]"),
    ],
)
def test_wrong_calls_are_answered_in_words(command, status, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == status
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_an_earlier_checkpoint_is_asked_about(run, capsys):
    command = ["attribute", "runs/digits", "estimator=tracin", "at_step=2"]
    assert main(command) == 0
    made = Scores.load(run / "scores" / "tracin-at_step-2.h5")
    assert made.provenance["steps"] == 2 and made.provenance["config"]["at_step"] == 2
    assert main(["plan", "runs/digits", "estimator=tracin", "at_step=2"]) == 0
    capsys.readouterr()
    for wrong, said in (
        ("at_step=9", "Recorded checkpoints are at steps 1, 2, 3, 4"),
        ("ckpt=best", "had none with monitor"),
        ("ckpt=none.ckpt", "no checkpoint at none.ckpt"),
    ):
        assert main(["attribute", "runs/digits", "estimator=tracin", wrong]) == 1
        assert said in capsys.readouterr().err


def test_scores_are_exported(run, capsys):
    pandas = pytest.importorskip("pandas")
    file = "runs/digits/scores/source.h5"
    assert main(["export", file, "k=2", "format=csv"]) == 0
    assert "source.csv" in capsys.readouterr().out
    table = pandas.read_csv(run / "scores" / "source.csv")
    best = table[table["rank"] == 1].train.tolist()
    assert best == Scores.load(file).values.argmax(1).tolist() and len(table) == 12
    assert main(["export", file, "k=2", "format=csv"]) == 1
    assert "replace it with overwrite=true" in capsys.readouterr().err
    assert main(["export", file, "table=training", "output=own.csv"]) == 0
    assert len(pandas.read_csv("own.csv")) == 60
    for wrong, said in (
        ("format=xlsx", "one of parquet, csv, nc; got 'xlsx'"),
        ("k=0", "k must be at least 1"),
        ("table=all", "table must be one of pairs, training"),
        ("output=new.nc k=3", "netCDF holds all tensors"),
    ):
        assert main(["export", file, *wrong.split()]) == 1
        assert said in capsys.readouterr().err


def test_an_existing_trajectory_is_kept(run, capsys):
    before = (run / "trajectory.h5").read_bytes(), (run / "config.yaml").read_bytes()
    assert main(["train", *TINY, "seed=5"]) == 1
    error = capsys.readouterr().err
    assert "already" in error
    assert "overwrite" in error
    assert ((run / "trajectory.h5").read_bytes(), (run / "config.yaml").read_bytes()) == before
    assert main(["train", *TINY, "seed=5", "overwrite=true"]) == 0
    assert load_config(run).seed == 5


def test_existing_scores_are_kept(run, capsys):
    before = (run / "scores" / "source.h5").read_bytes()
    assert main(["attribute", "runs/digits"]) == 1
    assert "which are kept. Choose another file with scores=FILE" in capsys.readouterr().err
    assert (run / "scores" / "source.h5").read_bytes() == before


def test_a_solver_for_an_estimator_without_inverse_is_refused(run, capsys):
    assert main(["attribute", "runs/digits", "scores=new.h5", "solver=cg"]) == 1
    error = capsys.readouterr().err
    assert "solver=cg is for estimators that invert curvature, such as estimator=influence" in error
    assert "source has no use for it" in error
    assert not (run.parent.parent / "new.h5").exists()


def test_other_training_data_are_refused(run, capsys):
    assert main(["attribute", "runs/digits", "scores=new.h5", "+data.num_train=50"]) == 1
    assert "50" in capsys.readouterr().err
    assert not (run.parent.parent / "new.h5").exists()


def test_another_model_is_refused(run, capsys):
    assert main(["attribute", "runs/digits", "scores=new.h5", "+model.network.widths=[4]"]) == 1
    assert "The module's parameters are not the recorded ones" in capsys.readouterr().err
    assert not (run.parent.parent / "new.h5").exists()


def test_damaged_files_are_named(run, capsys):
    content = (run / "trajectory.h5").read_bytes()
    (run / "trajectory.h5").write_bytes(content[: len(content) // 2])
    assert main(["attribute", "runs/digits", "scores=new.h5"]) == 1
    assert "trajectory.h5" in capsys.readouterr().err
    (run / "trajectory.h5").write_bytes(content)
    (run / "config.yaml").write_text("data: [")
    assert main(["attribute", "runs/digits", "scores=new.h5"]) == 1
    assert "config.yaml is damaged" in capsys.readouterr().err
    (run / "config.yaml").unlink()
    assert main(["attribute", "runs/digits", "scores=new.h5"]) == 1
    assert "use tda_lightning.AttributionModule" in capsys.readouterr().err
    with h5py.File("foreign.h5", "w") as file:
        file["x"] = 1
    assert main(["report", "foreign.h5"]) == 1
    assert "is not a scores file" in capsys.readouterr().err


def test_inspecting_a_damaged_run_fails(run, capsys):
    (run / "checkpoints" / "00000002.h5").write_bytes(b"hello")
    assert main(["inspect", "runs/digits"]) == 1
    out, error = capsys.readouterr()
    assert "SGD" in out and "whole" in out
    assert "runs/digits is not whole: 1 problem, listed above" in error


def test_a_report_of_scores_with_an_odd_provenance(run):
    scores = Scores.load(run / "scores" / "source.h5")
    scores.provenance.update(config=["data"], trajectory="a" * 50, query_indices=["x", None, -1])
    scores.save("odd.h5")
    assert main(["report", "odd.h5"]) == 0


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "tda_lightning.cli.main",
        "tda_lightning.examples.data.images.gzip.open",
        "torch.nn.modules.module.torch.load",
        "torch.nn.utils.stateless.torch.hub.load",
        "torch.load",
        "lightning.pytorch.Trainer",
    ],
)
def test_a_recorded_configuration_builds_only_what_is_known(target, run, capsys):
    config = load_config(run)
    config.model.network = {"_target_": target}
    OmegaConf.save(config, run / "config.yaml")
    assert main(["attribute", "runs/digits", "scores=new.h5"]) == 1
    error = capsys.readouterr().err
    assert f"builds {target}, which is not part of" in error
    assert "trust_config=true" in error


def test_a_trusted_configuration_may_build_anything():
    node = OmegaConf.create({"_target_": "fractions.Fraction", "numerator": 3})
    with pytest.raises(ValueError, match="which is not part of this library's"):
        build(node, trust=False)
    assert build(node, trust=True) == 3


@pytest.mark.parametrize("command", ["train", "attribute"])
def test_sigterm_ends_a_command(command, run, monkeypatch, capsys):
    """With status 143, and without a file of scores."""

    def terminated(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    scores = {path.name for path in (run / "scores").iterdir()}
    if command == "train":
        monkeypatch.setattr(
            "tda_lightning.examples.models.modules.Classifier.on_train_batch_start",
            terminated,
            raising=False,
        )
        status = main(["train", *TINY, "output=runs/other"])
        said = "tda train: ended by SIGTERM"
        assert Trajectory.load("runs/other").num_steps == 1
    else:
        monkeypatch.setattr("tda_lightning.estimators.TracIn.score", terminated)
        status = main(["attribute", "trajectory=runs/digits", "estimator=tracin"])
        said = "Interrupted"
    assert status == 128 + signal.SIGTERM
    assert said in capsys.readouterr().err
    assert {path.name for path in (run / "scores").iterdir()} == scores


WRONG = {
    "report scores=runs/digits/scores/source.h5 queries=5": "queries=[5] for row 5 or queries=[0,",
    "report scores=runs/digits/scores/source.h5 queries=first": "queries must be a list",
    "report scores=runs/digits/scores/source.h5 k=many": "k must be a whole number, got 'many'",
    "attribute runs/digits batch_size=large": "batch_size must be a whole number, got 'large'",
    "attribute runs/digits batch_size=0": "batch_size must be at least 1, got 0",
    "attribute runs/digits self_influence=7": "self_influence must be true or false or null",
    "attribute runs/digits relabel=3": "such as relabel={3: 7} for label 7 of example 3, got 3",
    "attribute runs/digits estimator.num_segments=two": "num_segments must be a whole number, got",
    "attribute runs/digits estimator.segment_steps=3": "segment_steps must be a list",
    "plan runs/digits estimators=tracin": "estimators must be settings by name, got 'tracin'",
    "check runs/digits directions=2.5": "directions must be a whole number, got 2.5",
    "evaluate runs/digits num_subsets=few": "num_subsets must be a whole number or null",
    "evaluate runs/digits baselines=random": "such as baselines=[random], got 'random'",
    "evaluate runs/digits alpha=half": "alpha must be a number or null (None), got 'half'",
    "train experiment=digits threads=all": "threads must be a whole number or null",
}


@pytest.mark.parametrize("command", WRONG)
def test_a_setting_of_another_type_is_refused_in_words(command, run, capsys):
    assert main(command.split()) == 1
    assert WRONG[command] in capsys.readouterr().err


def test_a_task_of_none_is_planned_and_evaluated(run, capsys):
    """The module's own training_step, whose features and losses come with a graph."""
    assert main(["plan", "runs/digits", "task=none"]) == 0
    assert "not possible" not in capsys.readouterr().out
    assert main(["attribute", "runs/digits", "task=none", "estimator=tracin"]) == 0
    scores = "scores=runs/digits/scores/tracin.h5"
    assert main(["evaluate", "runs/digits", "task=none", scores, "num_subsets=3"]) == 0
    assert "last_layer" in capsys.readouterr().out
