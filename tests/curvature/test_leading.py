"""Leading directions across layers in front of block-wise curvature, against dense matrices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tda_lightning.curvature import leading
from tda_lightning.curvature.fit import WHOLE
from tda_lightning.estimators import Source
from tda_lightning.estimators.source.estimator import alone
from tda_lightning.gradients import Joined, scaled
from tda_lightning.records.provenance import Provenance
from tda_lightning.session.session import Session
from tests import oracles
from tests.attributing import attribute, relative
from tests.cases import Case
from tests.cases.case import normal, tokens
from tests.cases.training import CLASSIFIER, OPTIMIZERS, everything, train
from tests.sampled import CASES as BLOCKWISE
from tests.sampled import SEED, oracle_curvature, sampled_gradients


def embedded() -> nn.Module:
    return nn.Sequential(nn.Embedding(6, 3), nn.Tanh(), nn.Linear(3, 4))


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 2))


EMBEDDING = Case("leading/embedding", embedded, tokens(6, 4), "classification")
CASES = {**BLOCKWISE, "embedding": EMBEDDING}
CHECKPOINTS = (2, 5)


class Directions(NamedTuple):
    """Leading directions on the parameters."""

    vectors: Tensor
    eigenvalues: Tensor
    held: float


class Probe:
    """An estimator that fits SOURCE's curvature and keeps it to be looked at."""

    def __init__(self, **options) -> None:
        self.options = Source(1, seed=SEED, **options)

    def segment_count(self, context: Session) -> None:
        return None

    def score(self, session: Session) -> Provenance:
        (self.segment,) = self.options.fit(alone(session), 1).segments
        return {}

    @property
    def leading(self) -> Directions:
        spectrum = self.segment.curvature[WHOLE]
        return Directions(spectrum.vectors, spectrum.leading.eigenvalues, spectrum.leading.held)

    def order(self, run) -> Tensor:
        """The flat place of each entry of the row that joins all blocks."""
        shapes = {name: torch.Size(fact.shape) for name, fact in run.facts.parameters.items()}
        places = torch.arange(sum(s.numel() for s in shapes.values())).split(
            [shape.numel() for shape in shapes.values()]
        )
        named = {n: p.view(s) for (n, s), p in zip(shapes.items(), places, strict=True)}
        return torch.cat([block.matrix(named).flatten() for block in self.segment.session.blocks])


def probed(name: str, optimizer: str, checkpoints=CHECKPOINTS, **options):
    """A run with its fitted curvature, and what it was fitted on."""
    case = CASES[name]
    run, module, data = train(case, OPTIMIZERS[optimizer], checkpoints=checkpoints)
    probe = Probe(**options)
    attribute(case, run, module, data, probe)
    return probe, (case, run, module, data)


def dense_fisher(probe: Probe, case, run, module, data) -> Tensor:
    """The sampled Fisher of h * g, in the order of the joined blocks."""
    checkpoints = probe.segment.steps.checkpoints
    gradients = sampled_gradients(case, run, module, data, checkpoints)
    gradients = gradients[:, probe.order(run)]
    if (scale := probe.segment.geometry.scale.get(WHOLE)) is not None:
        gradients = gradients * scale.flatten()
    return oracles.second_moment(gradients)


@pytest.mark.parametrize(
    ("name", "optimizer"), [*((name, "momentum") for name in CASES), ("regression", "adamw")]
)
def test_leading_eigenpairs(name, optimizer) -> None:
    """All of them where the matrix has no more; the largest where it has."""
    for count in (6, 10):
        probe, work = probed(name, optimizer, leading_directions=count)
        fisher, fit = dense_fisher(probe, *work), probe.leading
        values, vectors = (part.flip(-1) for part in torch.linalg.eigh(fisher))
        torch.testing.assert_close(fit.vectors @ fit.vectors.T, torch.eye(count).double())
        torch.testing.assert_close(fit.eigenvalues, values[:count], rtol=1e-9, atol=1e-12)
        apart = values[:count] > 1.01 * values[1 : count + 1]
        apart[1:] &= values[: count - 1] > 1.01 * values[1:count]
        overlaps = (fit.vectors * vectors[:, :count].T).sum(1).square()
        assert apart.any()
        torch.testing.assert_close(overlaps[apart], torch.ones_like(overlaps[apart]))


