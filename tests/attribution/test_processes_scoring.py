"""Scores of two processes, from a trajectory that two processes recorded, are those of one."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tda_lightning import AttributionModule, Ensemble, Scores, Trajectory
from tda_lightning.estimators import TRAK, InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.evaluation import measure, retrain
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.solvers import ConjugateGradients, LiSSA
from tda_lightning.tasks import AttributionTask
from tests.attributing import quiet, relative
from tests.processes import outcomes, results
from tests.recording.test_processes import Plain, train
from tests.recording.test_sharded import OnTheCPU
from tests.runs import Numbered, adamw
from tests.scripts import Script

pytestmark = pytest.mark.filterwarnings("ignore")

ROUNDS = 1_200  # bytes, in which not all queries find room
ESTIMATORS = {
    "source": Source(2),
    "source blocks": Source(2, leading_directions=0),
    "source products": Source(2, curvature="matrix_free", blocks="layer", tolerance=1e-6),
    "source recorded": Source(2, order="recorded"),
    "source recorded blocks": Source(2, order="recorded", leading_directions=0),
    "tracin": TracIn(),
    "influence": InfluenceFunction(),
    "influence cg": InfluenceFunction(
        damping=1.0, solver=ConjugateGradients("ekfac", tolerance=1e-6)
    ),
    # Three recursions, which two processes share unequally.
    "influence lissa": InfluenceFunction(
        damping=1.0, solver=LiSSA(scale=40.0, depth=20, batch=5, repeats=3, tolerance=10.0)
    ),
    "trak": TRAK(projection_dimension=6),
    "unrolled": Unrolled(),
    "unrolled in rounds": Unrolled(memory_budget=ROUNDS),
}
BY_STANDARD_LOSS = ("source products", "influence cg", "influence lissa", "trak")
RUNS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {"optimizers": adamw},
    "online": {"recorder": {"curvature": "online", "curvature_every": 1, "fisher": "empirical"}},
}
# Every estimator under one optimizer, but for products, which conjugate gradients share as well;
# under AdamW those that its second moments enter in, and on recorded statistics some that use them.
# Other pairs are slow tests.
ON_STATISTICS = ("source recorded blocks", "influence")
UNDER_ADAM = ("source recorded", "unrolled")
ELSEWHERE = (*ON_STATISTICS, "source recorded", "source products")
PAIRS = [
    *(("sgd", name) for name in ESTIMATORS if name not in ELSEWHERE),
    *(("adamw", name) for name in UNDER_ADAM),
    *(("online", name) for name in ON_STATISTICS),
]
MORE_PAIRS = [(run, name) for run in RUNS for name in ESTIMATORS if (run, name) not in PAIRS]
# 21 examples: neither batches of 4 nor two processes divide them.
BATCH = 4


class WithoutTask(Plain):
    """Attributed through its own training step, whose log of batches is not wanted."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.net(batch[0]) - batch[1]).square().mean()


class Squares(AttributionTask):
    """Its losses: no standard one is called, so that single examples' are not known."""

    def train_loss(self, module: Any, batch: Any) -> Any:
        return (module.net(batch[0]) - batch[1]).square().mean(1)


class MeanSquares(AttributionTask):
    """The same by a standard loss: products with the Gauss-Newton matrix need its outputs, TRAK
    the residual."""

    def train_loss(self, module: Any, batch: Any) -> Any:
        return F.mse_loss(module.net(batch[0]), batch[1], reduction="none").mean(1)


def attribute(run: Path | Ensemble, estimator: Any, trainer: Any, **options: Any) -> Scores:
    task: AttributionTask | None = None
    if isinstance(estimator, Unrolled):
        task = Squares()
    elif estimator in (ESTIMATORS[name] for name in BY_STANDARD_LOSS):
        task = MeanSquares()
    attribution = AttributionModule(WithoutTask(), run, estimator, task)
    options.setdefault("self_influence", True)
    return attribution.attribute(
        Numbered(21), Numbered(3, seed=1), batch_size=BATCH, trainer=trainer, **options
    )


def record(rank: int, root: Path) -> None:
    for run, options in RUNS.items():
        train(root / run, {"module": WithoutTask, **options})


