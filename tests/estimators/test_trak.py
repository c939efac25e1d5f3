"""TRAK against the paper's formula with dense gradients and an explicit projection matrix."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule, Ensemble, Scores
from tda_lightning.edits import Addition, Relabel, Removal
from tda_lightning.estimators import TRAK, InfluenceFunction
from tda_lightning.estimators.projection import Projection
from tda_lightning.gradients import Block, GradientEngine, Outer
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.tasks import (
    AttributionTask,
    ClassificationTask,
    RegressionTask,
    TrainingStepTask,
)
from tda_lightning.tasks.model_output import ModelOutput, NoModelOutputError
from tests import oracles
from tests.attributing import CaseTask, attribute, in_float32, quiet, relative
from tests.cases import CASES
from tests.cases.case import Case
from tests.cases.tasks import STEPS, TASKS, built, flat_gradient, task_case
from tests.cases.training import CLASSIFIER, LINEAR, MLP, OPTIMIZERS, queries_of, train

NAMED = {case.name: case for case in CASES}
NETWORKS = {
    "mlp": CLASSIFIER,
    "mlp, squared error": MLP,
    "convolution": NAMED["conv/network"],
    "positions": NAMED["linear/positions_classification"],
    "recurrent": NAMED["lstm/classifier"],
    "attention": NAMED["transformer/language_model_batch_is_time"],
    "shared": NAMED["shared/called_three_times"],
    "tied": NAMED["tied/head_read_from_embedding"],
}
TRAINED, DIMENSION = 10, 4
OUTPUTS = [name for name in TASKS if name not in ("weighted", "soft", "margin")]
STEP_OUTPUTS = [name for name in STEPS if name not in ("smoothing", "probabilities", "two losses")]


@dataclasses.dataclass
class Work:
    """Three runs of a case that differ in the order of their batches."""

    case: Case
    runs: list[Trajectory]
    module: nn.Module
    data: tuple[Tensor, Tensor]

    @property
    def task(self) -> CaseTask:
        return CaseTask(self.case.kind)

    def attribute(self, run: Any, estimator: Any, **options: Any) -> Scores:
        task = options.pop("task", self.task)
        attribution = AttributionModule(self.module, run, estimator, task)
        queries = TensorDataset(*queries_of(self.case))
        return attribution.attribute(TensorDataset(*self.data), queries, 4, quiet(), **options)

    @functools.cached_property
    def blocks(self) -> list[Block]:
        engine = GradientEngine(self.module, list(self.runs[0].facts.parameters))
        engine.discover(
            lambda module, batch, _: self.task.train_loss(module, batch),
            self.data,
            torch.arange(TRAINED),
        )
        return engine.blocks

    def projection(self, seed: int, dimension: int = DIMENSION) -> Tensor:
        """The directions as one matrix, [parameters, dimension]."""
        facts = self.runs[0].facts.parameters
        count = sum(torch.Size(fact.shape).numel() for fact in facts.values())
        drawn = Projection.drawn(self.blocks, dimension, seed, torch.device("cpu"), torch.float64)
        sizes = [torch.Size(fact.shape).numel() for fact in facts.values()]
        units = torch.eye(count, dtype=torch.float64).split(sizes, dim=1)
        named = {
            name: unit.unflatten(1, facts[name].shape)
            for name, unit in zip(facts, units, strict=True)
        }
        if drawn.sides is None:
            return torch.eye(count, dtype=torch.float64)
        parts = [
            torch.einsum("pgrc,grk,gck->pk", block.matrix(named), *drawn.sides[block.name])
            for block in self.blocks
        ]
        return torch.stack(parts).sum(0)

    @functools.cached_property
    def trained(self) -> list[oracles.Features]:
        return self.features(self.data)

    @functools.cached_property
    def asked(self) -> list[oracles.Features]:
        return self.features(queries_of(self.case))

    def features(self, data: tuple[Tensor, Tensor]) -> list[oracles.Features]:
        return [
            oracles.features(
                self.case.kind,
                oracles.with_state(self.module, run.checkpoints[run.last_step]),
                data,
                list(run.facts.parameters),
            )
            for run in self.runs
        ]

    def expected(self, members: slice, **options: Any) -> Tensor:
        chosen = range(3)[members]
        matrices = [self.projection(number) for number in chosen]
        return oracles.trak(self.trained[members], self.asked[members], matrices, **options)


def work_of(case: Case, optimizer: str = "sgd") -> Work:
    batches = oracles.cut_batches(TRAINED, 4, epochs=2)
    orders = [batches, batches[::-1], batches[1:] + batches[:1]]
    trained = [train(case, OPTIMIZERS[optimizer], batches=order) for order in orders]
    return Work(case, [run for run, *_ in trained], *trained[0][1:])


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_of_runs_and_of_their_ensemble(name: str) -> None:
    work = work_of(NETWORKS[name])
    estimator = TRAK(projection_dimension=DIMENSION)
    alone = work.attribute(work.runs[0], estimator)
    assert relative(alone.values, work.expected(slice(0, 1))) < 1e-9
    together = work.attribute(Ensemble(work.runs), estimator)
    expected = work.expected(slice(None))
    assert relative(together.values, expected) < 1e-9
    for number in range(3):
        own = work.expected(slice(number, number + 1))
        assert relative(together.member(number).values, own) < 1e-9
    # It is no mean over the members.
    assert relative(together.members.mean(0), expected) > 1e-4
    assert relative(together.spread, together.members.std(0) / 3**0.5) < 1e-9


@pytest.fixture(scope="module")
def classifier() -> Work:
    return work_of(CLASSIFIER)


def test_self_influence_is_that_of_the_examples_as_queries(classifier: Work) -> None:
    for run in (classifier.runs[0], Ensemble(classifier.runs)):
        for task in (classifier.task, CaseTask("classification", margin=True)):
            data = TensorDataset(*classifier.data)
            module = AttributionModule(classifier.module, run, TRAK(DIMENSION), task)
            scores = module.attribute(data, data, 4, quiet())
            assert relative(scores.self_influence, scores.values.diagonal()) < 1e-9


def test_a_measurement_that_is_no_loss_is_taken_as_it_is(classifier: Work) -> None:
    task = CaseTask("classification", margin=True)
    scores = classifier.attribute(classifier.runs[1], TRAK(DIMENSION), task=task)
    run, matrix = classifier.runs[1], classifier.projection(0)
    (trained,) = classifier.trained[1:2]
    gradients = oracles.checkpoint_gradients(
        run, classifier.module, task.measurement, queries_of(CLASSIFIER), [run.last_step]
    )
    asked = oracles.Features(gradients[run.last_step], torch.ones(3, dtype=torch.float64))
    assert relative(scores.values, oracles.trak([trained], [asked], [matrix])) < 1e-9


def test_the_papers_unit_is_that_of_the_margin(classifier: Work) -> None:
    """With minus the log-odds for a measurement, scores are the paper's own."""
    task = ClassificationTask(measure="margin")
    scores = classifier.attribute(Ensemble(classifier.runs), TRAK(DIMENSION), task=task)
    queries = [
        oracles.Features(own.gradients, torch.full_like(own.slopes, -1)) for own in classifier.asked
    ]
    matrices = [classifier.projection(number) for number in range(3)]
    expected = oracles.trak(classifier.trained, queries, matrices)
    assert relative(scores.values, expected) < 1e-9