def test_more_directions_than_there_are_have_no_curvature() -> None:
    probe, work = probed("classification", "momentum", checkpoints=(), leading_directions=14)
    fisher, fit = dense_fisher(probe, *work), probe.leading
    product = fit.vectors.T * fit.eigenvalues @ fit.vectors
    assert relative(product, fisher) < 1e-9  # ten examples, so at most rank ten
    there = fit.eigenvalues > 0
    assert 0 < there.sum() <= 10 < len(there) == 14
    assert not fit.vectors[~there].any()


@pytest.mark.parametrize(
    ("name", "optimizer"), [("classification", "momentum"), ("regression", "adamw")]
)
def test_eigenpairs_by_iteration(name, optimizer, monkeypatch) -> None:
    """Where inner products of all examples would be too many."""
    monkeypatch.setattr(leading, "_DECOMPOSED", 0)
    probe, work = probed(name, optimizer, checkpoints=(), leading_directions=10)
    fisher, fit = dense_fisher(probe, *work), probe.leading
    product = fit.vectors.T * fit.eigenvalues @ fit.vectors
    assert relative(product, fisher) < 1e-9  # ten examples, so rank ten
    probe, work = probed(name, optimizer, leading_directions=6)
    fisher, fit = dense_fisher(probe, *work), probe.leading
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(fisher))
    torch.testing.assert_close(fit.vectors @ fit.vectors.T, torch.eye(6).double())
    assert (fit.eigenvalues.diff() <= 0).all()
    # Rayleigh's quotients lie below the eigenvalues. Two rounds of power iteration bring them as
    # close as the fourth power of the ratio to what is left out, times what the start misses.
    left_out = 50 * (values[6] / values[:6]) ** 4
    errors = 1 - fit.eigenvalues / values[:6]
    assert (errors > -1e-9).all()
    assert (errors < left_out).all()
    apart = left_out < 0.05
    apart &= values[:6] > 1.3 * values[1:7]
    apart[1:] &= values[:5] > 1.3 * values[1:6]
    overlaps = (fit.vectors * vectors[:, :6].T).sum(1).square()
    assert apart.any()
    assert (1 - overlaps[apart] < 0.02).all()


