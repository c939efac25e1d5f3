"""Multi-stage influence functions against the dense formulas of the paper's two cases."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule, Scores
from tda_lightning.estimators import InfluenceFunction, MultiStageInfluence
from tda_lightning.examples.models.gpt import GPT
from tda_lightning.records.errors import UnsupportedTrainingError
from tests import oracles
from tests.attributing import CaseTask, quiet, relative
from tests.cases.case import Case, normal, tokens
from tests.estimators.test_stages import DIFFERENT, OPTIMIZERS, Problem, Trained, problem
from tests.oracles.curvature import gauss_newton
from tests.oracles.draws import drawn_weights
from tests.oracles.gradients import flatten, num_examples, per_example_gradients, with_state
from tests.oracles.stages import TrainedStage, frozen_names
from tests.processes import results

DAMPING, ALPHA = 0.05, 0.3
EXACT = MultiStageInfluence(curvature="exact", damping=DAMPING, proximity=ALPHA)


def dense(work: Problem, coupled: bool = True) -> Tensor:
    """Both theorems of the paper in dense matrices, stage by stage, in the project's unit."""
    asked: dict[str, Tensor] = {}
    columns = []
    for number in reversed(range(len(work.stages))):
        stage = work.stages[number]
        module = end(stage)
        trained, frozen = stage.trained, frozen_names(work.stages, number)
        names = [*trained, *frozen]
        if number == len(work.stages) - 1:
            asked = per_example_gradients(module, stage.loss, work.queries, names)
        own = {name: p.shape for name, p in module.named_parameters()}
        count = num_examples(work.queries)
        q = {
            name: asked.get(name, torch.zeros(count, *own[name], dtype=torch.float64))
            for name in names
        }
        last = stage.trajectory.last_step
        used = drawn_weights(stage.trajectory, 0, last, num_examples(stage.data))
        matrix = gauss_newton(module, stage.criterion, stage.data, names, used)
        size = sum(own[name].numel() for name in trained)
        carried = handed_on(work.stages, number)
        sizes = torch.tensor([own[name].numel() for name in trained])
        pulled = torch.tensor([ALPHA * (name in carried) for name in trained], dtype=torch.float64)
        pull = pulled.repeat_interleave(sizes)
        decay = float(stage.trajectory.steps.hyperparameters["weight_decay"][-1, 0])
        shifted = matrix[:size, :size] + torch.diag(pull + decay + DAMPING)
        u = torch.linalg.solve(shifted, flatten(q, trained).T).T
        gradients = flatten(per_example_gradients(module, stage.loss, stage.data, trained), trained)
        columns.append(u @ gradients.T * used / len(gradients))
        asked = {}
        place = 0
        for name in trained:
            part = u[:, place : place + own[name].numel()].unflatten(1, own[name])
            place += own[name].numel()
            if name in carried:
                asked[name] = ALPHA * part
        others = u @ matrix[:size, size:]
        place = 0
        for name in frozen:
            part = others[:, place : place + own[name].numel()].unflatten(1, own[name])
            place += own[name].numel()
            asked[name] = q[name] - part if coupled else q[name]
    return torch.cat(columns[::-1], 1)


def end(stage: TrainedStage):
    last = stage.trajectory.checkpoints[stage.trajectory.last_step]
    return with_state(stage.module, last).requires_grad_()


def handed_on(stages: list[TrainedStage], number: int) -> set[str]:
    """What stage ``number`` took over from the stage before it."""
    if number == 0:
        return set()
    before, own = (dict(s.module.named_parameters()) for s in stages[number - 1 : number + 1])
    return {n for n in own if n in before and own[n].shape == before[n].shape}


