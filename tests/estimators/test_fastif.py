"""FastIF scores the nearest examples, as full influence functions do, and no others."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule, Scores, Trajectory
from tda_lightning.estimators import FastInfluence, InfluenceFunction, neighbours
from tda_lightning.estimators import training_features as features
from tda_lightning.estimators.features import read_features, require_layer
from tda_lightning.estimators.neighbours import nearest
from tda_lightning.evaluation import (
    agreement,
    as_removal,
    draw_subsets,
    leave_one_out,
    linear_datamodeling_score,
    predicted_changes,
)
from tda_lightning.records.errors import NonFiniteError
from tda_lightning.report import write_report
from tda_lightning.session.session import Session
from tda_lightning.solvers import ConjugateGradients, Direct, LiSSA
from tda_lightning.store.inspect import describe
from tda_lightning.tasks import AttributionTask
from tests.attributing import CaseTask, attribute, quiet, relative, watched_walks
from tests.attribution.test_processes_scoring import WithoutTask
from tests.cases.training import CLASSIFIER, MLP, OPTIMIZERS, queries_of, train
from tests.processes import results
from tests.recording.test_processes import train as train_in_processes
from tests.runs import Numbered

METRICS = ("l2", "cosine")


@pytest.fixture
def work() -> tuple[Trajectory, nn.Module, tuple[Tensor, Tensor]]:
    return train(CLASSIFIER, OPTIMIZERS["momentum"], checkpoints=(5,))


def hidden(module: nn.Module, run: Trajectory, inputs: Tensor) -> Tensor:
    """Inputs of the last layer at the last checkpoint."""
    module.load_state_dict(run.checkpoints[run.last_step].parameters)
    with torch.no_grad():
        return module[1](module[0](inputs))


def by_hand(queries: Tensor, train: Tensor, k: int, metric: str) -> Tensor:
    """Neighbours, one query and one example at a time."""
    rows = []
    for query in queries.double():
        if metric == "l2":
            distances = [float((query - x).norm()) for x in train.double()]
        else:
            distances = [-float(query @ x / (query.norm() * x.norm())) for x in train.double()]
        rows.append(sorted(range(len(train)), key=distances.__getitem__)[:k])
    return torch.tensor(rows)


def require_part_of(found: Scores, full: Tensor, candidates: Tensor, bound: float = 1e-12) -> None:
    """The scores of ``full`` for the candidates, none for the others."""
    assert found.candidates is not None and torch.equal(found.candidates, candidates)
    chosen = torch.zeros(full.shape, dtype=torch.bool).scatter(1, candidates, True)
    assert bool(found.values[~chosen].isnan().all())
    assert relative(found.values[chosen], full[chosen].double()) < bound


class TestScores:
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("case", [CLASSIFIER, MLP], ids=lambda case: case.name)
    def test_candidates_have_the_scores_of_full_influence(self, case: Any, metric: str) -> None:
        run, module, data = train(case, OPTIMIZERS["momentum"], checkpoints=(5,))
        points = hidden(module, run, queries_of(case)[0]), hidden(module, run, data[0])
        full = attribute(case, run, module, data, InfluenceFunction(damping=0.05)).values
        for k in (1, 4, 10):
            estimator = FastInfluence(damping=0.05, k=k, metric=metric)
            found = attribute(case, run, module, data, estimator)
            require_part_of(found, full, by_hand(*points, k, metric))
            assert found.by_segment is None and found.self_influence is None

    @pytest.mark.parametrize("curvature", ["exact", "kfac", "diagonal", "identity"])
    def test_any_curvature(self, curvature: str, work: Any) -> None:
        full = attribute(CLASSIFIER, *work, InfluenceFunction(curvature)).values
        found = attribute(CLASSIFIER, *work, FastInfluence(curvature, k=3))
        assert found.candidates is not None
        require_part_of(found, full, found.candidates)

    @pytest.mark.parametrize(
        "solver",
        [ConjugateGradients(), LiSSA(depth=20, batch=4, tolerance=10.0), Direct()],
        ids=lambda solver: type(solver).__name__,
    )
    def test_any_solver(self, solver: Any, work: Any) -> None:
        settings = {"solver": solver, "damping": 0.05}
        full = attribute(CLASSIFIER, *work, InfluenceFunction(**settings))
        found = attribute(CLASSIFIER, *work, FastInfluence(k=3, **settings))
        assert found.candidates is not None
        require_part_of(found, full.values, found.candidates)
        for scores in (full, found):
            assert scores.provenance["solver"]["name"] == type(solver).__name__
            assert sum("No self-influence" in note for note in scores.provenance["notes"]) == 1

    def test_without_k_all_of_a_small_set_are_candidates(self, work: Any) -> None:
        full = attribute(CLASSIFIER, *work, InfluenceFunction()).values
        found = attribute(CLASSIFIER, *work, FastInfluence())
        assert found.candidates is not None and found.candidates.shape == (3, 10)
        assert relative(found.values, full) < 1e-12
        assert found.is_complete
        assert linear_datamodeling_score(found, draw_subsets(10, 0.5, 4), torch.randn(4, 3))
        torch.testing.assert_close(found.by_group([0] * 10).values[:, 0], full.sum(1))

    def test_under_another_default_dtype(self, work: Any) -> None:
        plain = attribute(CLASSIFIER, *work, FastInfluence(k=3))
        work[0].features.clear()
        torch.set_default_dtype(torch.float64)
        try:
            found = attribute(CLASSIFIER, *work, FastInfluence(k=3))
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(found.values, plain.values, equal_nan=True)

    @pytest.mark.parametrize("rounds", [1, 3])
    def test_gradients_are_taken_of_candidates_alone(
        self, rounds: int, work: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if rounds > 1:
            monkeypatch.setattr("tda_lightning.session.session.memory_budget", lambda: 1)
        seen: list[int] = []
        taken = Session.train_gradients

        def watched(self: Session, batch: Any, examples: Tensor, *noise: Any) -> Any:
            seen.extend(examples.tolist())
            return taken(self, batch, examples, *noise)

        full = attribute(CLASSIFIER, *work, InfluenceFunction("identity")).values
        monkeypatch.setattr(Session, "train_gradients", watched)
        found = attribute(CLASSIFIER, *work, FastInfluence("identity", k=2), batch_size=3)
        assert found.candidates is not None
        require_part_of(found, full, found.candidates)
        asked = found.candidates if rounds > 1 else found.candidates.unique()[None]
        assert sorted(seen) == sorted(asked.flatten().tolist())
        assert found.provenance["candidates"]["examples"] == len(set(seen)) < 10

    def test_what_the_provenance_says(self, work: Any) -> None:
        found = attribute(CLASSIFIER, *work, FastInfluence(k=4, metric="cosine"))
        about = found.provenance["candidates"]
        assert about["k"] == 4 and about["metric"] == "cosine"
        assert about["features"] == "inputs of 2"
        assert found.provenance["damping"] == {"relative to the layer's mean eigenvalue": 0.1}
        assert found.provenance["checkpoints"] == [9]
        assert any("No self-influence" in note for note in found.provenance["notes"])
        quieter = attribute(CLASSIFIER, *work, FastInfluence(k=4), self_influence=False)
        assert not any("self" in note for note in quieter.provenance["notes"])

    def test_streamed_to_a_file(self, work: Any, tmp_path: Path) -> None:
        path = tmp_path / "scores.h5"
        estimator = FastInfluence(k=4)
        expected = attribute(CLASSIFIER, *work, estimator)
        attribute(CLASSIFIER, *work, estimator, scores_path=str(path))
        for mapped in (False, True):
            found = Scores.load(path, mapped=mapped)
            assert expected.candidates is not None
            require_part_of(found, expected.values, expected.candidates, 1e-15)


class TestTrainingFeatures:
    @pytest.fixture
    def gathered(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Training examples whose features were read."""
        seen: list[int] = []
        read = features._read

        def watched(session: Session, layer: Any, loss: Any, *rest: Any) -> Any:
            if loss == session.train_loss:
                seen.extend(rest[1].tolist())
            return read(session, layer, loss, *rest)

        monkeypatch.setattr(features, "_read", watched)
        return seen

    def test_used_again_by_other_settings_and_queries(self, work: Any, gathered: Any) -> None:
        run, module, data = work
        attribute(CLASSIFIER, *work, FastInfluence(k=4))
        assert sorted(gathered) == list(range(10))
        (kept,) = run.features.values()
        torch.testing.assert_close(kept["features"].double(), hidden(module, run, data[0]))
        queries = CLASSIFIER.batch(5, seed=8)
        again = attribute(
            CLASSIFIER, *work, FastInfluence(k=2, metric="cosine"), queries=queries, batch_size=3
        )
        assert len(gathered) == 10 and len(run.features) == 1
        points = hidden(module, run, queries[0]), hidden(module, run, data[0])
        full = attribute(CLASSIFIER, *work, InfluenceFunction(), queries=queries).values
        require_part_of(again, full, by_hand(*points, 2, "cosine"))

    def test_gathered_again_at_another_layer_and_with_other_weights(
        self, work: Any, gathered: Any
    ) -> None:
        run, *others = work
        attribute(CLASSIFIER, *work, FastInfluence())
        attribute(CLASSIFIER, *work, FastInfluence(layer="0"))
        assert len(gathered) == 20 and len(run.features) == 2
        last = run.checkpoints[9]
        moved = {name: value + 1e-9 for name, value in last.parameters.items()}
        checkpoints = {**run.checkpoints, 9: dataclasses.replace(last, parameters=moved)}
        other = dataclasses.replace(run, checkpoints=checkpoints)
        attribute(CLASSIFIER, other, *others, FastInfluence())
        assert len(gathered) == 30

    def test_on_disk(self, tmp_path: Path) -> None:
        train_in_processes(tmp_path, {"module": WithoutTask, "strategy": "auto", "devices": 1})
        found = []
        for _ in range(2):
            attribution = AttributionModule(WithoutTask(), str(tmp_path), FastInfluence(k=3))
            found.append(
                attribution.attribute(Numbered(21), Numbered(3, seed=1), trainer=quiet()).values
            )
            (file,) = (tmp_path / "features").iterdir()
        assert torch.equal(found[0].nan_to_num(), found[1].nan_to_num())
        inside = describe(tmp_path)
        assert [entry.name for entry in inside.features] == [file.stem]
        assert not inside.problems
        whole = bytearray(file.read_bytes())
        whole[len(whole) // 2] ^= 0xFF
        file.write_bytes(whole)
        assert "features" in describe(tmp_path).problems[0]


class TestFeatures:
    def read(self, module: nn.Module, layer: str | None, inputs: Any, size: int = 2) -> Tensor:
        def forward() -> int:
            module(inputs)
            return size

        return read_features(module, layer, forward)[0]

    def test_the_outputs_of_a_named_layer(self, work: Any) -> None:
        found = [
            attribute(CLASSIFIER, *work, FastInfluence(k=4, layer=layer)) for layer in (None, "1")
        ]
        assert found[1].provenance["candidates"]["features"] == "outputs of 1"
        assert torch.equal(found[0].candidates, found[1].candidates)  # what 2 gets, 1 gives
        run, module, data = work
        module.load_state_dict(run.checkpoints[run.last_step].parameters)
        with torch.no_grad():
            points = module[0](queries_of(CLASSIFIER)[0]), module[0](data[0])
        other = attribute(CLASSIFIER, *work, FastInfluence(k=4, layer="0"))
        assert torch.equal(other.candidates, by_hand(*points, 4, "l2"))

    def test_sequences_and_images_are_averaged(self) -> None:
        sequence, image = torch.randn(2, 5, 3), torch.randn(2, 3, 4, 5)
        same = nn.Sequential(nn.Identity())
        torch.testing.assert_close(self.read(same, "0", sequence), sequence.mean(1))
        torch.testing.assert_close(self.read(same, "0", image), image.mean((2, 3)))
        linear = nn.Linear(5, 4)  # it has its features in the last axis
        torch.testing.assert_close(self.read(linear, None, image), image.mean((1, 2)))
        head = nn.Sequential(nn.Linear(5, 4))
        expected = head[0](image).mean((1, 2))
        torch.testing.assert_close(self.read(head, "0", image), expected)
        flat = nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 2))  # positions beside each other
        torch.testing.assert_close(self.read(flat, None, sequence), sequence.mean(1))

    def test_of_a_recurrent_layer_its_outputs(self) -> None:
        rnn = nn.Sequential(nn.GRU(3, 4, batch_first=True))
        inputs = torch.randn(2, 5, 3)
        torch.testing.assert_close(self.read(rnn, "0", inputs), rnn[0](inputs)[0].mean(1))

    def test_of_a_layer_that_is_called_again_the_last_call(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

            def forward(self, inputs: Tensor) -> Tensor:
                return self.layer(self.layer(inputs))

        module, inputs = Twice(), torch.randn(2, 3)
        once = module.layer(inputs)
        torch.testing.assert_close(self.read(module, None, inputs), once)
        torch.testing.assert_close(self.read(module, "layer", inputs), module.layer(once))
        with pytest.raises(ValueError, match="'unused' is not called"):
            self.read(module, "unused", inputs)

    @pytest.mark.parametrize(
        ("outputs", "message"),
        [
            (torch.arange(2), "gives torch.int64, expected a floating-point"),
            ({"logits": torch.zeros(2, 3)}, "gives dict, expected a floating-point"),
            (torch.zeros(2), r"gives a tensor of shape \[2\] for 2 examples"),
            (torch.zeros(5, 2, 3), r"shape \[5, 2, 3\] for 2 examples, expected examples first"),
            (torch.zeros(3, 4), r"shape \[3, 4\] for 2 examples"),
        ],
    )
    def test_what_is_no_feature(self, outputs: Any, message: str) -> None:
        class Gives(nn.Module):
            def forward(self, inputs: Any) -> Any:
                return outputs

        with pytest.raises(ValueError, match=message):
            self.read(nn.Sequential(Gives()), "0", outputs)


class TestNeighbours:
    @pytest.fixture
    def points(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(7, 5, generator=generator), torch.randn(40, 5, generator=generator)

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("chunk", [1 << 24, 12])
    def test_by_hand(
        self, chunk: int, metric: str, points: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(neighbours, "_CHUNK", chunk)
        for k in (1, 6, 40):
            found = nearest(*points, k, metric)
            assert found.dtype == torch.int64
            assert torch.equal(found, by_hand(*points, k, metric))

    @pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="needs FAISS")
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("queries", [7, 40])  # FAISS has another way from 20 queries on
    def test_faiss_finds_the_same(self, queries: int, metric: str, points: Any) -> None:
        train = points[1] + 100  # float32 of far points has few digits left for their differences
        asked = train.roll(1, 0)[:queries] * 1.01
        expected = nearest(asked, train, 6, metric)
        assert torch.equal(nearest(asked, train, 6, metric, "faiss"), expected)

    @pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="needs FAISS")
    def test_scores_by_faiss(self, work: Any) -> None:
        expected = attribute(CLASSIFIER, *work, FastInfluence(k=4))
        found = attribute(CLASSIFIER, *work, FastInfluence(k=4, backend="faiss"))
        assert expected.candidates is not None
        require_part_of(found, expected.values, expected.candidates, 1e-15)

    def test_an_example_without_features_has_the_cosine_0(self) -> None:
        train = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
        assert nearest(torch.tensor([[1.0, 0.0]]), train, 3, "cosine").tolist() == [[2, 1, 0]]


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"k": 0}, ValueError, "k must be at least 1, got 0"),
            ({"metric": "dot"}, ValueError, "Unknown metric 'dot': expected one of l2, cosine"),
            ({"backend": "annoy"}, ValueError, "Unknown backend 'annoy': expected one of torch,"),
            ({"damping": -1.0}, ValueError, "damping must not be negative"),
        ],
    )
    def test_settings(self, settings: Any, error: Any, message: str) -> None:
        with pytest.raises(error, match=message):
            FastInfluence(**settings)

    def test_faiss_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(neighbours, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"pip install\s+'tda-lightning\[faiss\]', or use"):
            FastInfluence(backend="faiss")

    def test_more_candidates_than_examples(self, work: Any) -> None:
        with pytest.raises(ValueError, match="number of training examples, 10; got 11"):
            attribute(CLASSIFIER, *work, FastInfluence(k=11))

    @pytest.mark.parametrize(
        ("layer", "message"),
        [
            ("encoder.laier1", "no layer 'encoder.laier1'. Near it: encoder.layer1"),
            ("layer1", "Near it: .*encoder.layer1"),
            ("xyz", "It has: encoder, encoder.layer1, encoder.norm, head.*named_modules"),
        ],
    )
    def test_a_layer_that_does_not_exist(self, layer: str, message: str, work: Any) -> None:
        run, module, data = work
        named = nn.ModuleDict({"layer1": module[0], "norm": module[1]})
        holder = nn.ModuleDict({"encoder": named, "head": module[2]})
        with pytest.raises(ValueError, match=message):
            require_layer(holder, layer)
        with pytest.raises(ValueError, match="no layer '7'. It has: 0, 1, 2"):
            attribute(CLASSIFIER, run, module, data, FastInfluence(layer="7"))

    @pytest.mark.parametrize("which", ["training example", "query"])
    def test_features_that_are_not_finite(self, which: str, work: Any) -> None:
        run, module, data = work
        queries = queries_of(CLASSIFIER)
        # Saturates what follows: the loss is finite.
        (data if which == "training example" else queries)[0][2, 1] = torch.inf
        with pytest.raises(NonFiniteError, match=rf"{which} 2 \(outputs of 0\) are not finite"):
            attribute(CLASSIFIER, run, module, data, FastInfluence(layer="0"), queries=queries)
        assert not run.features or which == "query"

    def test_features_of_another_width(self, work: Any) -> None:
        class Flat(nn.Module):
            def forward(self, inputs: Tensor) -> Tensor:
                return inputs[:, : 2 + (len(inputs) == 3)]

        run, module, data = work
        module.flat = Flat()
        module.forward = lambda x: (module.flat(x), module[2](module[1](module[0](x))))[1]
        with pytest.raises(ValueError, match="expected 2 outputs of flat, got 3 .* for query 0"):
            attribute(CLASSIFIER, run, module, data, FastInfluence(layer="flat"), batch_size=5)


