"""``tda ensemble``, and the commands that take its folder like a run."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from tda_lightning import Ensemble, Scores
from tda_lightning.attribution.provenance import of_ensemble
from tda_lightning.cli import ensemble_members, main
from tda_lightning.cli.run_config import load_config
from tda_lightning.ensembles.folder import note
from tda_lightning.records.ensemble import DIVERGED, FINISHED, EnsembleFacts, MemberFact
from tests.attributing import relative

TINY = ["experiment=digits", "data.num_train=60", "data.num_query=4", "trainer.max_epochs=2"]
ROOT = Path("runs/digits/ensemble/seeds")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ensemble")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", *TINY]) == 0
        # As a sweep over machines does; the second part has nothing left to do.
        for part in ("2/2", "1/2"):
            assert main(["ensemble", "runs/digits", "members=3", f"part={part}"]) == 0
        assert main(["attribute", str(ROOT), "estimator=tracin"]) == 0
    return folder


@pytest.fixture
def there(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def test_members_follow_the_recorded_configuration(there: Path) -> None:
    ensemble = Ensemble.load(ROOT)
    assert ensemble.facts is not None and len(ensemble) == 3
    recorded = load_config("runs/digits")
    for member in ensemble.facts.members[1:]:
        config = load_config(ROOT / member.folder)
        assert config.seed == config.data.seed == member.seed != recorded.seed
        assert config.output == config.recorder.path == str(ROOT / member.folder)
        assert config.made_by.command.startswith("tda ensemble ")
        for name in ("model", "trainer", "task"):
            assert config[name] == recorded[name]
    one, other, _ = (run.steps.examples.tolist() for run in ensemble)
    assert one != other and sorted(one) == sorted(other)


def test_scores_are_the_mean_over_the_folder(there: Path) -> None:
    scores = Scores.load(ROOT / "scores" / "tracin.h5")
    assert scores.members is not None and len(scores.members) == 3
    assert relative(scores.values, scores.members.double().mean(0)) < 1e-6
    assert scores.provenance["ensemble"] == "seeds"
    assert len(scores.provenance["predictions"]) == 4


def test_members_that_are_missing_are_named() -> None:
    members = [MemberFact(n, f"member-{n}", n, FINISHED) for n in (1, 2)]
    members += [MemberFact(3, "member-3", 3), MemberFact(4, "member-4", 4, DIVERGED, "nan")]
    facts = EnsembleFacts("seeds", "../..", "a", tuple(members))
    assert of_ensemble(facts, {"notes": ["other"]})["notes"] == [
        "These are 2 of 4 members: member 3 was not finished, member 4 diverged.",
        "other",
    ]


def test_report_evaluate_and_inspect_take_the_folder(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(ROOT / "scores" / "tracin.h5")]) == 0
    assert (ROOT / "scores" / "tracin.html").is_file()
    assert main(["evaluate", str(ROOT), "num_subsets=3", "baselines=[]"]) == 0
    # The truth is kept with the run that it is about.
    assert Path("runs/digits/ground_truth/single_run-0.5-0.h5").is_file()
    table = json.loads((ROOT / "single_run-0.5-0.json").read_text())
    assert [row["name"] for row in table["rows"]] == ["tracin"]
    for folder in ("runs/digits", str(ROOT)):
        capsys.readouterr()
        assert main(["inspect", folder]) == 0
        assert "member-3" in capsys.readouterr().out


def test_an_interrupted_command_says_what_is_kept(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("ensemble"))
    monkeypatch.chdir(tmp_path)

    def interrupted(root: Path, member: MemberFact, make: object) -> None:
        if member.number == 3:
            raise KeyboardInterrupt
        note(root, member.number, DIVERGED, "as planned")

    with monkeypatch.context() as patch:
        patch.setattr(ensemble_members, "train_member", interrupted)
        assert main(["ensemble", "runs/digits", "members=4"]) == 130
    said = " ".join(capsys.readouterr().err.split())
    assert "Interrupted after 1 of 3 members" in said and "again to go on" in said
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9, 9, 9))
    assert main(["ensemble", "runs/digits", "members=4"]) == 1
    assert "2 members of up to" in capsys.readouterr().err


@pytest.mark.slow
def test_plan_and_check(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(ROOT), "estimator=tracin"]) == 0
    assert main(["check", str(ROOT)]) == 1
    assert "got the folder of an ensemble" in " ".join(capsys.readouterr().err.split())


def test_forks(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ensemble", "runs/digits", "kind=forks", "members=3", "at=[2]"]) == 0
    root = ROOT.parent / "forks"
    run, *forks = Ensemble.load(root)
    for fork in forks:
        assert fork.facts.settings["fork"]["step"] == 2 and fork.last_step == run.last_step
        assert fork.steps.loss[:2].equal(run.steps.loss[:2])
    assert load_config(root / "member-2").seed == load_config("runs/digits").seed
    assert main(["ensemble", "runs/digits", "at=[2]"]) == 1
    assert "at is for kind=forks, got kind=seeds" in capsys.readouterr().err


def test_dropout(there: Path) -> None:
    root = ROOT.parent / "dropout"
    assert main(["ensemble", "runs/digits", "kind=dropout", "members=2", "rate=0.2"]) == 0
    assert main(["attribute", str(root), "estimator=tracin"]) == 0
    scores = Scores.load(root / "scores" / "tracin.h5")
    assert scores.members is not None and relative(*scores.members) > 0.05


@pytest.mark.slow
def test_lora(there: Path) -> None:
    pytest.importorskip("peft")
    root = ROOT.parent / "lora"
    given = ["kind=lora", "members=2", "rank=1", "epochs=1"]
    assert main(["ensemble", "runs/digits", *given]) == 0
    assert main(["attribute", str(root), "estimator=tracin"]) == 0
    scores = Scores.load(root / "scores" / "tracin.h5")
    assert scores.members is not None and relative(*scores.members) > 0.05
    recorded = Scores.load(ROOT / "scores" / "tracin.h5").provenance
    assert scores.provenance["trained_parameters"] < recorded["trained_parameters"]
    assert scores.provenance["predictions"] == recorded["predictions"]


def test_bad_settings_are_refused(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for setting, said in (
        ("kind=chance", "kind must be one of seeds, forks, dropout, lora, got 'chance'"),
        ("members=many", "members must be"),
        ("part=3/2", "part must be K/N"),
    ):
        assert main(["ensemble", "runs/digits", setting]) == 1
        assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_members_in_several_processes_are_the_same(there: Path, made: Path) -> None:
    command = ["train", *TINY, "name=other"]
    assert main(command) == 0
    assert main(["ensemble", "runs/other", "members=3", "processes=2"]) == 0
    one, other = (Ensemble.load(f"runs/{name}/ensemble/seeds") for name in ("digits", "other"))
    for a, b in zip(one, other, strict=True):
        assert a.steps.loss.equal(b.steps.loss)