def last_alone(work: Problem, estimator: object) -> Scores:
    stage = work.stages[-1]
    attribution = AttributionModule(stage.module, stage.trajectory, estimator, work.tasks[-1])
    return attribution.attribute(
        TensorDataset(*stage.data), TensorDataset(*work.queries), batch_size=4, trainer=quiet()
    )


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", ["sgd", "decay", "adamw"])
def test_both_cases_are_the_dense_formula(name: str, frozen: bool) -> None:
    """A tanh network, a new head, another loss, another N, mini-batches."""
    work = problem(optimizers=(OPTIMIZERS[name], OPTIMIZERS[name]), frozen=frozen, batches=4)
    found = work.scores(EXACT)
    truth = dense(work)
    assert truth[:, :10].abs().max() > 1e-4
    assert relative(found.values, truth) < 1e-8
    assert found.by_segment.shape == (2, 3, 16)
    assert found.by_segment[0, :, 10:].abs().max() == 0
    assert found.provenance["proximity"] == [None, None if frozen else ALPHA]
    if frozen:
        assert relative(dense(work, coupled=False)[:, :10], truth[:, :10]) > 0.05


# Other networks, of which stage 2 has other data


class Tied(nn.Module):
    """Predicts the next of a few tokens by the table that embeds them."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
        self.table = nn.Embedding(5, 3)
        self.table.weight = self.head.weight

    def forward(self, numbers: Tensor) -> Tensor:
        hidden = self.table(numbers)
        return self.head(self.mix(hidden.cumsum(1)).tanh())


def _convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def _sequence() -> nn.Module:
    return GPT(5, 4, width=4, depth=1, heads=2)


NETWORKS = {
    "convolution": (
        Case("convolution", _convolution, normal(1, 4, 4), "classification"),
        ("0", "1"),
    ),
    "sequence": (Case("sequence", _sequence, tokens(5, 3), "classification"), ("tokens", "blocks")),
    "tied": (Case("tied", Tied, tokens(5, 3), "classification"), ("head",)),
}


def of_network(name: str, optimizer: str, frozen: bool) -> Problem:
    """Both stages of one network; ``frozen``: stage 2 leaves its trunk as it is."""
    case, trunk = NETWORKS[name]
    module = case.build()
    stages = []
    for number, size in enumerate((9, 6)):
        if stages:
            before = stages[-1].trajectory
            module = with_state(case.build(), before.checkpoints[before.last_step])
            for parameter_name, parameter in module.named_parameters():
                parameter.requires_grad_(not (frozen and parameter_name.startswith(trunk)))
        data = case.batch(size, seed=number)
        order = oracles.cut_batches(size, 3, epochs=2, seed=number)
        run = oracles.record_run(
            module, case.loss, data, lambda m: OPTIMIZERS[optimizer](Trained(m)), order, (2,)
        )
        stages.append(TrainedStage(run, module, case.criterion, data))
    return Problem(stages, [CaseTask(case.kind) for _ in stages], case.batch(3, seed=9))


QUICK = [("convolution", "sgd", True), ("tied", "adamw", True)]


@pytest.mark.parametrize(
    ("name", "optimizer", "frozen"),
    [
        pytest.param(*work, marks=() if work in QUICK else pytest.mark.slow)
        for work in itertools.product(NETWORKS, ("sgd", "adamw"), (True, False))
    ],
)
def test_other_networks(name: str, optimizer: str, frozen: bool) -> None:
    work = of_network(name, optimizer, frozen)
    found, truth = work.scores(EXACT), dense(work)
    assert truth[:, :9].abs().max() > 1e-5
    assert relative(found.values, truth) < 1e-8
    assert relative(found.values[:, :9], truth[:, :9]) < 1e-8


def score_in_each(rank: int) -> dict[bool, Tensor]:
    found = {}
    for frozen in (True, False):
        work = problem(frozen=frozen, batches=4)
        found[frozen] = work.scores(EXACT, quiet(devices=2, strategy="ddp")).values
    return found


@pytest.mark.slow
def test_two_processes() -> None:
    both = results(score_in_each)
    for frozen in (True, False):
        expected = problem(frozen=frozen, batches=4).scores(EXACT).values
        for found in both:
            torch.testing.assert_close(found[frozen], expected)


def test_three_stages() -> None:
    work = problem((*DIFFERENT, (5, 2, "regression", 4)), (OPTIMIZERS["sgd"],) * 3, frozen=False)
    assert relative(work.scores(EXACT).values, dense(work)) < 1e-8


def test_a_frozen_trunk_is_followed_by_autograd() -> None:
    """Two linear branches: autograd through both Newton steps, the second one's as a function of
    where the first one left the trunk."""
    work = problem(
        ((10, 2, "regression", 8), (6, 1, "regression", 6)), linear=True, checkpoints=range
    )
    first, second = work.stages
    w1 = torch.ones(10, dtype=torch.float64, requires_grad=True)

    def solved(stage: TrainedStage, weights: Tensor, fixed: Tensor | None) -> Tensor:
        """Of least squares with a ridge of DAMPING around the recorded end, one Newton step away
        from it; ``fixed``: the frozen trunk, as it moved."""
        module, names = end(stage), stage.trained
        others = [n for n, _ in module.named_parameters() if n not in names]
        matrix = gauss_newton(module, stage.criterion, stage.data, [*names, *others])
        size = sum(dict(module.named_parameters())[n].numel() for n in names)
        rows = flatten(per_example_gradients(module, stage.loss, stage.data, names), names)
        slope = (weights - 1) @ rows / len(rows)
        if fixed is not None:
            slope = slope + matrix[:size, size:] @ fixed
        h = matrix[:size, :size] + DAMPING * torch.eye(size, dtype=torch.float64)
        return -torch.linalg.solve(h, slope)

    moved_first = solved(first, w1, None)
    trunk = sum(p.numel() for n, p in first.module.named_parameters() if n.startswith("trunk"))
    names = first.trained
    order = torch.cat(
        [
            torch.full((dict(first.module.named_parameters())[n].numel(),), n.startswith("trunk"))
            for n in names
        ]
    ).bool()
    fixed = moved_first[order]
    assert fixed.numel() == trunk
    moved_second = solved(second, torch.ones(6, dtype=torch.float64), fixed)
    last = end(second)
    q = per_example_gradients(
        last, second.loss, work.queries, [n for n, _ in last.named_parameters()]
    )
    frozen = [n for n in q if n.startswith("trunk")]
    change = flatten(q, second.trained) @ moved_second + flatten(q, frozen) @ fixed
    rows = [torch.autograd.grad(m, w1, retain_graph=True)[0] for m in change]
    truth = -torch.stack(rows)
    found = work.scores(MultiStageInfluence(curvature="exact", damping=DAMPING))
    assert relative(found.values[:, :10], truth) < 1e-9


@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diagonal", "identity"])
def test_other_curvatures_and_the_last_stage(curvature: str) -> None:
    """The last stage's own examples are influence functions, with alpha as damping."""
    work = problem(frozen=True, batches=4)
    found = work.scores(MultiStageInfluence(curvature=curvature, damping=DAMPING, seed=1))
    expected = last_alone(work, InfluenceFunction(curvature=curvature, damping=DAMPING, seed=1))
    assert relative(found.values[:, 10:], expected.values) < 1e-9
    assert found.values[:, :10].abs().max() > 1e-5


def test_alpha_by_default_is_one_over_the_time_of_gradient_descent() -> None:
    work = problem(frozen=False)
    found = work.scores(MultiStageInfluence(curvature="exact", damping=DAMPING))
    time = float(work.stages[1].trajectory.steps.learning_rate.sum())
    asked = work.scores(MultiStageInfluence(curvature="exact", damping=DAMPING, proximity=1 / time))
    assert found.provenance["proximity"][1] == pytest.approx(1 / time)
    assert torch.equal(found.values, asked.values)
    adam = problem(optimizers=(OPTIMIZERS["adamw"],) * 2, frozen=False)
    with pytest.raises(UnsupportedTrainingError, match="Give proximity"):
        adam.scores(MultiStageInfluence(curvature="exact", damping=DAMPING))


def test_one_stage_and_impossible_settings_are_refused() -> None:
    work = problem()
    with pytest.raises(UnsupportedTrainingError, match="use InfluenceFunction"):
        last_alone(work, MultiStageInfluence())
    with pytest.raises(ValueError, match="proximity must be positive"):
        MultiStageInfluence(proximity=0.0)