def test_plans(work: Any) -> None:
    """The neighbours of a few examples are not those of all, so candidates are as many as there
    may be until the features are known."""
    run, module, data = work
    sets = TensorDataset(*data), TensorDataset(*queries_of(CLASSIFIER))
    attribution = AttributionModule(module, run, FastInfluence(k=2), CaseTask("classification"))
    plan = attribution.plan(*sets, 4, quiet())
    assert not run.features and not run.curvature
    with watched_walks() as titles:
        scores = attribution.attribute(*sets, 4, quiet())
    # Eigenvalues take the gradients of the covariances, which is a pass without a walk.
    assert plan.num_passes == len(titles) + 1
    assert plan.features_bytes == sum(t.nbytes for t in next(iter(run.features.values())).values())
    batches = {group.title: group.batches for group in plan.passes}
    assert batches["features"] == 3
    assert 1 <= batches["influence function"] <= 2  # 3 queries x 2, by 4
    again = attribution.plan(*sets, 4, quiet())
    assert again.features_bytes == again.curvature_bytes == 0
    assert [group.title for group in again.passes][-1] == "influence function"
    distinct = scores.provenance["candidates"]["examples"]
    assert again.passes[-1].batches == -(-distinct // 4)


IN_PROCESSES = (
    FastInfluence(k=3),
    FastInfluence(k=1),
    FastInfluence(k=3, solver=ConjugateGradients(tolerance=1e-6), damping=0.1),
)


class Squares(AttributionTask):
    """Losses by a standard function, whose Gauss-Newton matrix is known."""

    def train_loss(self, module: Any, batch: Any) -> Tensor:
        return nn.functional.mse_loss(module.net(batch[0]), batch[1], reduction="none").mean(1)


def record_and_score(rank: int, root: Path) -> list[Any]:
    found = []
    train_in_processes(root / "run", {"module": WithoutTask})
    for number, estimator in enumerate(IN_PROCESSES):  # the later ones find features kept
        attribution = AttributionModule(WithoutTask(), str(root / "run"), estimator, Squares())
        scores = attribution.attribute(
            Numbered(21),
            Numbered(3, seed=1),
            batch_size=4,
            trainer=quiet(strategy="ddp", devices=2),
            scores_path=str(root / f"{number}.h5"),
        )
        found.append((scores.values, scores.candidates))
    return found


@pytest.mark.filterwarnings("ignore")
def test_in_two_processes(tmp_path: Path) -> None:
    found = results(record_and_score, tmp_path)
    assert len(list((tmp_path / "run" / "features").iterdir())) == 1
    run = dataclasses.replace(Trajectory.load(str(tmp_path / "run")), features={})
    for number, estimator in enumerate(IN_PROCESSES):
        attribution = AttributionModule(WithoutTask(), run, estimator, Squares())
        expected = attribution.attribute(
            Numbered(21), Numbered(3, seed=1), batch_size=4, trainer=quiet()
        )
        assert expected.candidates is not None
        saved = Scores.load(tmp_path / f"{number}.h5")
        require_part_of(saved, expected.values, expected.candidates, 1e-5)
        for each in found:
            scores = Scores(each[number][0], candidates=each[number][1])
            require_part_of(scores, expected.values, expected.candidates, 1e-5)


@pytest.fixture
def partial() -> Scores:
    values = torch.full((2, 6), torch.nan)
    values[:, [1, 4, 5]] = torch.tensor([[0.3, -0.2, 0.1], [-0.1, 0.4, 0.2]])
    candidates = torch.tensor([[4, 1, 5], [1, 5, 4]])
    about = {"k": 3, "examples": 3, "features": "inputs of <head>", "metric": "l2"}
    return Scores(values, candidates=candidates, provenance={"candidates": about})


def test_retraining_is_not_compared_with_scores_of_a_part(partial: Scores) -> None:
    subsets = draw_subsets(6, 0.5, 4)
    outcomes = torch.randn(4, 2)
    one, base = torch.arange(4), torch.zeros(2)
    for given in (partial, partial.values):
        for ask in (
            lambda scores: linear_datamodeling_score(scores, subsets, outcomes),
            lambda scores: agreement(scores, torch.zeros(2, 6)),
            lambda scores: agreement(torch.zeros(2, 6), scores),
            as_removal,
            lambda scores: predicted_changes(scores, subsets),
            lambda scores: leave_one_out(scores, one, outcomes, base),
        ):
            with pytest.raises(ValueError, match=r"6 of 12 scores are missing \(NaN\)"):
                ask(given)


def test_a_report_says_how_many_examples_were_looked_at(partial: Scores, tmp_path: Path) -> None:
    page = write_report(partial, tmp_path / "page.html").read_text(encoding="utf-8")
    words = " ".join(page.split())
    assert "6 training examples (3 scored for each query)" in words
    assert (
        "Only the 3 of 6 training examples nearest to each query by the inputs of &lt;head&gt; (l2)"
        in words
    )
    assert "All scored proponents" in words
    assert "Self-influence: the most" not in words and ">nan" not in words.lower()
    assert "from 2 examples" in words and "from 1 examples" in words
    plain = Scores(torch.randn(2, 6))
    page = write_report(plain, tmp_path / "page.html").read_text(encoding="utf-8")
    assert " scored for each query)" not in page
    for odd in (None, 3, {"features": 5, "metric": ["x"]}):
        scores = dataclasses.replace(partial, provenance={"candidates": odd})
        page = write_report(scores, tmp_path / "page.html").read_text(encoding="utf-8")
        assert "nearest to each query were scored" in page