def test_damping_is_relative_to_the_mean_eigenvalue(classifier: Work) -> None:
    scores = classifier.attribute(Ensemble(classifier.runs), TRAK(DIMENSION, relative_damping=0.3))
    assert relative(scores.values, classifier.expected(slice(None), damping=0.3)) < 1e-9


def test_examples_count_as_often_as_they_were_drawn() -> None:
    uneven = [[[0, 1, 2, 0]], [[3, 4, 5, 6]], [[7, 8, 0, 0]]]  # and 9 never
    run, module, data = train(CLASSIFIER, OPTIMIZERS["sgd"], batches=uneven)
    run = dataclasses.replace(
        run, steps=dataclasses.replace(run.steps, epoch=torch.zeros(3, dtype=torch.int64))
    )
    work = Work(CLASSIFIER, [run], module, data)
    weights = oracles.drawn_weights(run, 0, 3, TRAINED)
    assert weights[9] == 0 and weights.max() > 2
    scores = work.attribute(run, TRAK(DIMENSION))
    expected = oracles.trak(
        work.trained,
        work.asked,
        [work.projection(0)],
        weights=[weights],
        uses=[weights],
    )
    assert relative(scores.values, expected) < 1e-9
    assert (scores.values[:, 9] == 0).all()


@pytest.mark.parametrize("draws", [0, 2])
def test_what_if_runs_count_examples_by_their_weights(draws: int, classifier: Work) -> None:
    """Models trained on random subsets are put together as the paper's are."""
    run = dataclasses.replace(classifier.runs[0], what_if={})
    scores = classifier.attribute(run, TRAK(3), keep=0.6, draws=draws)
    work = dataclasses.replace(classifier, runs=list(run.what_if.values()))
    expected = oracles.trak(
        work.trained,
        work.asked,
        [work.projection(number, 3) for number in range(max(1, draws))],
        weights=[own.data_weights for own in work.runs],
        uses=[torch.ones(TRAINED)] * len(work.runs),
    )
    assert relative(scores.values, expected) < 1e-9
    if draws:
        with pytest.raises(ValueError, match="examples that count, 6, got 7"):
            classifier.attribute(run, TRAK(7), keep=0.6, draws=draws)


