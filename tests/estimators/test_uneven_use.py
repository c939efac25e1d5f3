"""Examples that were drawn more often than others, or never."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset, WeightedRandomSampler

from tda_lightning import AttributionModule, Trajectory, TrajectoryRecorder
from tda_lightning.edits import Addition, Removal, Replace
from tda_lightning.estimators import FastInfluence, InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.records.example_use import draw_counts, example_weights
from tda_lightning.solvers import ASTRA, ConjugateGradients, DataInf, Direct, Lanczos, LiSSA
from tests import oracles
from tests.attributing import attribute, relative
from tests.cases.case import Case, normal
from tests.cases.training import CLASSIFIER, MLP, OPTIMIZERS, everything, queries_of
from tests.oracles.estimators import spread
from tests.quick import quick
from tests.runs import trainer

# One output: the signs that stand for sampled labels then have no part in curvature.
ONE = Case(
    "one output", lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), normal(3)
)
SIZE = 10


@dataclasses.dataclass
class Drawn:
    """What each epoch drew, cut into batches; the last ``cut`` of them are not trained on."""

    epochs: list[list[int]]
    size: int = 4
    cut: int = 0

    @property
    def steps(self) -> list[tuple[int, list[int]]]:
        rows = [
            (number, order[at : at + self.size])
            for number, order in enumerate(self.epochs)
            for at in range(0, len(order), self.size)
        ]
        return rows[: len(rows) - self.cut]

    def record(
        self, case: Case, module: nn.Module, data: tuple[Tensor, Tensor], optimizer: str
    ) -> Trajectory:
        """A run with checkpoints that cut epochs."""
        batches = [[batch] for _, batch in self.steps]
        run = oracles.record_run(module, case.loss, data, OPTIMIZERS[optimizer], batches, (2, 3, 5))
        epoch = torch.tensor([number for number, _ in self.steps])
        return dataclasses.replace(run, steps=dataclasses.replace(run.steps, epoch=epoch))


def _shuffled(*drawn: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [[own[i] for i in torch.randperm(len(own), generator=generator)] for own in drawn]


ALL = list(range(SIZE))
USES = {
    "with replacement": Drawn(
        torch.randint(SIZE, (4, 12), generator=torch.Generator().manual_seed(3)).tolist()
    ),
    "some never": Drawn(_shuffled(*[ALL[:8]] * 3)),
    "first epoch of few": Drawn(_shuffled(ALL[:4], ALL, ALL[2:])),
    "stopped in mid-epoch": Drawn(_shuffled(*[ALL] * 3), cut=2),
    "some repeated": Drawn(_shuffled(*[[*ALL, 0, 0, 3, 3, 3, 7]] * 2)),
    "twice in a batch": Drawn([[0, 0, 1, 2, 0], [0, 0, 3, 4, 1], [5, 5, 5, 5, 6]] * 2, size=5),
}


def run_of(
    case: Case, drawn: Drawn, optimizer: str = "momentum"
) -> tuple[Trajectory, nn.Module, tuple[Tensor, Tensor]]:
    module, data = case.build(), case.batch(SIZE)
    return drawn.record(case, module, data, optimizer), module, data


@pytest.mark.parametrize("name", USES)
def test_counts_are_those_of_a_plain_loop(name) -> None:
    run, _, _ = run_of(MLP, USES[name])
    drawn = [n for _, batch in USES[name].steps for n in batch]
    counts = draw_counts(run, SIZE)
    assert counts is not None and counts.tolist() == [drawn.count(n) for n in range(SIZE)]
    for span in ((0, run.last_step), (0, 2), (2, 3), (1, run.last_step)):
        weights = example_weights(run, *span, SIZE, lambda size: 1 / size)
        expected = oracles.drawn_weights(run, *span, SIZE)
        weights = torch.ones(SIZE, dtype=torch.float64) if weights is None else weights
        torch.testing.assert_close(weights, expected)
        assert float(weights.mean()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "optimizer"), [*((name, "momentum") for name in USES), ("some never", "adamw")]
)
def test_dense_formulas_of_the_risk_as_drawn(name, optimizer) -> None:
    """Gradients and curvature by example, weighted by how often each was drawn in the interval or
    segment that a checkpoint stands for."""
    run, module, data = run_of(CLASSIFIER, USES[name], optimizer)
    case, last = CLASSIFIER, run.last_step
    steps = [step for step in sorted(run.checkpoints) if step]
    gradients = oracles.checkpoint_gradients(run, module, case.loss, data, steps)
    queries = oracles.checkpoint_gradients(run, module, case.loss, queries_of(case), steps)
    scores = attribute(case, run, module, data, TracIn())
    assert relative(scores.by_segment, oracles.tracin(run, gradients, queries)) < 1e-9

    estimator = Source(segment_steps=[2], curvature="exact")
    work = everything(case, run, module, data, [2])
    scores = attribute(case, run, module, data, estimator)
    assert relative(scores.by_segment, oracles.source_average(run, *work)) < 1e-9

    whole = oracles.drawn_weights(run, 0, last, SIZE)
    names = list(run.facts.parameters)
    at_end = oracles.with_state(module, run.checkpoints[last])
    matrix = oracles.gauss_newton(at_end, case.criterion, data, names, whole)
    decay = spread(run, run.steps.hyperparameters["weight_decay"][-1])
    expected = oracles.influence(matrix, decay, 0.1, gradients[last], queries[last]) * whole
    scores = attribute(case, run, module, data, InfluenceFunction("exact", damping=0.1))
    assert relative(scores.values, expected) < 1e-9
    never = whole == 0
    assert bool((scores.values[:, never] == 0).all())
    assert bool((scores.self_influence[never] == 0).all())


COPIED = [0, 0, 0, 1, 2, 2, 3, 5, 6, 7, 7, 8]  # 4 and 9 never
SOLVED = {"damping": 0.3}
ESTIMATORS: dict[str, Any] = {
    "tracin": TracIn(),
    "influence exact": InfluenceFunction("exact"),
    "influence ekfac": InfluenceFunction(),
    "influence kfac": InfluenceFunction("kfac"),
    "influence diagonal": InfluenceFunction("diagonal"),
    "influence identity": InfluenceFunction("identity"),
    "influence limited rank": InfluenceFunction("kfac", dense_side=2),
    "direct": InfluenceFunction(solver=Direct()),
    "direct hessian": InfluenceFunction(solver=Direct("hessian"), damping=1.0),
    "cg": InfluenceFunction(solver=ConjugateGradients(), **SOLVED),
    "lissa": InfluenceFunction(solver=LiSSA(scale=3.0, batch=12, depth=40), **SOLVED),
    "lanczos": InfluenceFunction(solver=Lanczos(), **SOLVED),
    "astra": InfluenceFunction(solver=ASTRA(iterations=30, batch=12, step=1.0), **SOLVED),
    "datainf": InfluenceFunction(solver=DataInf()),
    "fastif": FastInfluence(k=SIZE),
    "source exact": Source(2, curvature="exact"),
    "source ekfac": Source(2),
    "source leading": Source(2, leading_directions=3),
    "source kfac": Source(2, curvature="kfac"),
    "source diagonal": Source(2, curvature="diagonal"),
    "source matrix free": Source(2, curvature="matrix_free"),
    "source recursion": Source(2, momentum="recursion"),
    "source recorded": Source(2, order="recorded"),
}


ADAM = ("tracin", "influence ekfac", "source exact", "source ekfac", "source leading")


# Another curvature weighs its examples in the same lines.
ALIKE = ("influence kfac", "influence identity", "direct hessian", "source kfac", "source diagonal")
UNDER_MOMENTUM = [(name, "momentum") for name in ESTIMATORS]
UNDER_ADAM = [(name, "adamw") for name in ADAM]


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        *quick(UNDER_MOMENTUM, [case for case in UNDER_MOMENTUM if case[0] not in ALIKE]),
        *quick(UNDER_ADAM, [("source exact", "adamw"), ("source leading", "adamw")]),
    ],
)
def test_to_be_drawn_twice_is_to_stand_there_twice(name, optimizer) -> None:
    """The same training on a data set that holds each example as often as it is drawn, once an
    epoch: the score of an example is the sum of its copies' scores."""
    estimator = ESTIMATORS[name]
    positions = _shuffled(*[list(range(len(COPIED)))] * 3)
    inputs, targets = ONE.batch(SIZE)
    drawn = Drawn([[COPIED[place] for place in own] for own in positions], size=6)
    single, module, data = run_of(ONE, drawn, optimizer)
    copies = (inputs[COPIED], targets[COPIED])
    copied = Drawn(positions, size=6).record(ONE, module, copies, optimizer)
    if isinstance(estimator, FastInfluence):
        estimator_of_copies: Any = FastInfluence(k=len(COPIED))
    else:
        estimator_of_copies = estimator
    found = attribute(ONE, single, module, data, estimator, batch_size=12)
    apart = attribute(ONE, copied, module, copies, estimator_of_copies, batch_size=12)
    expected = torch.zeros_like(found.values)
    expected.index_add_(1, torch.tensor(COPIED), apart.values)
    # Solvers that stop at a tolerance, and random batches in another order.
    loose = name in ("lissa", "astra", "cg", "source matrix free", "influence limited rank")
    assert relative(found.values, expected) < (0.02 if loose else 1e-9)
    never = [n for n in range(SIZE) if n not in COPIED]
    assert bool((found.values[:, never] == 0).all())
    if found.self_influence is None:
        return
    own = torch.zeros(SIZE, dtype=torch.float64)
    own.index_add_(0, torch.tensor(COPIED), apart.self_influence)
    assert relative(found.self_influence, own) < 1e-9
    # "Self-influence likewise": the response of a use to itself, once for each use.
    assert bool((found.self_influence[never] == 0).all())