def score(rank: int, root: Path, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    """Scores, what was fitted anew and warnings; the trajectories are in ``root``."""
    found = {}
    for run, name in pairs:
        path = root / f"{run} {name}.h5"
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            trainer = quiet(strategy="ddp", devices=2)
            scores = attribute(root / run, by_rank(name, rank), trainer, scores_path=str(path))
        saved = Scores.load(path)  # there for every process at once
        assert torch.equal(saved.values, scores.values)
        kept = [str(w.message) for w in heard if "not kept" in str(w.message)]
        parts = (scores.values, scores.by_segment, scores.self_influence)
        found[run, name] = (*parts, scores.provenance["world_size"], kept)
    return found


def by_rank(name: str, rank: int) -> Any:
    """Only the first process lacks room for all queries at once: processes have to agree."""
    return Unrolled() if name == "unrolled in rounds" and rank else ESTIMATORS[name]


def record_and_score(rank: int, root: Path) -> dict[tuple[str, str], Any]:
    record(rank, root)
    found = score(rank, root, PAIRS)
    both = attribute(both_runs(root), ESTIMATORS["trak"], quiet(strategy="ddp", devices=2))
    found["both", "trak"] = both.values, both.members, both.self_influence
    return found


def both_runs(root: Path) -> Ensemble:
    return Ensemble([root / "sgd", root / "adamw"])


@pytest.fixture(scope="module")
def scored(tmp_path_factory: Any) -> tuple[Path, list[Any]]:
    root = tmp_path_factory.mktemp("scored")
    return root, results(record_and_score, root)


@pytest.fixture(scope="module")
def scored_too(scored: Any) -> tuple[Path, list[Any]]:
    return scored[0], results(score, scored[0], MORE_PAIRS)


@pytest.mark.parametrize(("run", "name"), PAIRS)
def test_scores_are_those_of_one_process(run: str, name: str, scored: Any, tmp_path: Path) -> None:
    require_those_of_one_process(run, name, *scored, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("run", "name"), MORE_PAIRS)
def test_more_scores_are_those_of_one_process(
    run: str, name: str, scored_too: Any, tmp_path: Path
) -> None:
    require_those_of_one_process(run, name, *scored_too, tmp_path)


def require_those_of_one_process(
    run: str, name: str, root: Path, found: list[Any], tmp_path: Path
) -> None:
    shutil.copytree(root / run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "curvature", ignore_errors=True)
    expected = attribute(tmp_path / "run", ESTIMATORS[name], quiet())
    unfitted = (
        name in ("tracin", "trak", "source products", "influence lissa") or "unrolled" in name
    )
    uses = run == "online" and not unfitted
    assert ("statistics" in expected.provenance) == uses
    for each in found:
        values, by_segment, own, world_size, not_kept = each[run, name]
        assert relative(values, expected.values.double()) < 1e-5
        if by_segment is not None:
            for part, segment in zip(by_segment, expected.by_segment, strict=True):
                assert relative(part, segment.double()) < 1e-5
        if own is not None:
            assert relative(own, expected.self_influence.double()) < 1e-5
        assert world_size == 2 and not not_kept


def test_an_ensembles_own_average_is_that_of_one_process(scored: Any) -> None:
    root, found = scored
    expected = attribute(both_runs(root), ESTIMATORS["trak"], quiet())
    for each in found:
        values, members, own = each["both", "trak"]
        assert relative(values, expected.values.double()) < 1e-5
        assert relative(members, expected.members.double()) < 1e-5
        assert relative(own, expected.self_influence.double()) < 1e-5


def test_curvature_is_kept_once_and_whole(scored: Any) -> None:
    root, _ = scored
    files = sorted(p.name for p in (root / "sgd" / "curvature").iterdir())
    assert files and all(name.endswith(".h5") for name in files)


@pytest.mark.parametrize("run", ["sgd", "adamw"])
def test_unrolled_is_what_two_processes_trained(run: str, scored: Any) -> None:
    """Against retraining with one example weighted a little more or less."""
    folder, found = scored[0] / run, scored[1][0][run, "unrolled"][0]
    run, task, ends = Trajectory.load(str(folder)), Squares(), []
    for sign in (1, -1):
        weights = torch.ones(21)
        weights[3] += sign * 0.02
        state = retrain(run, WithoutTask(), task, Numbered(21), weights)
        ends.append(measure(WithoutTask(), task, state, Numbered(3, seed=1)))
    assert relative(found[:, 3], -(ends[0] - ends[1]).double() / 0.04) < 0.01


class Drops(WithoutTask):
    """Draws that each process made for itself are not known."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = torch.nn.functional.dropout(batch[0], 0.2, self.training)
        return torch.nn.functional.mse_loss(self.net(x), batch[1])


def test_draws_of_two_processes_are_not_unrolled(tmp_path: Path) -> None:
    results(lambda rank: train(tmp_path / "run", {"module": Drops}) and None)
    attribution = AttributionModule(Drops(), str(tmp_path / "run"), Unrolled())
    with pytest.raises(UnsupportedTrainingError, match="in one process"):
        attribution.attribute(Numbered(21), Numbered(2, seed=1), trainer=quiet())


def test_plans_that_differ_are_an_error_in_every_process(scored: Any) -> None:
    def work(rank: int) -> None:
        attribute(
            scored[0] / "sgd",
            Source(2, seed=5 + rank, leading_directions=4 * rank),
            quiet(strategy="ddp", devices=2),
        )

    for outcome in outcomes(work):
        assert isinstance(outcome.error, RuntimeError), outcome.trace
        assert "is about to walk" in str(outcome.error) and "expected the same" in str(
            outcome.error
        )


def test_a_taken_scores_file_is_refused_in_every_process(scored: Any) -> None:
    def work(rank: int) -> None:
        path = str(scored[0] / "sgd tracin.h5")
        options = {"strategy": "ddp", "devices": 2}
        attribute(scored[0] / "sgd", TracIn(), quiet(**options))
        attribute(scored[0] / "sgd", TracIn(), quiet(**options), scores_path=path)

    for outcome in outcomes(work):
        assert isinstance(outcome.error, FileExistsError), outcome.trace


def score_sharded(rank: int, root: Path) -> list[Any]:
    """Scores under FSDP, as torch has it on the CPU."""
    parts = []
    for name in ("source", "unrolled"):
        trainer = quiet(strategy=OnTheCPU(auto_wrap_policy={torch.nn.Linear}), devices=2)
        scores = attribute(root / "adamw", ESTIMATORS[name], trainer)
        parts.append((name, scores.values, scores.self_influence))
    return parts


def test_fsdp_scores_are_those_of_one_process(scored: Any) -> None:
    root, _ = scored
    for parts in results(score_sharded, root):
        for name, values, own in parts:
            alone = attribute(root / "adamw", ESTIMATORS[name], quiet())
            assert relative(values, alone.values) < 1e-5
            if own is not None:
                assert relative(own, alone.self_influence) < 1e-5


AT_HALF = [(run, name) for run in ("sgd", "adamw") for name in ("source", "tracin", "unrolled")]


def score_at_half(rank: int, root: Path) -> list[Any]:
    """Scores in a what-if run, which one process trains and both read."""
    trainer = {"strategy": "ddp", "devices": 2}
    return [
        attribute(root / run, ESTIMATORS[name], quiet(**trainer), keep=0.5).values
        for run, name in AT_HALF
    ]


@pytest.mark.slow
def test_what_if_runs_are_those_of_one_process(scored: Any, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for run in ("sgd", "adamw"):
        shutil.copytree(scored[0] / run, root / run)
    found = results(score_at_half, root)
    for run in ("sgd", "adamw"):
        assert len([*(root / run / "what_if").iterdir()]) == 2  # one for each of the two tasks
    for each in found:
        for (run, name), values in zip(AT_HALF, each, strict=True):
            alone = attribute(scored[0] / run, ESTIMATORS[name], quiet(), keep=0.5)
            assert relative(values, alone.values.double()) < 1e-5
            whole = scored[1][0][run, name][0]
            assert relative(values, whole.double()) > 1e-3  # another question than that


SCRIPT = """
import sys, torch
from pathlib import Path
from tests.attribution.test_processes_scoring import WithoutTask, attribute
from tests.attributing import quiet
from tests.recording.test_processes import train
from tda_lightning.estimators import Source

torch.set_num_threads(1)
train(Path("run"), {"module": WithoutTask})
attribute(Path("run"), Source(2), quiet(strategy="ddp", devices=2), scores_path="scores.h5")
"""


def test_as_a_script(tmp_path: Path) -> None:
    """Lightning starts the second process by running the script again."""
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    script = Script(tmp_path / "script.py", folder=tmp_path, **environment)
    status, _, errors = script.end()
    assert status == 0, errors
    expected = attribute(tmp_path / "run", Source(2), quiet())
    found = Scores.load(tmp_path / "scores.h5")
    assert relative(found.values, expected.values.double()) < 1e-5
    assert found.provenance["world_size"] == 2