def test_edits_of_an_ensemble(classifier: Work) -> None:
    ensemble, estimator = Ensemble(classifier.runs), TRAK(DIMENSION)
    removals = classifier.attribute(ensemble, estimator)
    label = 1 - int(classifier.data[1][3])
    added = Addition((classifier.data[0][3], torch.tensor(label)))
    edits = [Removal(4), Relabel(3, label), Removal(0), Removal(3), added]
    scores = classifier.attribute(ensemble, estimator, edits=edits)
    assert relative(scores.values[:, [0, 2, 3]], removals.values[:, [4, 0, 3]]) < 1e-12
    # The gradient before minus the one after; the regression stays that of the training set.
    changed = (classifier.data[0], classifier.data[1].clone())
    changed[1][3] = label
    before, after = (classifier.features(data) for data in (classifier.data, changed))
    queries = classifier.asked
    matrices = [classifier.projection(number) for number in range(3)]
    kernels = []
    for own, other, asked, matrix in zip(before, after, queries, matrices, strict=True):
        projected = own.gradients @ matrix
        solved = torch.linalg.inv(projected.T @ projected)
        pair = torch.stack([own.gradients[3], other.gradients[3]]) @ matrix
        kernels.append(asked.gradients @ matrix @ solved @ pair.T)
    kernel = torch.stack(kernels).mean(0)
    slopes = [torch.stack([x.slopes[3] for x in some]).mean() for some in (before, after)]
    query = torch.stack([own.slopes for own in queries]).mean(0)
    expected = query * (kernel[:, 0] * slopes[0] - kernel[:, 1] * slopes[1])
    assert relative(scores.values[:, 1], expected) < 1e-9
    assert relative(scores.values[:, 4], -query * kernel[:, 1] * slopes[1]) < 1e-9