def test_edits_count_as_often_as_what_they_change() -> None:
    run, module, data = run_of(MLP, USES["some repeated"])
    counts = draw_counts(run, SIZE)
    assert counts is not None
    other = tuple(tensor[5] for tensor in data)
    edits = [Removal(3), Replace(3, other), Removal(5), Addition(other)]
    for estimator in (TracIn(), InfluenceFunction(), Source(2)):
        scores = attribute(MLP, run, module, data, estimator, edits=edits).values
        removed, replaced, there, added = scores.unbind(1)
        everything_removed = attribute(MLP, run, module, data, estimator).values
        torch.testing.assert_close(removed, everything_removed[:, 3])
        # As often as the example that stood there; a new one as often as an average one.
        each, mean = there / counts[5], counts.double().mean()
        torch.testing.assert_close(replaced, removed - each * counts[3])
        torch.testing.assert_close(added, -each * mean)


def test_even_use_changes_no_bit_and_needs_no_note() -> None:
    """Checkpoints and segments that cut an epoch count all of it: its order is averaged out."""
    for case, size in ((MLP, 4), (CLASSIFIER, 5)):
        run, module, data = run_of(case, Drawn(_shuffled(*[ALL] * 3), size=size), "adamw")
        none = dataclasses.replace(run.steps, examples=run.steps.examples[:0])
        unknown = dataclasses.replace(run, steps=none, curvature={})
        for estimator in (
            TracIn(),
            InfluenceFunction(),
            Source(2),
            Source(2, leading_directions=3),
        ):
            scores = attribute(case, run, module, data, estimator)
            assumed = attribute(case, unknown, module, data, estimator)
            assert torch.equal(scores.values, assumed.values)
            assert torch.equal(scores.self_influence, assumed.self_influence)
            assert scores.provenance["notes"] == []
            (note,) = assumed.provenance["notes"]
            assert "no example indices" in note


