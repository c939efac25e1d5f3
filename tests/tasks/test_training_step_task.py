"""Losses of single examples from an unchanged training step."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.data import TensorDataset

from tda_lightning.records.errors import UnseenBatchError
from tda_lightning.tasks import (
    LanguageModelingTask,
    RegressionTask,
    TrainingStepTask,
    as_task,
    seeded_examples,
    silenced,
)
from tests.cases.tasks import (
    CLASSES,
    EXAMPLES,
    HOLES,
    INPUTS,
    LABELS,
    LANGUAGE,
    NUMBERS,
    PADDED,
    SERIES,
    SERIES_LABELS,
    STEPS,
    Step,
    built,
    flat_gradient,
    one,
    outer_sum,
    per_example_gradients,
    task_case,
)
from tests.standing import standing_run, tracin


@pytest.mark.parametrize("name", STEPS)
def test_intercepted_losses_average_to_the_unchanged_training_step(name):
    module, batch = built(name)
    loss = module.training_step(batch, 0)
    loss = loss["loss"] if isinstance(loss, dict) else loss
    task = TrainingStepTask()
    losses = task.train_loss(module, batch)
    assert losses.shape == (EXAMPLES,)
    torch.testing.assert_close(losses.mean(), loss)
    gradients = per_example_gradients(losses, module)
    torch.testing.assert_close(gradients.mean(0), flat_gradient(loss, module))
    # Each loss depends on its own example: the gradient to the other examples' inputs is zero.
    inputs = batch[0].clone().requires_grad_()
    losses = task.train_loss(module, (inputs, batch[1]))
    for index in range(EXAMPLES):
        (gradient,) = torch.autograd.grad(losses[index], inputs, retain_graph=True)
        gradient[index] = 0
        assert gradient.abs().max() == 0


@pytest.mark.parametrize("name", STEPS)
def test_engine_conditions_change_nothing(name):
    """No parameter requires a gradient; first nothing else does, then a dummy in the outputs."""
    module, batch = built(name)
    wanted = TrainingStepTask().train_loss(module, batch).detach()
    module.requires_grad_(False)
    torch.testing.assert_close(TrainingStepTask().train_loss(module, batch), wanted)
    with torch.no_grad():
        values = TrainingStepTask().train_loss(module, batch)
    assert not values.requires_grad
    torch.testing.assert_close(values, wanted)
    dummy = torch.zeros((), dtype=torch.float64, requires_grad=True)
    module.net.register_forward_hook(lambda *call: call[-1] + dummy)
    torch.testing.assert_close(TrainingStepTask().train_loss(module, batch).detach(), wanted)


def dense_gauss_newton(module, batch, inputs_of, hessian_of):
    """J^T H J of one example by torch.func, from the Hessian of the loss in the outputs."""
    parameters = dict(module.named_parameters())

    def outputs(values):
        return functional_call(module, values, (inputs_of(batch),)).flatten()

    jacobian = torch.func.jacrev(outputs)(parameters)
    jacobian = torch.cat([part.flatten(1) for part in jacobian.values()], 1)
    hessian = torch.func.hessian(hessian_of)(outputs(parameters).detach())
    return jacobian.T @ hessian @ jacobian


def step_gauss_newton(name, index):
    """The Gauss-Newton matrix of B times example ``index``'s share of the batch's loss."""
    module, (inputs, targets) = built(name)
    fixed = module(inputs).detach()
    copy = Step(module.step)

    def loss(outputs):
        rows = list(fixed.unbind())
        rows[index] = outputs.view_as(rows[index])
        copy.forward = lambda x: torch.stack(rows)
        total = copy.training_step((inputs, targets), 0)
        return EXAMPLES * (total["loss"] if isinstance(total, dict) else total)

    return dense_gauss_newton(module, inputs[index], lambda x: x, loss)


# For log-probabilities the loss is linear; its Hessian in the logits is that of cross entropy.
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("example", [0, 4])
def test_gauss_newton_losses_sum_to_the_dense_matrix(name, example):
    module, batch = built(name)
    found = outer_sum(TrainingStepTask(), module, batch, example)
    torch.testing.assert_close(found, step_gauss_newton(name, example), rtol=1e-9, atol=1e-12)


def test_prepare_makes_weighted_means_independent_of_the_batch():
    for name in ("weights", "padding"):
        module, batch = built(name)
        task = TrainingStepTask()
        whole = task.train_loss(module, batch)
        task.prepare(module, batch)
        torch.testing.assert_close(task.train_loss(module, batch), whole)
        alone = torch.cat([task.train_loss(module, one(batch, i)) for i in range(EXAMPLES)])
        torch.testing.assert_close(alone, whole)
        assert any("held at its average" in note for note in task.notes)
        assert task.settings()["mass_per_example"][0] > 0
    task, module, _ = task_case("tokens batch")
    task = LanguageModelingTask(reduction="batch")
    batch = (LANGUAGE, PADDED)
    whole = task.train_loss(module, batch)
    flattened = F.cross_entropy(module(LANGUAGE).view(-1, CLASSES), PADDED.view(-1))
    torch.testing.assert_close(whole.mean(), flattened)
    task.prepare(module, batch)
    torch.testing.assert_close(task.train_loss(module, one(batch, 1)), whole[1:2])


def test_a_penalty_belongs_to_no_example():
    def with_penalty(self, x, y):
        return F.cross_entropy(self(x), y) + sum(p.square().sum() for p in self.parameters())

    task, batch = TrainingStepTask(), (INPUTS, LABELS)
    module = Step(with_penalty)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task.prepare(module, batch)
    assert task.notes == task.penalty.notes != []
    assert task.can_sample
    own = F.cross_entropy(module(INPUTS), LABELS, reduction="none")
    torch.testing.assert_close(task.train_loss(module, batch), own)
    total, parts = task.batch_loss(module, batch)
    torch.testing.assert_close(total, module.training_step(batch, 0))
    torch.testing.assert_close(parts, own / EXAMPLES)


def test_a_loss_that_is_subtracted_has_the_absolute_curvature():
    batch = (INPUTS, LABELS)
    task, module = TrainingStepTask(), Step(lambda s, x, y: -F.cross_entropy(s(x), y))
    task.prepare(module, batch)
    assert any("negative eigenvalues" in note for note in task.notes)
    plus = Step(STEPS["mean"][0])
    plus.load_state_dict(module.state_dict())
    found = outer_sum(task, module, batch, 2)
    wanted = outer_sum(TrainingStepTask(), plus, batch, 2)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    task = TrainingStepTask(indefinite="fisher")
    task.prepare(module, batch)
    assert not task.can_sample
    assert any("as asked for" in note for note in task.notes)
    with pytest.raises(ValueError, match="'absolute' or 'fisher'"):
        TrainingStepTask(indefinite="none")


def contrastive(self, x, y):
    return F.cross_entropy(self(x) @ self(x).T, torch.arange(len(x)))


def root(self, x, y):
    return F.mse_loss(self(x), NUMBERS[: len(x)]).sqrt()


def centred(self, x, y):
    outputs = self(x)
    return F.cross_entropy(outputs - outputs.mean(0), y)


@pytest.mark.parametrize("step", [contrastive, root, centred])
def test_losses_whose_examples_depend_on_one_another_are_refused(step):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="depend on one another"):
        TrainingStepTask().prepare(Step(step), (INPUTS, LABELS))


def test_a_divisor_that_the_model_changes_is_refused():
    def confident(self, x, y):
        weights = self(x)[:, 0].sigmoid()
        return (weights * F.cross_entropy(self(x), y, reduction="none")).sum() / weights.sum()

    with pytest.raises(ValueError, match="divides by a sum over the batch that the model changes"):
        TrainingStepTask().prepare(Step(confident), (INPUTS, LABELS))


def test_positions_of_all_examples_one_after_the_other():
    """Flattened with time in front."""

    def time_first(self, x, y):
        logits = self(x).transpose(0, 1).reshape(-1, CLASSES)
        return F.cross_entropy(logits, y.T.reshape(-1))

    task, module, batch = TrainingStepTask(), Step(time_first), (SERIES, SERIES_LABELS)
    task.prepare(module, batch)
    logits = module(SERIES)
    own = F.cross_entropy(logits.movedim(-1, 1), SERIES_LABELS, reduction="none").mean(1)
    torch.testing.assert_close(task.train_loss(module, batch), own)


class Unwilling(Step):
    """As a LightningModule inside another: logging raises."""

    def log(self, *args, **kwargs):
        raise RuntimeError("doesn't support logging")

    log_dict = log


def test_logging_is_silenced_and_restored():
    def step(self, x, y):
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        self.inner.log_dict({"loss": loss})
        return loss

    module = Unwilling(step)
    module.inner = Unwilling(step)
    TrainingStepTask().train_loss(module, (INPUTS, LABELS))
    with silenced(module):
        module.log("a", 1)
        with silenced(module):
            module.log("a", 1)
        module.inner.log("a", 1)
    for part in (module, module.inner):
        with pytest.raises(RuntimeError, match="doesn't support logging"):
            part.log("a", 1)


def test_training_step_signatures():
    module = Step(STEPS["mean"][0])
    module.training_step = lambda batch: STEPS["mean"][0](module, *batch)
    assert TrainingStepTask().train_loss(module, (INPUTS, LABELS)).shape == (EXAMPLES,)
    with pytest.raises(ValueError, match="Linear has no training_step"):
        as_task(None).train_loss(nn.Linear(1, 1), INPUTS)
    with pytest.raises(ValueError, match="to return one loss"):
        as_task(None).train_loss(Step(lambda s, x, y: s(x)), (INPUTS, LABELS))
    with pytest.raises(ValueError, match=rf"returned None.*a batch of {EXAMPLES} examples"):
        as_task(None).train_loss(Step(lambda s, x, y: None), (INPUTS, LABELS))
    with pytest.raises(TypeError, match="AttributionTask or None"):
        as_task("classification")
    assert as_task(task := RegressionTask()) is task


def test_a_loss_may_have_an_axis_of_one():
    data = TensorDataset(INPUTS, LABELS)
    plain = Step(STEPS["mean"][0])
    run = standing_run(plain, [range(EXAMPLES)])
    wide = Step(lambda s, x, y: F.cross_entropy(s(x), y, reduction="none").mean(0, keepdim=True))
    wide.load_state_dict(plain.state_dict())
    want = tracin(plain, run, data, data).values
    torch.testing.assert_close(tracin(wide, run, data, data).values, want)


def test_a_step_that_sums_over_its_batch_is_found_and_measured_per_example():
    class Summing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def training_step(self, batch, batch_idx):
            inputs, target = batch
            return F.cross_entropy(self.layer(inputs), target, reduction="sum")

    torch.manual_seed(0)
    module = Summing().double()
    batch = (torch.randn(6, 3, dtype=torch.float64), torch.randint(4, (6,)))
    own = F.cross_entropy(module.layer(batch[0]), batch[1], reduction="none")
    task = TrainingStepTask()
    with pytest.raises(ValueError, match="sums its loss over the batch"):
        task.prepare(module, batch)
    task.training_batch_size = 20
    task.prepare(module, batch)
    assert "sums its loss over batches of 20" in task.notes[0]
    for size in (6, 4, 1):  # whatever the batch at hand
        part = (batch[0][:size], batch[1][:size])
        torch.testing.assert_close(task.train_loss(module, part), 20 * own[:size])
        torch.testing.assert_close(task.measurement(module, part), own[:size])


class MeanSquare(torch.autograd.Function):
    """A loss that torch shows nothing of."""

    @staticmethod
    def forward(context, values):
        context.save_for_backward(values)
        return values.square().mean()

    @staticmethod
    def backward(context, gradient):
        (values,) = context.saved_tensors
        return 2 * gradient * values / values.numel()


def summed_one_by_one(self, x, y):
    total = 0.0
    for inputs, label in zip(x, y, strict=True):
        total = total + F.cross_entropy(self(inputs), label)
    return total / len(x)


def cut_to_length(self, x, y):
    lengths = (y + 1).tolist()
    rows = [
        self(inputs)[:length].square().mean() for inputs, length in zip(x, lengths, strict=True)
    ]
    return torch.stack(rows).mean()


def whole_norm(self, x, y):
    return (self(x) - 1).norm() ** 2 / len(x)


ONE_BY_ONE = {
    "a Function": lambda s, x, y: MeanSquare.apply(s(x) - 1),
    "a loop": summed_one_by_one,
    "lengths in Python": cut_to_length,
    "a norm": whole_norm,
}


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_what_cannot_be_read_in_a_batch_is_the_sum_of_single_examples(name):
    module, task, batch = Step(ONE_BY_ONE[name]), TrainingStepTask(), (INPUTS, LABELS)
    task.prepare(module, batch)
    alone = [module.training_step(one(batch, n), 0) for n in range(EXAMPLES)]
    losses = task.train_loss(module, batch)
    torch.testing.assert_close(losses, torch.stack(alone))
    total, parts = task.batch_loss(module, batch)
    torch.testing.assert_close(total, module.training_step(batch, 0))
    torch.testing.assert_close(parts, losses / EXAMPLES)
    torch.testing.assert_close(
        flat_gradient(losses.sum() / EXAMPLES, module),
        flat_gradient(module.training_step(batch, 0), module),
    )


def test_a_loss_without_a_second_derivative_has_the_empirical_fisher():
    module = Step(lambda s, x, y: F.multi_margin_loss(s(x), y))
    task = TrainingStepTask()
    task.prepare(module, (INPUTS, LABELS))
    assert not task.can_sample
    assert any("no second derivative" in note for note in task.notes)
    own = F.multi_margin_loss(module(INPUTS), LABELS, reduction="none")
    torch.testing.assert_close(task.train_loss(module, (INPUTS, LABELS)), own)


def test_a_query_of_another_length_than_all_training_examples():
    """Nothing in the first batch says that numbers of terms differ."""

    def per_token(self, x, y):
        counted = y != -100
        losses = F.cross_entropy(self(x).movedim(-1, 1), y, reduction="none")
        return losses.sum() / counted.sum()

    module, task = Step(per_token), TrainingStepTask()
    task.prepare(module, (SERIES, SERIES_LABELS))
    asked = SERIES, HOLES
    with pytest.raises(UnseenBatchError):
        task.measurement(module, asked)
    task.prepare(module, (SERIES, SERIES_LABELS))
    task.average(module, lambda: [((SERIES, SERIES_LABELS), torch.arange(EXAMPLES))])
    own = F.cross_entropy(module(SERIES).movedim(-1, 1), HOLES, reduction="none").sum(1)
    torch.testing.assert_close(task.measurement(module, asked), own / (HOLES != -100).sum(1))
    torch.testing.assert_close(task.train_loss(module, asked), own / SERIES_LABELS.shape[1])


def test_terms_are_of_the_same_run_as_the_loss():
    """In train mode another run would draw another dropout."""
    dropped = nn.Dropout(0.5)
    module = Step(lambda s, x, y: F.cross_entropy(dropped(s(x)).movedim(-1, 1), y))
    task, batch = TrainingStepTask(), (SERIES, SERIES_LABELS)
    dropped.eval()
    task.prepare(module, batch)
    dropped.train()
    total, terms = task.batch_loss(module, batch, by_position=True)
    torch.testing.assert_close(terms.sum(), total)


def test_batches_of_the_same_indices_and_other_data_are_told_apart():
    """Training examples and queries are both counted from 0."""

    def sorting(self, x, y):
        order = x[:, 0].argsort(stable=True)
        return F.cross_entropy(self(x[order]), y[order], reduction="none").mean()

    module, task = Step(sorting), TrainingStepTask()
    ordered = INPUTS[INPUTS[:, 0].argsort()]
    with seeded_examples(0, torch.arange(EXAMPLES)):
        task.prepare(module, (ordered, LABELS))
        task.train_loss(module, (ordered, LABELS))
        with pytest.raises(UnseenBatchError, match="in their order"):
            task.train_loss(module, (ordered.flip(0), LABELS))


def test_a_part_that_was_zero_at_first_has_its_curvature():
    def hinge(self, x, y):
        outputs = self(x)
        return F.cross_entropy(outputs, y) + (outputs - self.margin).relu().square().sum(1).mean()

    module, task, batch = Step(hinge), TrainingStepTask(), (INPUTS, LABELS)
    module.register_buffer("margin", torch.tensor(100.0, dtype=torch.float64))
    task.prepare(module, batch)
    before = outer_sum(task, module, batch, 0)
    module.margin.fill_(-100.0)
    jacobian = per_example_gradients(module(INPUTS)[0], module)
    torch.testing.assert_close(
        outer_sum(task, module, batch, 0), before + 2 * jacobian.T @ jacobian, rtol=1e-7, atol=1e-9
    )