def test_more_directions_come_closer_to_no_projection() -> None:
    """As many as the gradients span: nothing is lost, whatever the directions."""
    case = dataclasses.replace(CLASSIFIER, size=80)
    module, data = case.build(), case.batch(80)
    batches = oracles.cut_batches(80, 8, epochs=2)
    run = oracles.record_run(module, case.loss, data, OPTIMIZERS["sgd"], batches, ())

    def scores(dimension: int, seed: int = 0) -> Tensor:
        estimator = TRAK(dimension, seed=seed)
        return attribute(case, run, module, data, estimator, batch_size=80).values

    whole = scores(1000)
    own = oracles.features(
        "classification",
        oracles.with_state(module, run.checkpoints[run.last_step]),
        data,
        list(run.facts.parameters),
    )
    # Logits that all move do not count: 20 parameters, of which the head's 8 are 4 in effect.
    rank = int(torch.linalg.matrix_rank(own.gradients))
    assert rank == 16 < own.gradients.shape[1]
    for dimension in (16, 18):
        assert relative(scores(dimension), whole) < 1e-6
    errors = [
        sum(relative(scores(dimension, seed), whole) for seed in range(2)) / 2
        for dimension in (4, 9, 15)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.5 > 0.3 > errors[-1]


def test_without_projection_squared_errors_of_a_linear_model_have_their_influence() -> None:
    """The residual has second derivative 1: one Newton step is the undamped influence function."""
    case = dataclasses.replace(LINEAR, name="one output", factory=lambda: nn.Linear(3, 1))
    run, module, data = train(case, OPTIMIZERS["sgd"])
    trak = attribute(case, run, module, data, TRAK(projection_dimension=10))
    influence = attribute(case, run, module, data, InfluenceFunction("exact", damping=0.0))
    assert relative(trak.values, influence.values) < 1e-9
    assert relative(trak.self_influence, influence.self_influence) < 1e-9


def test_directions_are_isotropic_and_their_variance_is_as_stated() -> None:
    """Mean outer product the identity; the variance of a squared norm is 8 / K times its square
    for one outer product, and between that and 2 / K for a sum of them."""
    block, count, seeds = Block("layer", ("layer.weight",), ((6, 5),)), 25, 400

    def outer(inputs: Tensor, outputs: Tensor) -> dict[str, Outer]:
        return {"layer": Outer(inputs.double()[:, None].__getitem__, outputs.double()[:, None], 5)}

    torch.manual_seed(0)
    single = outer(torch.randn(1, 1, 5), torch.randn(1, 1, 6))
    several = outer(torch.randn(1, 9, 5), torch.randn(1, 9, 6))
    units = outer(torch.eye(5).repeat(6, 1)[:, None], torch.eye(6).repeat_interleave(5, 0)[:, None])
    sizes = [float(own["layer"].dense(slice(None)).square().sum()) for own in (single, several)]
    moments, squares = torch.zeros(30, 30).double(), []
    for seed in range(seeds):
        drawn = Projection.drawn([block], count, seed, torch.device("cpu"), torch.float64)
        coordinates = drawn.coordinates(units)
        moments += coordinates @ coordinates.T / seeds
        squares.append(
            [
                float(drawn.coordinates(own).square().sum()) / size
                for own, size in zip((single, several), sizes, strict=True)
            ]
        )
    # Of 10,000 directions: an entry of the mean has a standard error of 1% to 3%.
    assert (moments - torch.eye(30)).abs().max() < 0.12
    norms = torch.tensor(squares)
    assert (norms.mean(0) - 1).abs().max() < 4 * (8 / count / seeds) ** 0.5
    alone, together = (norms.var(0) * count).tolist()
    assert 6 < alone < 10
    assert 2 < together < 6


class TestModelOutput:
    """What the loss of an example is a function of."""

    @pytest.mark.parametrize("name", [*OUTPUTS, *(f"step: {name}" for name in STEP_OUTPUTS)])
    def test_the_loss_moves_by_its_slope_times_the_output(self, name: str) -> None:
        if name.startswith("step: "):
            task: AttributionTask = TrainingStepTask()
            module, batch = built(name.removeprefix("step: "))
        else:
            task, module, batch = task_case(name)
        losses = task.train_loss(module, batch)
        made = task.model_output(module, batch)
        assert made.values.shape == made.slopes.shape == losses.shape
        assert not made.slopes.requires_grad
        for loss, value, slope in zip(losses, made.values, made.slopes, strict=True):
            gradient = flat_gradient(loss, module)
            moved = slope * flat_gradient(value, module)
            assert (moved - gradient).norm() < 1e-9 * (gradient.norm() + 1e-9)

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("smoothing", "probabilities or smoothed"),
            ("probabilities", "probabilities or smoothed"),
            ("two losses", "adds squared errors"),
        ],
    )
    def test_no_output(self, name: str, why: str) -> None:
        module, batch = built(name)
        with pytest.raises(NoModelOutputError, match=f"{why}.*use InfluenceFunction or Source"):
            TrainingStepTask().model_output(module, batch)

    def test_a_factor_of_the_loss_changes_no_effect(self) -> None:
        """It moves no optimum: scores change as the measurement does, by the factor once."""
        work = work_of(MLP)
        once, thrice = (
            work.attribute(work.runs[0], TRAK(DIMENSION), task=task)
            for task in (RegressionTask(), RegressionTask(scale=3.0))
        )
        assert relative(thrice.values, 3 * once.values) < 1e-9
        work = work_of(NAMED["linear/positions_classification"])

        class Moved(nn.Sequential):
            def forward(self, inputs: Tensor) -> Tensor:
                return super().forward(inputs).movedim(-1, 1)

        work.module = Moved(*work.module)
        even = [ClassificationTask(class_weights=[w] * 3) for w in (1.0, 3.0)]
        once, thrice = (work.attribute(work.runs[0], TRAK(DIMENSION), task=t) for t in even)
        assert relative(thrice.values, 3 * once.values) < 1e-9

    def test_a_sure_model_keeps_its_digits(self) -> None:
        """In float32 a probability is 1 from a margin of 17 on, and its loss's gradient 0."""
        logits = torch.tensor([[30.0, 0.0, -1.0], [0.0, 12.0, 11.0]], requires_grad=True)

        class Fixed(nn.Module):
            def forward(self, rows: Tensor) -> Tensor:
                return logits[rows]

        labels = torch.tensor([0, 1])
        made = ClassificationTask().model_output(Fixed(), (torch.arange(2), labels))
        others = torch.tensor([[0.0, -1.0], [0.0, 11.0]]).double().logsumexp(1)
        margins = torch.tensor([30.0, 12.0]).double() - others
        assert relative(made.values.detach(), margins) < 1e-6
        slopes = -1 / (1 + margins.exp())
        assert ((made.slopes - slopes).abs() < 1e-6 * slopes.abs()).all()
        (gradient,) = torch.autograd.grad(made.values[0], logits, retain_graph=True)
        assert float(gradient[0, 0]) == 1


