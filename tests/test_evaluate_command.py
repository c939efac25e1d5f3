"""``tda evaluate``: scores before retrained models, on a tiny run of the digits."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from tda_lightning import Scores
from tda_lightning.cli import main, retraining
from tda_lightning.cli.commands import parts_to_retrain
from tda_lightning.cli.recorded import load_config
from tda_lightning.errors import TrajectoryFormatError
from tda_lightning.evaluation import (
    difference,
    draw_subsets,
    interval_over_subsets,
    leave_one_out,
    linear_datamodeling_score,
    retrain_afresh,
)
from tda_lightning.evaluation.baselines import random_scores
from tda_lightning.store.ground_truth import read_ground_truth
from tda_lightning.store.scores_file import replace_provenance
from tests.test_config import make

TINY = ["experiment=digits", "data.num_train=60", "data.num_query=4", "trainer.max_epochs=2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", *TINY]) == 0
        assert main(["attribute", "trajectory=runs/digits", "estimator=tracin"]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of the finished run to work on and to spoil; the working directory holds it."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "digits"


def table(run, name="single_run-0.5-0"):
    return json.loads((run / "ground_truth" / f"{name}.json").read_text())


def test_the_table_is_the_score_of_the_kept_measurements(run, capsys):
    scores = "scores=runs/digits/scores/tracin.h5"
    assert main(["evaluate", "trajectory=runs/digits", scores, "num_subsets=4"]) == 0
    out = capsys.readouterr().out
    assert "Protocol single_run: the recorded run replayed" in out
    truth = read_ground_truth(run / "ground_truth" / "single_run-0.5-0.h5")
    assert torch.equal(truth.subsets, draw_subsets(60, 0.5, 4))
    assert truth.made_by["landing_error"] == 0
    found = table(run)
    expected = linear_datamodeling_score(
        Scores.load(run / "scores" / "tracin.h5"), truth.subsets, truth.outcomes
    )
    row = found["rows"][0]
    assert row["name"] == "tracin"
    assert row["lds"] == pytest.approx(expected.value)
    assert row["over_queries"] == pytest.approx([expected.low, expected.high])
    assert row["per_query"] == pytest.approx(expected.per_query.tolist(), abs=1e-6)
    assert found["protocol"] == "single_run"
    sizes = ("num_subsets", "num_seeds", "num_queries", "num_train", "alpha")
    assert [found[name] for name in sizes] == [4, 1, 4, 60, 0.5]
    # A tenth of these labels was flipped.
    wrong = {row["name"]: row.get("wrong_labels") for row in found["rows"]}
    assert wrong["last_layer"] is None  # has no self-influence
    assert 0 <= wrong["tracin"]["auc"] <= 1 and 0 <= wrong["self_loss"]["auc"] <= 1
    assert "AUC" in out
    names = [row["name"] for row in found["rows"]]
    assert names == ["tracin", "random", "self_loss", "last_layer", "gradient_dot"]
    assert all(name in out for name in names)


def test_the_table_tells_how_far_each_row_is_from_the_best_query_by_query(run):
    assert main(["evaluate", "runs/digits", "baselines=[random]", "num_subsets=4"]) == 0
    found = table(run)
    tracin, chance = found["rows"]
    best = max(found["rows"], key=lambda row: row["lds"])
    assert found["best"] == best["name"]
    assert best["from_best"] == {"value": 0, "over_queries": [0, 0]}
    truth = read_ground_truth(run / "ground_truth" / "single_run-0.5-0.h5")
    made = {"tracin": Scores.load(run / "scores" / "tracin.h5"), "random": random_scores(4, 60)}
    lds = {
        name: linear_datamodeling_score(item, truth.subsets, truth.outcomes)
        for name, item in made.items()
    }
    (other,) = {"tracin", "random"} - {best["name"]}
    expected = difference(lds[other], lds[best["name"]])
    gap = (chance if best is tracin else tracin)["from_best"]
    assert gap["value"] == pytest.approx(expected.value)
    assert gap["over_queries"] == pytest.approx([expected.low, expected.high])


@pytest.mark.parametrize("odd", ["soon", None, True, -1.0, float("nan"), 10**400])
def test_how_long_scores_took_is_shown_where_they_tell(run, odd, capsys):
    file = run / "scores" / "tracin.h5"
    made = Scores.load(file).provenance
    assert made["seconds"] > 0 and made["processor_seconds"] > 0
    given = ["evaluate", "runs/digits", "baselines=[]", "num_subsets=3"]
    replace_provenance(file, {**made, "seconds": 75.25})
    assert main(given) == 0
    assert "75.2 s" in capsys.readouterr().out
    (row,) = table(run)["rows"]
    assert row["seconds"] == 75.25
    assert row["processor_seconds"] == made["processor_seconds"]
    replace_provenance(file, {**made, "seconds": odd})
    assert main(given) == 0
    assert "Made in" not in capsys.readouterr().out
    assert table(run)["rows"][0]["seconds"] is None


def test_ground_truth_is_inspected_and_what_a_killed_process_left_goes(run, capsys):
    (run / "ground_truth").mkdir()
    (run / "ground_truth" / "single_run-0.5-0.h5.99.part").write_bytes(b"half")
    assert main(["inspect", "runs/digits"]) == 1
    assert main(["evaluate", "runs/digits", "baselines=[]", "num_subsets=3"]) == 0
    capsys.readouterr()
    assert main(["inspect", "runs/digits"]) == 0
    assert "ground truth" in capsys.readouterr().out


def test_more_subsets_keep_the_measurements_that_are_there(run, monkeypatch):
    given = ["evaluate", "runs/digits", "baselines=[]"]
    assert main([*given, "num_subsets=3"]) == 0
    path = run / "ground_truth" / "single_run-0.5-0.h5"
    first = read_ground_truth(path)
    made = []
    one = retraining.measure
    monkeypatch.setattr(retraining, "measure", lambda *a: made.append(1) or one(*a))
    assert main([*given, "num_subsets=5"]) == 0
    assert len(made) == 1 + 2  # the recorded end, and what was missing
    second = read_ground_truth(path)
    assert torch.equal(second.outcomes[:3], first.outcomes)
    assert second.made_by == first.made_by
    assert main([*given, "num_subsets=3"]) == 0  # all are kept, the first three are used
    assert len(read_ground_truth(path).subsets) == 5
    assert table(run)["num_subsets"] == 3


def test_an_interrupted_evaluation_goes_on(run, monkeypatch, capsys):
    given = ["evaluate", "runs/digits", "baselines=[]", "num_subsets=4"]
    assert main([*given, "ground_truth=whole.h5"]) == 0
    one, made = retraining.measure, []

    def interrupted(*arguments):
        made.append(1)
        if len(made) == 4:  # the recorded end, then two retrainings
            raise KeyboardInterrupt
        return one(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(retraining, "measure", interrupted)
        assert main([*given, "ground_truth=parts.h5"]) == 130
    assert "Interrupted after 2 of 4 retrainings" in capsys.readouterr().err
    assert read_ground_truth("parts.h5").done.flatten().tolist() == [True, True, False, False]
    assert main([*given, "ground_truth=parts.h5"]) == 0
    assert torch.equal(
        read_ground_truth("parts.h5").outcomes, read_ground_truth("whole.h5").outcomes
    )


def test_several_processes_measure_the_same(run):
    given = ["evaluate", "runs/digits", "baselines=[]", "num_subsets=3", "threads=1"]
    assert main([*given, "ground_truth=one.h5"]) == 0
    assert main([*given, "ground_truth=two.h5", "processes=2"]) == 0
    one, two = (read_ground_truth(name) for name in ("one.h5", "two.h5"))
    torch.testing.assert_close(one.outcomes, two.outcomes, rtol=1e-5, atol=1e-6)


def test_the_algorithm_is_trained_anew_on_less_data(run, monkeypatch, capsys):
    lengths, seeds = [], []
    one = retraining.Trainer.fit

    def fit(trainer, module, datamodule):
        lengths.append(len(datamodule.train_dataloader().dataset))
        seeds.append(datamodule.seed)
        assert trainer.max_epochs == 2
        return one(trainer, module, datamodule=datamodule)

    monkeypatch.setattr(retraining.Trainer, "fit", fit)
    given = ["evaluate", "runs/digits", "baselines=[random]", "protocol=algorithm", "alpha=0.8"]
    assert main([*given, "num_subsets=3", "seeds=2"]) == 0
    assert lengths == [48] * 6
    assert len(set(seeds)) == 6
    out = capsys.readouterr().out
    assert "Protocol algorithm: trained anew" in out
    assert "of the measurements' variance is between seeds" in out
    truth = read_ground_truth(run / "ground_truth" / "algorithm-0.8-0.h5")
    assert truth.outcomes.shape == (3, 2, 4)
    assert (truth.outcomes[:, 0] != truth.outcomes[:, 1]).any()
    assert 0 < table(run, "algorithm-0.8-0")["seed_variance_share"] <= 1
    # One more seed, and the same again elsewhere: everything follows from the seeds.
    assert main([*given, "num_subsets=3", "seeds=1", "ground_truth=again.h5"]) == 0
    again = read_ground_truth("again.h5")
    torch.testing.assert_close(again.outcomes[:, 0], truth.outcomes[:, 0])


def test_trained_anew_on_everything_with_its_own_seed_it_is_the_recorded_run(run):
    """So what else differs between a subset's training and the recorded one is the seed."""
    config = make("evaluate", "trajectory=runs/digits", "protocol=algorithm")
    parts = parts_to_retrain(config)
    state = retrain_afresh(parts._fresh, torch.ones(60, dtype=torch.bool), parts.recorded.seed)
    end = parts.trajectory.checkpoints[parts.trajectory.last_step]
    for name, tensor in end.parameters.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "os.system"}, "trains with os.system; expected lightning.pytorch.Trainer"),
        (
            {"_target_": "lightning.pytorch.Trainer", "callbacks": [{"_target_": "os.system"}]},
            "builds os.system, which is not part of this library",
        ),
    ],
)
def test_a_recorded_trainer_builds_only_what_is_known(node, message, run, capsys):
    config = load_config(run)
    config.trainer = node
    OmegaConf.save(config, run / "config.yaml")
    assert main(["evaluate", "runs/digits", "protocol=algorithm", "num_subsets=3"]) == 1
    assert message in capsys.readouterr().err


