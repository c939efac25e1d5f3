"""Ground truth: the record, its file, and what is refused."""

from __future__ import annotations

import os

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from tda_lightning.evaluation import GroundTruth, draw_seeds, draw_subsets, truth_configuration
from tda_lightning.records.errors import TrajectoryFormatError, TrajectoryMismatchError
from tda_lightning.store.ground_truth_file import read_ground_truth, write_ground_truth
from tests.cases.training import CLASSIFIER, queries_of
from tests.evaluation.test_evaluation import small


def asked(subsets: int = 4, seeds: int = 2, train: int = 12, **configuration) -> GroundTruth:
    return GroundTruth.unmeasured(
        "algorithm",
        draw_subsets(train, 0.5, subsets),
        draw_seeds(subsets, seeds),
        torch.tensor([1.0, 2.0, 3.0]),
        {"run": "a", "data": "b", **configuration},
        {"command": "tda evaluate"},
    )


def partly_known() -> GroundTruth:
    truth = asked()
    for subset, seed in truth.missing[:3]:
        truth = truth.with_outcome(subset, seed, torch.tensor([0.1, 0.2, 0.3]) * (subset + 1), 1.5)
    return truth


def test_a_file_holds_what_was_written(tmp_path) -> None:
    truth = partly_known()
    path = tmp_path / "ground_truth" / "truth.h5"
    write_ground_truth(truth, path)
    found = read_ground_truth(path)
    for name in ("subsets", "seeds", "outcomes", "done", "seconds", "baseline"):
        assert torch.equal(getattr(found, name), getattr(truth, name)), name
    assert found.protocol == "algorithm"
    assert found.configuration == truth.configuration
    assert found.made_by == truth.made_by
    assert found.missing == truth.missing == [(1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
    assert len(found.finished().subsets) == 1
    assert [item.name for item in path.parent.iterdir()] == ["truth.h5"]
    with h5py.File(path) as file:  # as anybody may read it
        assert file["outcomes"].shape == (4, 2, 3)
        assert file.attrs["format"] == b"tda-lightning ground truth"


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "truth.h5"
    write_ground_truth(asked(), path)
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_ground_truth(partly_known(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_more_subsets_and_seeds_go_on_where_fewer_ended() -> None:
    larger = asked(6, 3).continuing(partly_known())
    assert larger.done.sum() == 3
    assert torch.equal(larger.outcomes[0, :2], partly_known().outcomes[0])
    assert larger.missing[0] == (0, 2)
    assert larger.first(4, 2).missing == partly_known().missing


def test_what_is_known_is_found_by_subset_and_seed_wherever_it_stands() -> None:
    known = partly_known()
    order = torch.tensor([2, 1, 0])
    turned = GroundTruth.unmeasured(
        "algorithm", known.subsets[order], known.seeds[order].flip(1), known.baseline,
        known.configuration,
    )  # fmt: skip
    found = turned.with_outcomes_of(known)
    assert found.done.tolist() == known.done[order].flip(1).tolist()
    assert torch.equal(found.outcomes, known.outcomes[order].flip(1))
    assert torch.equal(found.seconds, known.seconds[order].flip(1))
    other = GroundTruth.unmeasured(
        "algorithm", ~known.subsets, known.seeds, known.baseline, known.configuration
    )
    assert not other.with_outcomes_of(known).done.any()
    with pytest.raises(TrajectoryMismatchError, match="differs in data"):
        asked(data="c").with_outcomes_of(known)


def test_parts_of_the_work_are_put_together() -> None:
    """What another part has not made does not take away what this one has."""
    whole, parts = asked(), [asked(), asked()]
    for number, (subset, seed) in enumerate(whole.missing):
        outcome = torch.full((3,), float(number))
        parts[number % 2] = parts[number % 2].with_outcome(subset, seed, outcome, 1.0)
    both = whole.continuing(parts[0]).continuing(parts[1])
    assert both.missing == []
    assert both.outcomes[..., 0].flatten().tolist() == list(range(8))


def test_predicted_classes_are_kept_where_asked(tmp_path) -> None:
    truth = GroundTruth.unmeasured(
        "single_run", draw_subsets(12, 0.5, 3), torch.full((3, 1), -1), torch.ones(2), {},
        classes=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="holds classes, and got a retraining without"):
        truth.with_outcome(0, 0, torch.ones(2), 1.0)
    truth = truth.with_outcome(1, 0, torch.ones(2), 1.0, torch.tensor([7, -(1 << 62)]))
    write_ground_truth(truth, tmp_path / "truth.h5")
    found = read_ground_truth(tmp_path / "truth.h5")
    assert torch.equal(found.classes, truth.classes)
    assert found.rows(torch.tensor([1, 1])).classes.tolist() == [[[7, -(1 << 62)]]] * 2
    assert read_ground_truth_without_classes(tmp_path).classes is None


def read_ground_truth_without_classes(tmp_path) -> GroundTruth:
    """As all files were before any kept classes."""
    write_ground_truth(partly_known(), tmp_path / "older.h5")
    with h5py.File(tmp_path / "older.h5") as file:
        assert "classes" not in file
    return read_ground_truth(tmp_path / "older.h5")


def test_another_question_is_refused() -> None:
    truth = partly_known()
    with pytest.raises(TrajectoryMismatchError, match="another configuration: it differs in data"):
        asked(data="c").continuing(truth)
    with pytest.raises(TrajectoryMismatchError, match="differs in extra, run"):
        asked(run="x", extra=1).continuing(truth)
    with pytest.raises(TrajectoryMismatchError, match="expected 13 examples, got 12"):
        asked(train=13).continuing(truth)
    other = GroundTruth.unmeasured(
        "algorithm", ~truth.subsets, truth.seeds, truth.baseline, truth.configuration
    )
    with pytest.raises(TrajectoryMismatchError, match="subsets or seeds"):
        other.continuing(truth)
    other = GroundTruth.unmeasured(
        "algorithm", truth.subsets, truth.seeds, truth.baseline + 1, truth.configuration
    )
    with pytest.raises(TrajectoryMismatchError, match="recorded run's end"):
        other.continuing(truth)
    other = GroundTruth.unmeasured(
        "single_run", truth.subsets, truth.seeds, truth.baseline, truth.configuration
    )
    with pytest.raises(TrajectoryMismatchError, match="differs in protocol"):
        other.continuing(truth)
    truth.require_scores_of(3, 12)
    with pytest.raises(TrajectoryMismatchError, match="3 queries and subsets of 12"):
        truth.require_scores_of(3, 11)


def test_shapes_must_fit() -> None:
    subsets = draw_subsets(9, 0.5, 3)
    with pytest.raises(ValueError, match="Expected subsets"):
        GroundTruth.unmeasured("algorithm", subsets, draw_seeds(4, 1), torch.ones(2), {})
    with pytest.raises(ValueError, match="protocol must be one of"):
        GroundTruth.unmeasured("both", subsets, draw_seeds(3, 1), torch.ones(2), {})
    with pytest.raises(ValueError, match="must be finite"):
        asked().with_outcome(0, 0, torch.tensor([1.0, float("nan"), 0.0]), 1.0)


def test_truth_configuration_an_outcome_is_told_apart() -> None:
    run, module, task, _ = small()
    inputs, labels = queries_of(CLASSIFIER)
    queries = TensorDataset(inputs, labels)
    found = truth_configuration(run, module, task, queries)
    assert found == truth_configuration(run, module, task, TensorDataset(inputs.clone(), labels))
    fewer = truth_configuration(run, module, task, TensorDataset(inputs[1:], labels[1:]))
    assert {name for name in found if found[name] != fewer[name]} == {"queries"}
    other, *_ = small("sgd")
    assert truth_configuration(other, module, task, queries)["run"] != found["run"]
    afresh = truth_configuration(run, module, task, queries, {"max_epochs": 2})
    assert afresh["training"] != truth_configuration(run, module, task, queries, {})["training"]


# Files from elsewhere


@pytest.fixture
def path(tmp_path):
    write_ground_truth(partly_known(), tmp_path / "truth.h5")
    return tmp_path / "truth.h5"


def replaced(path, name: str, values) -> None:
    with h5py.File(path, "r+") as file:
        if name in file:
            del file[name]
        file[name] = values


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("outcomes", np.zeros((4, 2, 2))),
        ("outcomes", np.full((4, 2, 3), np.nan)),
        ("outcomes", np.zeros((4, 2, 3), np.float32)),
        ("subsets", np.ones((5, 12), bool)),
        ("subsets", np.ones(12, bool)),
        ("seeds", np.zeros((4, 1), np.int64)),
        ("configuration", np.array([b"[1]"])),
        ("configuration", np.array([b"{"])),
        ("configuration", np.array([b"[" * 5000])),
        ("made_by", np.zeros(3)),
        ("baseline", h5py.ExternalLink("elsewhere.h5", "/")),
        ("baseline", h5py.SoftLink("/seconds")),
        ("classes", np.zeros((4, 2, 2), np.int64)),
        ("classes", np.zeros((4, 2, 3))),
        ("classes", h5py.ExternalLink("elsewhere.h5", "/")),
    ],
)
def test_damaged_contents_are_format_errors(path, name, values) -> None:
    replaced(path, name, values)
    with pytest.raises(TrajectoryFormatError, match="truth.h5 is damaged"):
        read_ground_truth(path)


@pytest.mark.parametrize("name", ["subsets", "seeds", "done", "outcomes", "configuration"])
def test_missing_contents_are_format_errors(path, name) -> None:
    with h5py.File(path, "r+") as file:
        del file[name]
    with pytest.raises(TrajectoryFormatError, match="truth.h5 is damaged"):
        read_ground_truth(path)


def test_files_of_another_kind_are_named(path, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no ground truth file at"):
        read_ground_truth(tmp_path / "nowhere.h5")
    with pytest.raises(TrajectoryFormatError, match="is a folder"):
        read_ground_truth(tmp_path)
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(TrajectoryFormatError, match="is not a ground truth file"):
        read_ground_truth(tmp_path / "foreign.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 2
    with pytest.raises(TrajectoryFormatError, match="reads up to version 1. Upgrade"):
        read_ground_truth(path)


def test_a_file_cut_or_flipped_anywhere_is_refused_or_whole(path, tmp_path) -> None:
    """Never another exception, and never other numbers."""
    content, truth = path.read_bytes(), partly_known()
    for place in range(0, len(content), 61):
        flipped = bytearray(content)
        flipped[place] ^= 0x10
        for damaged in (content[:place], bytes(flipped)):
            path.write_bytes(damaged)
            try:
                found = read_ground_truth(path)
            except TrajectoryFormatError:
                continue
            assert torch.equal(found.outcomes, truth.outcomes)