def test_the_same_batches_of_unequal_sizes_in_every_epoch() -> None:
    """A small batch weighs its examples more each time: no matter of an order that changes."""
    run, module, data = run_of(MLP, Drawn([ALL, ALL, ALL]), "sgd")
    scores = attribute(MLP, run, module, data, TracIn())
    (note,) = scores.provenance["notes"]
    assert "0.83 to 1.7 of an even one" in note
    shares = sum(oracles.recorded_shares(run, row, SIZE) for row in range(9)) / 9
    even = attribute(MLP, dataclasses.replace(run, steps=_uncounted(run)), module, data, TracIn())
    torch.testing.assert_close(scores.values, even.values * shares * SIZE)
    truth = oracles.unrolled(run, module, MLP.loss, data, MLP.loss, queries_of(MLP))
    assert _correlation(scores.values, truth) > _correlation(even.values, truth)


def _uncounted(run: Trajectory) -> Any:
    return dataclasses.replace(run.steps, examples=run.steps.examples[:0])


def _correlation(found: Tensor, truth: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([found.flatten(), truth.flatten()]))[0, 1])


def test_curvature_of_other_draws_is_not_taken_from_the_cache() -> None:
    run, module, data = run_of(MLP, USES["some repeated"])
    cache = run.curvature
    evenly = dataclasses.replace(run, steps=_uncounted(run), curvature=cache)
    for estimator in (InfluenceFunction(), Source(2, leading_directions=3)):
        first = attribute(MLP, evenly, module, data, estimator)
        found = attribute(MLP, run, module, data, estimator)
        fresh = attribute(MLP, dataclasses.replace(run, curvature={}), module, data, estimator)
        assert torch.equal(found.values, fresh.values)
        again = attribute(MLP, evenly, module, data, estimator)
        assert torch.equal(first.values, again.values)