class OwnOutput(AttributionTask):
    """A loss that torch has no function for, with its output."""

    factor = 1.0

    def train_loss(self, module: nn.Module, batch: Any) -> Tensor:
        return torch.cosh(module(batch[0])[:, 0] - batch[1][:, 0]).log()

    def model_output(self, module: nn.Module, batch: Any) -> ModelOutput:
        values = module(batch[0])[:, 0] - batch[1][:, 0]
        return ModelOutput(values, self.factor * torch.tanh(values.detach()))


class OwnLoss(AttributionTask):
    def train_loss(self, module: nn.Module, batch: Any) -> Tensor:
        return torch.cosh(module(batch[0])[:, 0] - batch[1][:, 0]).log()


@pytest.fixture(scope="module")
def work() -> Work:
    return work_of(MLP)


class TestOwnTasks:
    def test_an_output_of_ones_own(self, work: Work) -> None:
        scores = work.attribute(work.runs[0], TRAK(DIMENSION), task=OwnOutput())
        run, task = work.runs[0], OwnOutput()
        sides = []
        for data in (work.data, queries_of(MLP)):
            module = oracles.with_state(work.module, run.checkpoints[run.last_step])
            made = task.model_output(module, data)
            rows = [flat_gradient(value, module) for value in made.values]
            sides.append(oracles.Features(torch.stack(rows), made.slopes))
        expected = oracles.trak([sides[0]], [sides[1]], [work.projection(0)])
        assert relative(scores.values, expected) < 1e-9

    def test_a_wrong_derivative_is_refused(self, work: Work) -> None:
        task = OwnOutput()
        task.factor = -1.0
        with pytest.raises(ValueError, match="not a function of the output that OwnOutput"):
            work.attribute(work.runs[0], TRAK(DIMENSION), task=task)

    def test_a_loss_without_one_is_refused(self, work: Work) -> None:
        with pytest.raises(ValueError, match="no standard loss.*Give a task that has model_output"):
            work.attribute(work.runs[0], TRAK(DIMENSION), task=OwnLoss())

    def test_a_training_step_needs_no_task(self, work: Work) -> None:
        class Stepping(nn.Sequential):
            def training_step(self, batch: Any, _: int) -> Tensor:
                return F.mse_loss(self(batch[0]), batch[1])

        module = Stepping(*work.module)
        attribution = AttributionModule(module, work.runs[0], TRAK(DIMENSION), TrainingStepTask())
        queries = TensorDataset(*queries_of(MLP))
        scores = attribution.attribute(TensorDataset(*work.data), queries, 4, quiet())
        assert relative(scores.values, work.expected(slice(0, 1))) < 1e-9