def test_another_configuration_is_refused(run, capsys):
    given = ["evaluate", "runs/digits", "baselines=[]", "num_subsets=3", "ground_truth=truth.h5"]
    assert main(given) == 0
    before = open("truth.h5", "rb").read()  # noqa: SIM115
    for changed, message in (
        ("alpha=0.7", "expected to keep 0.7 of the training examples, got 0.5"),
        ("seed=1", "drawn from another seed"),
        ("protocol=algorithm", "another configuration: it differs in protocol, training"),
        ("task=classification task.measure=margin", "it differs in task"),
    ):
        assert main([*given, *changed.split()]) == 1
        assert message in capsys.readouterr().err
    assert open("truth.h5", "rb").read() == before  # noqa: SIM115


def test_scores_of_something_else_are_refused(run, capsys):
    scores = Scores.load(run / "scores" / "tracin.h5")
    Scores(scores.values[:, :50]).save("short.h5")
    given = ["evaluate", "runs/digits", "baselines=[]", "num_subsets=3"]
    assert main([*given, "scores=short.h5"]) == 1
    assert "4 queries and 50 training examples" in capsys.readouterr().err
    assert not (run / "ground_truth").exists()
    other = dict(scores.provenance, measurements=[9.0, 9.0, 9.0, 9.0])
    Scores(scores.values, provenance=other).save("other.h5")
    assert main([*given, "scores=other.h5"]) == 1
    assert "are of another run, task or set of queries" in capsys.readouterr().err