class Watched(LightningModule):
    """Knows which examples its steps had."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        self.had: list[list[int]] = []

    def training_step(self, batch: list[Tensor]) -> Tensor:
        if self.trainer is not None and self.training:
            self.had.append(batch[2].tolist())
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.3)


def problem(size: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    labels = (inputs[:, :3] + torch.randn(size, 3, generator=generator)).argmax(1)
    return TensorDataset(inputs, labels, torch.arange(size))


class Repeating(Sampler[int]):
    """Hard examples three times an epoch."""

    def __len__(self) -> int:
        return 24

    def __iter__(self):
        order = [n for n in range(16) for _ in range(3 if n < 4 else 1)]
        return iter([order[n] for n in torch.randperm(24).tolist()])


def _loader(size: int = 4, **options: Any) -> DataLoader:
    return DataLoader(problem(16), size, **options)


def _weighted() -> DataLoader:
    weights = torch.ones(16)
    weights[:4], weights[15] = 10, 0
    return _loader(sampler=WeightedRandomSampler(weights, 16))


LOADERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "weighted sampler": (_weighted, {}),
    "repeating sampler": (lambda: _loader(sampler=Repeating()), {}),
    "limit to batches": (_loader, {"limit_train_batches": 3}),
    "limit to a share": (lambda: _loader(shuffle=True), {"limit_train_batches": 0.5}),
    "drop_last": (lambda: _loader(5, drop_last=True), {}),
    "drop_last, shuffled": (lambda: _loader(5, drop_last=True, shuffle=True), {}),
    "max_steps": (lambda: _loader(shuffle=True), {"max_steps": 6}),
    "max_steps, first epoch": (lambda: _loader(shuffle=True), {"max_steps": 3}),
    "accumulated": (lambda: _loader(shuffle=True), {"accumulate_grad_batches": 2, "max_steps": 3}),
}


def _trained(path: Path, loader: Any, **options: Any) -> Watched:
    torch.manual_seed(0)
    module = Watched()
    recorder = TrajectoryRecorder(path, num_checkpoints=3)
    trainer(recorder, **{"max_epochs": 3, **options}).fit(module, loader())
    return module


SOME = ("weighted sampler", "limit to batches", "drop_last, shuffled", "max_steps", "accumulated")


@pytest.mark.parametrize("name", quick(LOADERS, SOME))
@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_what_a_run_never_drew_has_no_influence(name, tmp_path) -> None:
    loader, options = LOADERS[name]
    module = _trained(tmp_path / "run", loader, **options)
    run, had = Trajectory.load(tmp_path / "run"), [n for batch in module.had for n in batch]
    counts = torch.tensor([had.count(n) for n in range(16)])
    assert torch.equal(draw_counts(run, 16), counts)
    _require_zero_where_never_drawn(module, tmp_path / "run", counts)


def _require_zero_where_never_drawn(module: Watched, path: Path, counts: Tensor) -> None:
    never, train_set, query = counts == 0, problem(16), problem(24)
    for estimator in (
        TracIn(),
        InfluenceFunction(),
        Source(1),
        InfluenceFunction(solver=DataInf()),
    ):
        attribution = AttributionModule(module, str(path), estimator)
        scores = attribution.attribute(train_set, query)
        assert bool((scores.values[:, never] == 0).all())
        assert bool((scores.values[:, ~never] != 0).all())
        if scores.self_influence is not None:
            assert bool((scores.self_influence[never] == 0).all())
        said = [n for n in scores.provenance["notes"] if "more often than others" in n]
        assert len(said) == (counts.min() < counts.max())
        if said:
            assert f"{int(counts.min())} to {int(counts.max())} times" in said[0]
            assert (f"{int(never.sum())} of 16 never" in said[0]) == bool(never.any())
    truth = AttributionModule(module, str(path), Unrolled()).attribute(
        train_set, query, self_influence=False
    )
    assert bool((truth.values[:, never] == 0).all())
    assert not any("more often" in note for note in truth.provenance["notes"])


def test_a_resumed_run_counts_all_that_it_drew(tmp_path) -> None:
    torch.manual_seed(0)
    module, recorder = Watched(), {"num_checkpoints": 2}
    first = trainer(
        TrajectoryRecorder(tmp_path / "run", **recorder), max_epochs=2, limit_train_batches=2
    )
    first.fit(module, _loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    had = list(module.had)
    again = Watched()
    second = trainer(
        TrajectoryRecorder(tmp_path / "run", **recorder), max_epochs=4, limit_train_batches=3
    )
    second.fit(again, _loader(), ckpt_path=tmp_path / "last.ckpt")
    drawn = [n for batch in [*had, *again.had] for n in batch]
    counts = torch.tensor([drawn.count(n) for n in range(16)])
    assert counts.tolist() == [4] * 8 + [2] * 4 + [0] * 4
    assert torch.equal(draw_counts(Trajectory.load(tmp_path / "run"), 16), counts)
    _require_zero_where_never_drawn(again, tmp_path / "run", counts)


def test_a_stage_counts_its_own_draws(tmp_path) -> None:
    """Two fits into one folder, over other parts of the data: two stages of one training set."""
    torch.manual_seed(0)
    module = Watched()
    recorder = TrajectoryRecorder(tmp_path / "run", num_checkpoints=2)
    trainer(recorder, max_epochs=2, limit_train_batches=2).fit(module, _loader())
    runs = Trajectory.load(tmp_path / "run")
    last = trainer(TrajectoryRecorder(tmp_path / "two", num_checkpoints=2), max_epochs=2)
    last.fit(module, _loader(shuffle=True, drop_last=True))
    both = [str(tmp_path / "run"), str(tmp_path / "two")]
    sets = [problem(16), problem(16)]
    for estimator in (TracIn(), Source(1)):
        scores = AttributionModule(module, both, estimator).attribute(sets, problem(20))
        assert bool((scores.values[:, 8:16] == 0).all())
        assert bool((scores.values[:, :8] != 0).all())
        assert bool((scores.values[:, 16:] != 0).all())
        notes = scores.provenance["notes"]
        assert [n for n in notes if "8 of 16 never" in n and n.startswith("Stage 1")]
        assert not [n for n in notes if n.startswith("Stage 2") and "more often" in n]
    assert draw_counts(runs, 16).tolist() == [2] * 8 + [0] * 8


@pytest.mark.parametrize(
    "name",
    quick(["weighted sampler", "repeating sampler", "limit to batches"], ["repeating sampler"]),
)
def test_counted_scores_are_nearer_to_the_derivative_of_the_run(name, tmp_path) -> None:
    loader, options = LOADERS[name]
    module = _trained(tmp_path / "run", loader, **options, max_epochs=6)
    run = Trajectory.load(tmp_path / "run")
    uncounted = dataclasses.replace(run, steps=_uncounted(run), curvature={})

    def scores(trajectory: Trajectory, estimator: Any) -> Tensor:
        attribution = AttributionModule(module, trajectory, estimator)
        return attribution.attribute(problem(16), problem(24), self_influence=False).values

    truth = scores(run, Unrolled())
    for estimator in (TracIn(), Source(1), InfluenceFunction(damping=0.01)):
        counted, even = scores(run, estimator), scores(uncounted, estimator)
        assert _correlation(counted, truth) > _correlation(even, truth) + 0.01