@pytest.mark.parametrize("decomposed", [0, 4096])
def test_samples_of_a_large_training_set(decomposed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directions of samples lie close to those of all examples; what they hold of the whole
    curvature is measured in examples that they were not fitted to."""
    monkeypatch.setattr(leading, "_DECOMPOSED", decomposed)
    case = CASES["regression"]
    data = case.batch(600, 0)
    module = case.build()
    batches = oracles.cut_batches(600, 100, epochs=1)
    run = oracles.record_run(module, case.loss, data, OPTIMIZERS["sgd"], batches, (3, 6))
    probe = Probe(leading_directions=4)
    attribute(case, run, module, data, probe, batch_size=50)
    fisher = dense_fisher(probe, case, run, module, data)
    values = torch.linalg.eigvalsh(fisher).flip(0)
    fit = probe.leading
    captured = torch.einsum("kp,pq,kq->", fit.vectors, fisher, fit.vectors)
    assert 0.8 < float(captured / values[:4].sum()) <= 1 + 1e-9
    assert 0.6 < fit.held <= 1
    # Of the eigenvalues, measured elsewhere, the sum is right but for chance.
    assert float(fit.eigenvalues.sum() / captured) == pytest.approx(1, abs=0.25)
    drawn: list[int] = []
    gradients = Session.fisher_gradients

    def counted(self: Session, batch: Any, examples: Tensor, seed: int) -> Any:
        drawn.append(len(examples))
        return gradients(self, batch, examples, seed)

    monkeypatch.setattr(Session, "fisher_gradients", counted)
    attribute(case, run, module, data, Source(2, leading_directions=4), batch_size=50)
    # The blocks of two checkpoints, whose walks leave the gradients of both samples; by iteration
    # two samples, and two rounds over the first in the first segment.
    samples = 0 if decomposed else 3 + 2
    assert sum(drawn) == 2 * 600 + samples * 16 * 4
    drawn.clear()
    attribute(case, run, module, data, Source(2, leading_directions=4), batch_size=50)
    assert not drawn  # kept


def test_inner_products_by_factors_are_those_of_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenvalues in the second sample, whichever takes fewer operations."""
    case = Case("leading/wide", wide, normal(40))
    module, data = case.build(), case.batch(200, 0)
    batches = oracles.cut_batches(200, 50, epochs=1)
    run = oracles.record_run(module, case.loss, data, OPTIMIZERS["sgd"], batches, (2, 4))
    found = []
    for cost in (leading.pair_cost, lambda gradient: 10**9):
        monkeypatch.setattr(leading, "pair_cost", cost)
        run.curvature.clear()
        probe = Probe(leading_directions=4)
        attribute(case, run, module, data, probe, batch_size=50)
        found.append(probe.leading)
    combined = [one.vectors.T * one.eigenvalues @ one.vectors for one in found]
    assert relative(*combined) < 1e-9
    assert found[0].held == pytest.approx(found[1].held, rel=1e-9)


def dense_basis(spectrum) -> Tensor:
    """U of all blocks, [parameters, parameters]."""
    squares = []
    for rest in spectrum.rest:
        groups, rows, columns = rest.eigenvalues.shape
        for group in range(groups):
            left = torch.eye(rows).double() if rest.left is None else rest.left[group]
            right = torch.eye(columns).double() if rest.right is None else rest.right[group]
            squares.append(torch.kron(left.contiguous(), right.contiguous()))
    return torch.block_diag(*squares)


def test_eigenvectors_are_not_those_of_the_blocks() -> None:
    probe = probed("classification", "momentum", leading_directions=3)[0]
    widths = [block.size for block in probe.segment.session.blocks]
    shares = torch.stack([p.square().sum(1) for p in probe.leading.vectors.split(widths, dim=1)])
    assert (shares[:, 0] > 0.02).all()


@pytest.mark.parametrize(
    ("name", "optimizer", "kind"),
    [
        *(("regression", name, "ekfac") for name in ("decay", "groups", "adamw", "adam")),
        *((name, "decay", "ekfac") for name in ("convolutions", "sequence", "embedding")),
        ("convolutions", "adam", "ekfac"),
        ("embedding", "adamw", "kfac"),
        ("sequence", "adam", "diagonal"),
    ],
)
def test_deflated_curvature(name, optimizer, kind) -> None:
    probe, (*_, data) = probed(name, optimizer, leading_directions=5, curvature=kind)
    segment = probe.segment
    spectrum, shifted = segment.curvature[WHOLE], segment.spectra[WHOLE]
    size = spectrum.vectors.shape[1]
    rows = torch.randn(3, 1, 1, size).double()
    torch.testing.assert_close(spectrum.lift(spectrum.project(rows)), rows)

    vectors, basis = spectrum.vectors, dense_basis(spectrum)
    leading = vectors.T * probe.leading.eigenvalues @ vectors
    own = torch.cat([rest.eigenvalues.flatten() for rest in spectrum.rest])
    left = (own - (basis.T @ leading @ basis).diagonal()).clamp(min=0)
    outside = torch.eye(size).double() - vectors.T @ vectors
    expected = leading + outside @ (basis * left @ basis.T) @ outside

    def action(curvature, rows: Tensor) -> Tensor:
        lifted = curvature.lift(curvature.eigenvalues * curvature.project(rows))
        assert lifted.shape == rows.shape
        return lifted[:, 0, 0]

    torch.testing.assert_close(action(spectrum, rows), rows[:, 0, 0] @ expected)
    decay = segment.geometry.decay[WHOLE].flatten()
    assert (decay > 0).any()
    along = vectors.T * (vectors.square() @ decay) @ vectors
    rest = basis * (basis.square().T @ decay) @ basis.T
    added = expected + along + outside @ rest @ outside
    torch.testing.assert_close(action(shifted, rows), rows[:, 0, 0] @ added)
    if optimizer in ("decay", "adamw"):
        uniform = expected + decay[0] * torch.eye(size).double()
        torch.testing.assert_close(action(shifted, rows), rows[:, 0, 0] @ uniform)

    found = segment.session.train_gradients(data, torch.arange(10)).blocks
    joined = Joined(list(found.values()))
    scale = segment.geometry.scale.get(WHOLE)
    for gradient in (joined, scaled(joined, scale)):
        for part in (slice(0, 10), slice(2, 5)):
            torch.testing.assert_close(
                spectrum.coordinates(gradient, part), spectrum.project(gradient.dense(part))
            )


@pytest.mark.parametrize("optimizer", ["decay", "momentum", "adamw"])
@pytest.mark.parametrize("name", ["regression", "sequence"])
def test_all_directions_are_the_dense_matrix(name, optimizer) -> None:
    case = CASES[name]
    run, module, data = train(case, OPTIMIZERS[optimizer], checkpoints=CHECKPOINTS)
    segments, _, gradients, query = everything(case, run, module, data, [3])
    matrices = [
        oracles.second_moment(sampled_gradients(case, run, module, data, segment.checkpoints))
        for segment in segments
    ]
    work = (run, segments, matrices, gradients, query)
    options = {"segment_steps": [3], "leading_directions": 10**9, "seed": SEED}
    scores = attribute(case, run, module, data, Source(**options))
    assert relative(scores.by_segment, oracles.source_average(*work)) < 1e-7
    assert scores.provenance["leading_directions"] == len(matrices[0])
    if optimizer != "adamw":
        expected = oracles.source_recorded(*work, weights=oracles.interpolated(run.checkpoints))
        recorded = Source(order="recorded", **options)
        scores = attribute(case, run, module, data, recorded, batch_size=3)
        assert relative(scores.by_segment, expected) < 1e-7


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adamw_groups"])
def test_all_directions_follow_the_recorded_order_as_the_exact_matrix_does(
    optimizer, monkeypatch
) -> None:
    """The same sampled Fisher as one dense matrix."""

    def sampled(context: Session, batch, examples):
        return [context.fisher_gradients(batch, examples, SEED + context.loaded_step)]

    run, module, data = train(CLASSIFIER, OPTIMIZERS[optimizer], checkpoints=CHECKPOINTS)
    options = {"segment_steps": [3], "order": "recorded", "seed": SEED}
    work = (CLASSIFIER, run, module, data)
    found = attribute(*work, Source(leading_directions=10**9, **options))
    monkeypatch.setattr(Session, "gauss_newton_gradients", sampled)
    expected = attribute(*work, Source(curvature="exact", **options))
    assert relative(found.by_segment, expected.by_segment) < 1e-7


@pytest.mark.parametrize("name", ["classification", "sequence"])
def test_no_directions_are_the_blocks_alone_on_the_recorded_order(name) -> None:
    case = CASES[name]
    run, module, data = train(case, OPTIMIZERS["momentum"], checkpoints=CHECKPOINTS)
    segments, _, gradients, query = everything(case, run, module, data, [3])
    matrices = [
        oracle_curvature(case, run, module, data, segment.checkpoints, "ekfac")
        for segment in segments
    ]
    expected = oracles.source_recorded(
        run, segments, matrices, gradients, query, oracles.interpolated(run.checkpoints)
    )
    estimator = Source(segment_steps=[3], order="recorded", leading_directions=0, seed=SEED)
    scores = attribute(case, run, module, data, estimator)
    assert relative(scores.by_segment, expected) < 1e-5
    assert scores.provenance["leading_directions"] == 0


def deep() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(),
        nn.Linear(6, 2),
    )  # fmt: skip