def test_fewer_queries_than_recorded_are_judged_as_they_were_scored(run):
    given = ["trajectory=runs/digits", "estimator=tracin", "scores=two.h5", "data.num_query=2"]
    assert main(["attribute", *given]) == 0
    assert main(["evaluate", "runs/digits", "scores=two.h5", "num_subsets=3"]) == 0
    assert table(run)["num_queries"] == 2


def test_leaving_one_out_is_judged_by_rank_and_slope(run, capsys):
    given = ["evaluate", "runs/digits", "leave_out=1", "num_subsets=5", "baselines=[random]"]
    assert main(given) == 0
    assert "5 subsets of 59 of 60 training examples" in " ".join(capsys.readouterr().out.split())
    truth = read_ground_truth(run / "ground_truth" / "single_run-leave_out-1-0.h5")
    left_out = (~truth.subsets).nonzero()[:, 1]
    assert len(set(left_out.tolist())) == len(left_out) == 5
    scores = Scores.load(run / "scores" / "tracin.h5")
    expected = leave_one_out(scores, left_out, truth.outcomes[:, 0], truth.baseline)
    tracin, chance = table(run, "single_run-leave_out-1-0")["rows"]
    assert tracin["slope"] == pytest.approx(expected.slope)
    assert tracin["lds"] == pytest.approx(expected.rank.value)
    assert chance["slope"] is None
    assert main([*given, "num_subsets=61"]) == 1
    assert "60 training examples to leave out one by one" in capsys.readouterr().err