def test_the_default_is_a_sixteenth_of_the_examples_that_count() -> None:
    data = MLP.batch(70)
    module = MLP.build()
    batches = oracles.cut_batches(70, 10, epochs=1)
    run = oracles.record_run(module, MLP.loss, data, OPTIMIZERS["sgd"], batches, ())
    for options, dimension in (({}, 4), ({"keep": 0.5, "draws": 1}, 2)):
        made = attribute(MLP, run, module, data, TRAK(), batch_size=70, **options).provenance
        assert made["projection"]["dimension"] == dimension


class TestBadInput:
    @pytest.mark.parametrize("dimension", [0, -3])
    def test_no_directions(self, dimension: int) -> None:
        with pytest.raises(ValueError, match=f"at least 1, got {dimension}"):
            TRAK(projection_dimension=dimension)

    def test_negative_damping(self) -> None:
        with pytest.raises(ValueError, match="must not be negative, got -1"):
            TRAK(relative_damping=-1.0)

    def test_more_directions_than_examples(self, classifier: Work) -> None:
        with pytest.raises(ValueError, match="training examples that count, 10, got 11"):
            classifier.attribute(classifier.runs[0], TRAK(11))
        scores = classifier.attribute(classifier.runs[0], TRAK(11, relative_damping=0.1))
        assert scores.values.isfinite().all()

    def test_examples_that_do_not_span_a_query(self) -> None:
        """Ten times the same two examples."""
        case = CLASSIFIER
        module = case.build()
        data = tuple(part[:2].repeat(5, *[1] * (part.dim() - 1)) for part in case.batch(10))
        batches = oracles.cut_batches(10, 4, epochs=1)
        run = oracles.record_run(module, case.loss, data, OPTIMIZERS["sgd"], batches, ())
        with pytest.raises(ValueError, match="span 2 of 4 dimensions, and query 0 .*of 2 at most"):
            attribute(case, run, module, data, TRAK(4))
        assert attribute(case, run, module, data, TRAK(2)).values.isfinite().all()
        # Those that it spans can be asked about, and their effects; not that of another example.
        inside = (data[0][:2], data[1][:2])
        asked = attribute(case, run, module, data, TRAK(4), queries=inside)
        assert (
            relative(
                asked.values, attribute(case, run, module, data, TRAK(2), queries=inside).values
            )
            < 1e-6
        )
        edits = [Removal(0), Addition((data[0][0] + 1, data[1][0]))]
        with pytest.raises(ValueError, match="span 2 of 4 dimensions, and column 1 has a part"):
            attribute(case, run, module, data, TRAK(4), queries=inside, edits=edits)

    def test_means_over_noise(self) -> None:
        class Noisy(AttributionTask):
            def train_loss(self, module: nn.Module, batch: Any) -> Tensor:
                outputs = module(batch[0] + 0.1 * torch.randn_like(batch[0]))
                return F.mse_loss(outputs, batch[1], reduction="none").mean(1)

        work = work_of(MLP)
        scores = work.attribute(work.runs[0], TRAK(DIMENSION), task=Noisy())
        assert scores.values.isfinite().all()
        with pytest.raises(ValueError, match="mean over 2 draws of noise is none"):
            work.attribute(work.runs[0], TRAK(DIMENSION), task=Noisy(), draws=2)


def test_float32_and_what_the_provenance_says(classifier: Work) -> None:
    run, data = classifier.runs[0], classifier.data
    exact = attribute(CLASSIFIER, run, classifier.module, data, TRAK(DIMENSION))
    projection = exact.provenance["projection"]
    assert projection["dimension"] == projection["rank"] == DIMENSION
    assert exact.provenance["sizes"].startswith("ranks only")
    single, module, (data, queries) = in_float32(
        run, CLASSIFIER.build(), data, queries_of(CLASSIFIER)
    )
    rounded = attribute(CLASSIFIER, single, module, data, TRAK(DIMENSION), queries=queries)
    assert rounded.values.dtype == torch.float32
    assert relative(rounded.values, exact.values) < 1e-3