@pytest.mark.parametrize("order", ["average", "recorded"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_few_directions_come_close_to_the_exact_matrix(optimizer, order) -> None:
    case = Case("leading/deep", deep, normal(4))
    module, data = case.build(), case.batch(48)
    batches = oracles.cut_batches(48, 8, epochs=10)
    run = oracles.record_run(
        module, case.loss, data, OPTIMIZERS[optimizer], batches, range(0, 61, 15)
    )
    exact, alone, led = (
        attribute(case, run, module, data, Source(2, order=order, **options), batch_size=48).values
        for options in (
            {"curvature": "exact"},
            {"leading_directions": 0},
            {"leading_directions": 16},
        )
    )
    errors = [relative(scores, exact) for scores in (alone, led)]
    assert errors[1] < 0.5 * errors[0]


def planned(size: int, segments: int = 3, **options) -> int:
    trajectory = SimpleNamespace(
        statistics={},
        stages=lambda: (trajectory,),
        facts=SimpleNamespace(parameters={}),
    )
    session = SimpleNamespace(num_parameters=size, trajectory=trajectory)
    return Source(**options).leading(session, segments)


def test_how_many_directions_are_kept() -> None:
    assert planned(40) == 40
    assert planned(999) == 64
    assert planned(1000) == 64
    assert planned(1000, curvature="kfac") == planned(1000, curvature="diagonal") == 64
    assert planned(999, order="recorded") == 64
    for curvature in ("exact", "identity"):
        assert planned(10**6, curvature=curvature) == 0
        assert planned(10**6, curvature=curvature, order="recorded") == 0
    # At most 2^28 scalars over all segments, and none where fewer than 8 would fit.
    assert planned(2**21, segments=4) == 32
    assert planned(2**23, segments=4) == 8
    assert planned(2**23, segments=5) == 0
    assert planned(2**23, segments=5, order="recorded") == 0
    assert planned(100, leading_directions=7) == 7
    assert planned(10**6, leading_directions=0) == 0


def test_impossible_settings() -> None:
    for options in (
        {"leading_directions": -1},
        {"leading_directions": 3, "curvature": "exact"},
        {"leading_directions": 3, "curvature": "identity"},
    ):
        with pytest.raises(ValueError, match="leading_directions must not be negative, and goes"):
            Source(**options)
    assert Source(leading_directions=0, curvature="exact").leading_directions == 0


@pytest.mark.parametrize("order", ["average", "recorded"])
def test_directions_are_kept_with_the_trajectory(order, monkeypatch) -> None:
    run, module, data = train(CLASSIFIER, OPTIMIZERS["adamw"], checkpoints=CHECKPOINTS)
    estimator = Source(2, order=order, leading_directions=4)
    work = (CLASSIFIER, run, module, data)
    first = attribute(*work, estimator)
    kept = dict(run.curvature)
    assert sum("vectors" in tensors for tensors in kept.values()) == 2
    assert len(kept) == 4
    # Another number is another fit; the blocks are shared.
    attribute(*work, Source(2, order=order, leading_directions=3))
    assert len(run.curvature) == 6
    attribute(*work, Source(2, order=order, leading_directions=4, seed=1))
    assert len(run.curvature) == 10

    def fitted_again(*_):
        raise AssertionError("curvature was fitted although it had been kept")

    monkeypatch.setattr(Session, "fisher_gradients", fitted_again)
    assert torch.equal(attribute(*work, estimator).values, first.values)


@pytest.mark.parametrize("optimizer", ["momentum", "groups", "adamw"])
@pytest.mark.parametrize("name", ["regression", "classification"])
def test_self_influence_is_the_diagonal(name, optimizer) -> None:
    case = CASES[name]
    run, module, data = train(case, OPTIMIZERS[optimizer], checkpoints=CHECKPOINTS)
    estimators = [Source(2, leading_directions=5)]
    if optimizer == "momentum":
        estimators += [
            Source(2, leading_directions=5, order="recorded"),
            Source(2, leading_directions=5, momentum="recursion"),
        ]
    for estimator in estimators:
        scores = attribute(case, run, module, data, estimator, queries=data, batch_size=3)
        torch.testing.assert_close(scores.self_influence, scores.values.diagonal())