def test_constant_measurements_are_undefined_and_not_0(run, monkeypatch, capsys):
    monkeypatch.setattr(retraining, "measure", lambda *_: torch.ones(4))
    monkeypatch.setattr("tda_lightning.cli.commands.require_measurements", lambda *_: None)
    assert main(["evaluate", "runs/digits", "baselines=[]", "num_subsets=3"]) == 0
    assert "No number for tracin, undefined: The outcomes" in capsys.readouterr().out
    (row,) = table(run)["rows"]
    assert row["lds"] is None
    assert "constant: there is nothing to rank" in row["reason"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("num_subsets=2", "at least 3 subsets, got num_subsets=2"),
        ("alpha=1", "keeps 60 of 60 examples"),
        ("seeds=2", "repeats the recorded seed: expected seeds=1, got 2"),
        ("leave_out=60", "leave_out must be from 1 to 59, got 60"),
        ("protocol=both", "protocol must be single_run or algorithm, got both"),
        ("processes=0", "processes must be at least 1"),
        ("baselines=[chance]", "baselines must be among random"),
        ("scores=nowhere.h5", "There is no scores file at nowhere.h5"),
        ("+data.num_train=50", "expected 60 examples, got 50"),
    ],
)
def test_impossible_evaluations_are_answered_in_words(given, message, run, capsys):
    assert main(["evaluate", "runs/digits", given]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (run / "ground_truth").exists()


def test_a_damaged_ground_truth_is_named_and_kept(run, capsys):
    (run / "ground_truth").mkdir()
    path = run / "ground_truth" / "single_run-0.5-0.h5"
    path.write_bytes(b"hello")
    assert main(["evaluate", "runs/digits"]) == 1
    assert "single_run-0.5-0.h5 is damaged or no ground truth" in capsys.readouterr().err
    assert path.read_bytes() == b"hello"


def test_one_process_at_a_time_adds_to_a_file(run, capsys):
    path = run / "ground_truth" / "single_run-0.5-0.h5"
    with retraining._alone(path):
        assert main(["evaluate", "runs/digits", "num_subsets=3"]) == 1
    assert "Another process is adding to" in capsys.readouterr().err
    assert main(["evaluate", "runs/digits", "num_subsets=3", "baselines=[]"]) == 0
    assert sorted(item.name for item in path.parent.iterdir()) == [
        "single_run-0.5-0.h5",
        "single_run-0.5-0.json",
    ]


def test_the_interval_over_subsets_covers_the_mean_of_the_subsets():
    """Queries alike, so that only the subsets vary."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 30, generator=generator)
    subsets = draw_subsets(30, 0.5, 400)
    noise = 5 * torch.randn(400, 1, generator=generator)
    outcomes = noise - subsets.float() @ scores.T
    whole = linear_datamodeling_score(scores, subsets, outcomes).value
    parts = [
        interval_over_subsets(scores, subsets[i : i + 40], outcomes[i : i + 40])
        for i in range(0, 400, 40)
    ]
    assert sum(item.low <= whole <= item.high for item in parts) >= 8
    assert all(item.low < item.value < item.high for item in parts)
    with pytest.raises(ValueError, match="at least 3 subsets"):
        interval_over_subsets(scores, subsets[:2], outcomes[:2])


def test_a_spot_check_is_kept_with_the_scores(run, capsys):
    assert main(["attribute", "runs/digits", "estimator=influence"]) == 0
    files = [run / "scores" / f"{name}.h5" for name in ("influence", "tracin")]
    before = [Scores.load(file) for file in files]
    given = ["evaluate", "runs/digits", "spot_check=true", "baselines=[]", "num_subsets=4"]
    assert main(given) == 0
    assert "Kept in the provenance of" in capsys.readouterr().out
    rows = table(run)["rows"]
    for file, old, row in zip(files, before, rows, strict=True):
        found = Scores.load(file)  # checksums compared
        assert torch.equal(found.values, old.values)
        assert torch.equal(found.self_influence, old.self_influence)
        trust = found.provenance.pop("trust")
        assert found.provenance == old.provenance
        assert trust["spot_check"]["lds"] == row["lds"]
        assert trust["spot_check"]["over_subsets"] == row["over_subsets"]
        assert trust["spot_check"]["num_subsets"] == 4
        assert trust["spot_check"]["protocol"] == "single_run"
        assert "seed_variance_share" not in trust  # with one seed, nothing is known of it
    influence, tracin = (Scores.load(file).provenance["trust"] for file in files)
    assert influence["agreement"] == {"tracin": pytest.approx(tracin["agreement"]["influence"])}
    assert influence["damping"]["setting"] == "relative_damping"
    assert 0 < influence["damping"]["0.1"] <= 1 and 0 < influence["damping"]["10"] <= 1
    assert "damping" not in tracin
    assert sorted(item.name for item in files[0].parent.iterdir()) == ["influence.h5", "tracin.h5"]
    assert main(["report", str(files[0])]) == 0
    # A second one takes the first one's place, by other means.
    given = [*given[:-1], "num_subsets=3", "protocol=algorithm", "seeds=2"]
    assert main([*given, "scores=runs/digits/scores/tracin.h5"]) == 0
    trust = Scores.load(files[1]).provenance["trust"]
    assert trust["spot_check"]["protocol"] == "algorithm"
    assert 0 < trust["seed_variance_share"] <= 1


def test_a_spot_check_needs_scores(run, capsys):
    shutil.rmtree(run / "scores")
    assert main(["evaluate", "runs/digits", "spot_check=true"]) == 1
    assert "A spot check is kept in the scores' files" in capsys.readouterr().err
    assert main(["evaluate", "runs/digits", "num_subsets=3"]) == 0  # baselines alone


def test_only_the_provenance_of_scores_is_replaced(tmp_path, monkeypatch):
    path = tmp_path / "scores.h5"
    Scores(torch.randn(2, 3), provenance={"a": 1}).save(path)
    content = path.read_bytes()
    with pytest.raises(TypeError, match="only what JSON can hold"):
        replace_provenance(path, {"a": torch.ones(1)})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        replace_provenance(path, {"a": 2})
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "foreign.h5").write_bytes(b"hello")
    with pytest.raises(TrajectoryFormatError, match="no scores file"):
        replace_provenance(tmp_path / "foreign.h5", {})
