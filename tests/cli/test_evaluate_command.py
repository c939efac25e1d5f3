"""``tda evaluate``: scores before retrained models, on a tiny run of the digits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tda_lightning import Scores
from tda_lightning.cli import main, retraining, retraining_cache
from tda_lightning.cli.evaluation_table import judge
from tda_lightning.cli.retraining import RecordedRun
from tda_lightning.cli.run_config import load_config
from tda_lightning.evaluation import (
    GroundTruth,
    difference,
    draw_seeds,
    draw_subsets,
    interval_over_subsets,
    leave_one_out,
    linear_datamodeling_score,
    predicted_changes,
    proximal_bregman_response,
    retrain_from_scratch,
    seed_ceiling,
    top_removal,
)
from tda_lightning.evaluation.baselines import random_scores
from tda_lightning.evaluation.proximal_bregman import in_double
from tda_lightning.records.errors import TrajectoryFormatError
from tda_lightning.store.ground_truth_file import read_ground_truth
from tda_lightning.store.scores_file import replace_provenance
from tests.cli.test_config import make

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


def test_scores_are_judged_by_the_question_that_they_answer(run, capsys):
    given = ["evaluate", "runs/digits", "baselines=[]", "num_subsets=3"]
    assert main([*given, "alpha=0.5"]) == 0
    out = words(capsys)
    assert "derivatives taken where 100% (tracin) are" in out
    assert "tda attribute runs/digits keep=0.5" in out and "Keep:" not in out
    assert table(run)["rows"][0]["keep"] == 1
    file = run / "scores" / "tracin.h5"
    asked = {"what_if": {"keep": 0.8, "weights": "uniform"}}
    replace_provenance(file, {**Scores.load(file).provenance, **asked})
    assert main(given) == 0
    out = words(capsys)
    assert "48 of 60 training examples" in out and "Keep:" in out
    assert "Judged where" not in out
    found = table(run, "single_run-0.8-0")
    assert (found["alpha"], found["rows"][0]["keep"]) == (0.8, 0.8)


def test_how_long_scores_took_is_shown_where_they_tell(run, capsys):
    file = run / "scores" / "tracin.h5"
    made = Scores.load(file).provenance
    assert made["seconds"] > 0 and made["processor_seconds"] > 0
    given = ["evaluate", "runs/digits", "baselines=[]", "num_subsets=3"]
    replace_provenance(file, {**made, "seconds": 75.25})
    assert main(given) == 0
    assert "1 min 15 s" in capsys.readouterr().out
    (row,) = table(run)["rows"]
    assert row["seconds"] == 75.25
    assert row["processor_seconds"] == made["processor_seconds"]
    for odd in ("soon", None, True, -1.0, float("nan"), 10**400):
        replace_provenance(file, {**made, "seconds": odd})
        assert main(given) == 0
        assert "Time: how long" not in capsys.readouterr().out, odd
        assert table(run)["rows"][0]["seconds"] is None, odd


def test_scores_of_candidates_alone_are_not_judged(run, capsys):
    given = ["trajectory=runs/digits", "estimator=fastif", "estimator.k=5"]
    assert main(["attribute", *given, "scores=runs/digits/scores/fastif.h5"]) == 0
    assert main(["evaluate", "runs/digits", "baselines=[]", "--spot-check"]) == 0
    assert "No number for fastif, not defined: 5 of 60 training" in " ".join(
        capsys.readouterr().out.split()
    )
    rows = {row["name"]: row for row in table(run)["rows"]}
    assert rows["fastif"]["lds"] is None and rows["tracin"]["lds"] is not None
    for name in ("fastif", "tracin"):
        kept = Scores.load(run / "scores" / f"{name}.h5").provenance["trust"]
        assert "agreement" not in kept
    assert main(["report", "scores=runs/digits/scores/fastif.h5"]) == 0
    page = (run / "scores" / "fastif.html").read_text(encoding="utf-8")
    assert "5 scored for each query" in page


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


@pytest.mark.slow
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
    assert main([*given, "num_subsets=4"]) == 0
    assert "not told by one seed per subset: seeds=2 tells" in words(capsys)
    first = read_ground_truth(run / "ground_truth" / "algorithm-0.8-0.h5")
    assert main([*given, "num_subsets=4", "seeds=2"]) == 0
    assert lengths == [48] * 8
    assert len(set(seeds)) == 8
    out = words(capsys)
    assert "Protocol algorithm: trained from scratch" in out
    assert "of the measurements' variance is between seeds" in out
    truth = read_ground_truth(run / "ground_truth" / "algorithm-0.8-0.h5")
    assert truth.outcomes.shape == (4, 2, 4)
    assert torch.equal(truth.outcomes[:, :1], first.outcomes)  # a seed is added to what is there
    assert (truth.outcomes[:, 0] != truth.outcomes[:, 1]).any()
    assert 0 < table(run, "algorithm-0.8-0")["seed_variance_share"] <= 1
    limit = table(run, "algorithm-0.8-0")["limits"]["seeds"]
    assert limit["lds"] == seed_ceiling(truth.outcomes).over_queries.value
    assert "Limit, seeds: what a predictor would reach" in out
    # The same again elsewhere: everything follows from the seeds.
    assert main([*given, "num_subsets=3", "seeds=1", "ground_truth=again.h5"]) == 0
    again = read_ground_truth("again.h5")
    torch.testing.assert_close(again.outcomes[:, 0], truth.outcomes[:3, 0])


def words(capsys) -> str:
    """What was printed, without the breaks of lines."""
    return " ".join(capsys.readouterr().out.split())


def test_trained_anew_on_everything_with_its_own_seed_it_is_the_recorded_run(run):
    """So what else differs between a subset's training and the recorded one is the seed."""
    config = make("evaluate", "trajectory=runs/digits", "protocol=algorithm")
    parts = RecordedRun.load(config)
    state = retrain_from_scratch(
        parts.fresh, torch.ones(60, dtype=torch.bool), parts.run_config.seed
    )
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
    monkeypatch.setattr("tda_lightning.cli.commands.evaluate.require_measurements", lambda *_: None)
    assert main(["evaluate", "runs/digits", "baselines=[]", "num_subsets=3"]) == 0
    assert "No number for tracin, undefined: The outcomes" in capsys.readouterr().out
    (row,) = table(run)["rows"]
    assert row["lds"] is None
    assert "constant: there is nothing to rank" in row["reason"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("num_subsets=2", "at least 3 subsets, got num_subsets=2"),
        ("alpha=1", "alpha=1 keeps 60 of 60 training examples"),
        ("alpha=0.5 leave_out=3", "give one of them, got alpha=0.5 and leave_out=3"),
        ("seeds=2", "repeats the recorded seed: expected seeds=1, got 2"),
        ("leave_out=60", "leave_out must be from 1 to 59, got 60"),
        ("protocol=both", "protocol must be among single_run, algorithm, pbrf, got both"),
        ("processes=0", "processes must be at least 1"),
        ("baselines=[chance]", "baselines must be among random"),
        ("scores=nowhere.h5", "There is no scores file at nowhere.h5"),
        ("+data.num_train=50", "expected 60 examples, got 50"),
    ],
)
def test_impossible_evaluations_are_answered_in_words(given, message, run, capsys):
    assert main(["evaluate", "runs/digits", *given.split()]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (run / "ground_truth").exists()


def test_a_damaged_ground_truth_is_named_and_kept(run, capsys):
    (run / "ground_truth").mkdir()
    path = run / "ground_truth" / "single_run-0.5-0.h5"
    path.write_bytes(b"hello")
    assert main(["evaluate", "runs/digits"]) == 1
    assert "single_run-0.5-0.h5 is damaged" in capsys.readouterr().err
    assert path.read_bytes() == b"hello"


def test_one_process_at_a_time_adds_to_a_file(run, capsys):
    path = run / "ground_truth" / "single_run-0.5-0.h5"
    with retraining_cache._exclusive(path):
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
    assert "Added to the provenance of" in capsys.readouterr().out
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
    given = [*given[:-1], "num_subsets=4", "protocol=algorithm", "seeds=2"]
    assert main([*given, "scores=runs/digits/scores/tracin.h5"]) == 0
    trust = Scores.load(files[1]).provenance["trust"]
    assert trust["spot_check"]["protocol"] == "algorithm"
    assert 0 <= trust["spot_check"]["limit_by_seeds"] <= 1
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
    with pytest.raises(TrajectoryFormatError, match="expected a complete scores file"):
        replace_provenance(tmp_path / "foreign.h5", {})


# A query's top proponents left out


def test_removal_is_that_of_the_library_and_is_kept(run, monkeypatch, capsys):
    given = ["evaluate", "runs/digits", "baselines=[]", "num_subsets=3"]
    assert main([*given, "removal=[0.05]"]) == 0
    out = capsys.readouterr().out
    assert table(run)["removal"][0]["k"] == 3
    assert "Without the strongest proponents of each query" in out
    assert "Removal: by weight 0 in the recorded run" in out
    made = []
    one = retraining.measure
    monkeypatch.setattr(retraining, "measure", lambda *a: made.append(1) or one(*a))
    assert main([*given, "removal=[3,8]", "together=4"]) == 0
    # The recorded end twice, and for the new k 4 queries and 5 random sets.
    assert len(made) == 2 + 4 + 5
    scores = Scores.load(run / "scores" / "tracin.h5")
    parts = RecordedRun.load(make("evaluate", "trajectory=runs/digits"))
    expected = top_removal(
        parts.trajectory,
        parts.module,
        parts.task,
        parts.data.train_dataset,
        parts.data.query_dataset,
        scores,
        ks=[3, 8],
    )
    rows = table(run)["removal"]
    assert [(row["name"], row["k"]) for row in rows] == [("tracin", 3), ("tracin", 8)]
    for row, known in zip(rows, expected, strict=True):
        assert row["rise"] == pytest.approx(known.rise.value, rel=1e-4)
        assert row["rise_over_queries"] == pytest.approx(
            [known.rise.low, known.rise.high], rel=1e-4
        )
        assert row["random_rise"] == pytest.approx(known.random_rise.value, abs=1e-5)
        above = [known.above_random.low, known.above_random.high]
        assert row["above_random_over_queries"] == pytest.approx(above, rel=1e-3)
        assert (row["flipped"], row["random_flipped"]) == (known.flipped, known.random_flipped)
    made.clear()
    assert main([*given, "removal=[8]"]) == 0  # all is kept
    assert len(made) == 2
    assert [row["k"] for row in table(run)["removal"]] == [8]


def test_examples_of_one_term_are_their_tokens(run, capsys):
    scores = "scores=runs/digits/scores/exact.h5"
    exact = ["estimator=unrolled", "estimator.token_weights=true", scores]
    assert main(["attribute", "runs/digits", *exact]) == 0
    given = ["evaluate", "runs/digits", "baselines=[]", "num_subsets=3", scores]
    assert main([*given, "removal=[3]", "token_removal=[0.05]"]) == 0
    out = words(capsys)
    assert "Without the strongest proponents" in out and "Without the strongest tokens" in out
    found = table(run)
    (own,), (token,) = found["removal"], found["token_removal"]
    assert (token["name"], token["k"]) == ("exact", 3)
    for key in ("rise", "above_random_over_queries", "random_rise"):
        assert token[key] == pytest.approx(own[key], rel=1e-4, abs=1e-6), key
    truth = read_ground_truth(run / "ground_truth" / "single_run-token_removal-0.h5")
    assert truth.subsets.shape == (1 + 4 + 5, 60)
    for setting, message in (
        ("scores=runs/digits/scores/tracin.h5", "none are of tokens"),
        ("protocol=algorithm", "expected protocol=single_run, got algorithm"),
        ("token_removal=[60]", "token_removal must be a list of numbers from 1 to 59"),
    ):
        assert main([*given, "token_removal=[1]", setting]) == 1
        assert message in capsys.readouterr().err


def test_the_algorithm_really_removes_proponents(run, monkeypatch):
    trained = []
    one = retraining.retrain_from_scratch

    def train(make, kept, seed):
        trained.append((int(kept.sum()), seed))
        return one(make, kept, seed)

    monkeypatch.setattr(retraining, "retrain_from_scratch", train)
    given = ["evaluate", "runs/digits", "baselines=[]", "protocol=algorithm", "num_subsets=3"]
    assert main([*given, "removal=[5]"]) == 0
    # Everything, 4 queries and 5 random sets, all with the same seed.
    assert sorted(size for size, _ in trained[3:]) == [55] * 9 + [60]
    assert len({seed for _, seed in trained[3:]}) == 1
    (row,) = table(run, "algorithm-0.5-0")["removal"]
    truth = read_ground_truth(run / "ground_truth" / "algorithm-removal-0.h5")
    whole = truth.outcomes[truth.subsets.all(1)][0]
    scores = Scores.load(run / "scores" / "tracin.h5")
    rises = []
    for query in range(4):
        kept = torch.ones(60, dtype=torch.bool)
        kept[scores.proponents(query, 5)[0]] = False
        (place,) = (truth.subsets == kept).all(1).nonzero().flatten().tolist()
        rises.append(float(truth.outcomes[place, 0, query] - whole[0, query]))
    assert row["rise"] == pytest.approx(sum(rises) / 4)


# Shares of the work


def test_parts_make_every_retraining_once_and_are_taken_up(run, monkeypatch, capsys):
    given = ["evaluate", "runs/digits", "baselines=[]", "num_subsets=5"]
    assert main([*given, "ground_truth=whole.h5"]) == 0
    made = []
    one = retraining_cache.write_ground_truth
    monkeypatch.setattr(
        retraining_cache,
        "write_ground_truth",
        lambda truth, path: made.append(path.name) or one(truth, path),
    )
    assert main([*given, "part=1/2,2/2", "ground_truth=parts.h5", "--multirun"]) == 0
    assert made == ["parts.part1of2.h5"] * 3 + ["parts.part2of2.h5"] * 2
    assert "Part 2/2 of the retrainings is done" in capsys.readouterr().out
    assert not Path("parts.h5").exists()
    assert main([*given, "part=2/3", "ground_truth=parts.h5"]) == 0  # others' work is known
    assert len(made) == 5
    with retraining_cache._exclusive(Path("parts.part1of2.h5")):
        assert main([*given, "ground_truth=parts.h5"]) == 1
    assert "is adding to parts.part1of2.h5" in capsys.readouterr().err
    assert main([*given, "ground_truth=parts.h5"]) == 0
    assert made[5:] == ["parts.h5"]  # put together, nothing made again
    whole, parts = (read_ground_truth(name) for name in ("whole.h5", "parts.h5"))
    assert torch.equal(parts.outcomes, whole.outcomes)
    assert parts.made_by["landing_error"] == 0
    assert sorted(item.name for item in Path().glob("parts*")) == ["parts.h5", "parts.json"]


def test_what_is_missing_of_the_parts_is_made(run):
    given = ["evaluate", "runs/digits", "baselines=[]", "num_subsets=3"]
    assert main([*given, "part=1/2", "num_subsets=6"]) == 0
    assert main(given) == 0
    truth = read_ground_truth(run / "ground_truth" / "single_run-0.5-0.h5")
    # Of the part, also what was not asked for now.
    assert truth.done.flatten().tolist() == [True, True, True, False, True, False]


# The proximal Bregman response


def test_the_proximal_response_judges_influence_functions(run, capsys):
    given = ["attribute", "runs/digits", "estimator=influence", "estimator.damping=0.5"]
    assert main([*given, "scores=damped.h5"]) == 0
    given = ["evaluate", "runs/digits", "protocol=pbrf", "baselines=[]", "num_subsets=3"]
    scores = "scores=[damped.h5,runs/digits/scores/tracin.h5]"
    assert main([*given, scores, "spot_check=true"]) == 0
    assert "Protocol pbrf: the trained model fine-tuned" in capsys.readouterr().out
    truth = read_ground_truth(run / "ground_truth" / "pbrf-0.5-0.h5")
    examples = (~truth.subsets).nonzero()[:, 1]
    parts = RecordedRun.load(make("evaluate", "trajectory=runs/digits"))
    decay = float(parts.trajectory.steps.hyperparameters["weight_decay"][-1, 0])
    module, train, query = in_double(
        parts.module, parts.data.train_dataset, parts.data.query_dataset
    )
    expected = proximal_bregman_response(
        module, parts.task, parts.end, train, query, examples[:1].tolist(), 0.5 + decay
    )
    found = truth.outcomes[0, 0] - truth.baseline
    torch.testing.assert_close(found, expected[:, 0], rtol=1e-9, atol=1e-13)
    damped = table(run, "pbrf-0.5-0")["rows"][0]
    scored = Scores.load("damped.h5")
    known = leave_one_out(scored, examples, truth.outcomes[:, 0], truth.baseline)
    assert damped["lds"] == pytest.approx(known.rank.value)
    assert damped["slope"] == pytest.approx(known.slope)
    assert damped["correlation"] == pytest.approx(known.correlation)
    trust = scored.provenance["trust"]
    assert trust["pbrf"]["damping"] == 0.5
    assert trust["pbrf"]["lds"] == damped["lds"]
    assert trust["damping"]["setting"] == "damping"
    assert "damping" not in Scores.load(run / "scores" / "tracin.h5").provenance["trust"]
    assert "spot_check" not in trust
    # A check by retraining stands beside it.
    given = ["evaluate", "runs/digits", "scores=damped.h5", "spot_check=true"]
    assert main([*given, "baselines=[gradient_dot]", "num_subsets=3"]) == 0
    both = Scores.load("damped.h5").provenance["trust"]
    assert list(both["agreement"]) == ["gradient_dot"]
    assert both["pbrf"] == trust["pbrf"]
    assert both["spot_check"]["protocol"] == "single_run"


def test_scores_that_do_not_vary_agree_with_nothing(run):
    """And a spot check does not fail of them, after all the retraining."""
    made = Scores.load(run / "scores" / "tracin.h5").provenance
    Scores(torch.zeros(4, 60), provenance=made).save(run / "scores" / "zero.h5")
    given = ["evaluate", "runs/digits", "spot_check=true", "baselines=[]", "num_subsets=3"]
    assert main(given) == 0
    assert "agreement" not in Scores.load(run / "scores" / "tracin.h5").provenance["trust"]


def test_under_the_algorithm_slopes_are_of_differences_between_subsets(run):
    """Whatever all subsets have in common, as fewer steps have, does not count."""
    scores = Scores.load(run / "scores" / "tracin.h5")
    subsets = draw_subsets(60, 0.8, 12)
    predicted = predicted_changes(scores, subsets, removed=True)
    truth = GroundTruth.unmeasured(
        "algorithm", subsets, draw_seeds(12, 1), torch.zeros(4), {"run": "this"}
    )
    for row in range(12):
        truth = truth.with_outcome(row, 0, 5 + 2 * predicted[:, row], 1.0)
    row = judge("tracin", scores, truth)
    assert row.slope == pytest.approx(2)
    assert row.correlation == pytest.approx(1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("removal=[0]", "removal must be a list of numbers from 1 to 59"),
        ("removal=[60]", "removal must be a list of numbers from 1 to 59"),
        ("removal=5", "removal must be a list of numbers from 1 to 59"),
        ("removal=[2.5]", "removal must be a list of numbers from 1 to 59"),
        ("removal=[]", "removal must be a list of numbers from 1 to 59"),
        ("removal=[5] scores=[]", "the proponents that scores name, and there are none"),
        ("removal=[5] protocol=pbrf", "removal is by retraining"),
        ("part=3/2", "part must be K/N"),
        ("part=half", "part must be K/N"),
        ("protocol=pbrf", "expected damping=NUMBER, or scores of influence functions"),
        ("protocol=pbrf damping=0", "damping must be positive"),
        ("protocol=pbrf damping=1 leave_out=2", "gives up one example at a time, got leave_out=2"),
        ("protocol=pbrf damping=1 seeds=2", "repeats the recorded seed: expected seeds=1, got 2"),
        ("damping=1", "damping is for protocol=pbrf, got protocol=single_run"),
    ],
)
def test_settings_that_do_not_go_together_are_named(given, message, run, capsys):
    assert main(["evaluate", "runs/digits", "num_subsets=3", *given.split()]) == 1
    assert message in capsys.readouterr().err
    assert not (run / "ground_truth").exists()
