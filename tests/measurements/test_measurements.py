"""Measurements against their formulas, written out on the model's logits, and on whole runs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule
from tda_lightning.estimators import InfluenceFunction, TracIn, Unrolled
from tda_lightning.examples.models.gpt import GPT
from tda_lightning.measurements import (
    Contrast,
    Function,
    Logit,
    LogProbability,
    Loss,
    Margin,
    OfOutputs,
    Output,
    Probability,
    Reward,
)
from tda_lightning.measurements.outputs import class_outputs
from tda_lightning.tasks import LanguageModelingTask, RegressionTask, TrainingStepTask
from tests.attributing import CaseTask, attribute, quiet, relative
from tests.cases.case import Case, normal, tokens
from tests.cases.training import queries_of, train

EXACT = 1e-9
TEXTS = Case("asked gpt", lambda: GPT(6, 5, 8, 1, 2), tokens(6, 5), "classification")
CLASSES = Case(
    "asked classifier",
    lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)),
    normal(3),
    "classification",
)
NUMBERS = Case("asked regression", lambda: nn.Sequential(nn.Linear(3, 2)), normal(3))
SGD = lambda m: torch.optim.SGD(m.parameters(), lr=0.1)  # noqa: E731


def log_odds(logp):
    return logp - (-logp.expm1()).log()


# Measurement, and minus the quantity (or the quantity, where smaller is better) from logits
# [batch, position, class] and labels [batch, position] of three queries.
FORMULAS = {
    "loss of a span": (
        Loss(span=[1, 3]),
        lambda z, y: -picked(z.log_softmax(2), y)[:, 1:3].mean(1),
    ),
    "probability": (Probability(), lambda z, y: -picked(z.softmax(2), y).prod(1)),
    "of a token": (Probability(target=2, positions=3), lambda z, y: -z.softmax(2)[:, 3, 2]),
    "the last": (LogProbability(target=2, positions=-1), lambda z, y: -z.log_softmax(2)[:, -1, 2]),
    "log-probability": (
        LogProbability(positions=[0, -1]),
        lambda z, y: -picked(z.log_softmax(2), y)[:, [0, -1]].sum(1),
    ),
    "margin": (Margin(), lambda z, y: -log_odds(picked(z.log_softmax(2), y).sum(1))),
    "margin of a token": (
        Margin(target=1, positions=0),
        lambda z, y: -log_odds(z.log_softmax(2)[:, 0, 1]),
    ),
    "logit": (Logit(positions=2), lambda z, y: -picked(z, y)[:, 2]),
    "contrast": (
        Contrast(target=1, foil=4, positions=2),
        lambda z, y: z.softmax(2)[:, 2, 4] - z.softmax(2)[:, 2, 1],
    ),
    "contrast of logits": (
        Contrast(target=1, foil=4, positions=2, of="logit"),
        lambda z, y: z.log_softmax(2)[:, 2, 4] - z.log_softmax(2)[:, 2, 1],
    ),
    "rewards": (
        Reward([1.0, -2.0, 0.5], baseline=0.25),
        lambda z, y: -(torch.tensor([0.75, -2.25, 0.25]) * picked(z.log_softmax(2), y).sum(1)),
    ),
    "each query's own": (
        LogProbability(target=[0, 1, 2], positions=[[0], [1, 2], [-1]]),
        lambda z, y: (
            -torch.stack(
                [
                    z.log_softmax(2)[0, 0, 0],
                    z.log_softmax(2)[1, [1, 2], 1].sum(),
                    z.log_softmax(2)[2, -1, 2],
                ]
            )
        ),
    ),
    "each query's span": (
        LogProbability(span=[[0, 2], [1, 3], [3, 5]]),
        lambda z, y: (
            -torch.stack(
                [picked(z.log_softmax(2), y)[n, a:b].sum() for n, (a, b) in enumerate(SPANS)]
            )
        ),
    ),
    "outputs": (
        OfOutputs(lambda z: z.square().mean((1, 2))),
        lambda z, y: -z.square().mean((1, 2)),
    ),
}
SPANS = [(0, 2), (1, 3), (3, 5)]


def picked(values, labels):
    return values.gather(2, labels[:, :, None]).squeeze(2)


def gradient(value, module):
    found = torch.autograd.grad(value, list(module.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("name", FORMULAS)
def test_a_measurement_is_its_formula(name):
    asked, formula = FORMULAS[name]
    module, (inputs, labels) = TEXTS.build(), TEXTS.batch(3)
    found = asked.measure(CaseTask(TEXTS.kind), module, (inputs, labels), torch.arange(3))
    expected = formula(module(inputs), labels)
    assert relative(found.detach(), expected.detach()) < EXACT
    for query in range(3):
        own = gradient(
            asked.measure(CaseTask(TEXTS.kind), module, (inputs, labels), torch.arange(3))[query],
            module,
        )
        assert relative(own, gradient(formula(module(inputs), labels)[query], module)) < EXACT


@pytest.mark.parametrize("name", [n for n in FORMULAS if n != "outputs"])
def test_its_terms_have_gradients_that_sum_to_its_own(name):
    asked, _ = FORMULAS[name]
    module, batch, task = TEXTS.build(), TEXTS.batch(3), CaseTask(TEXTS.kind)
    terms, chosen = asked.terms(task, module, batch, torch.arange(3))
    whole = asked.measure(task, module, batch, torch.arange(3))
    assert terms.shape == chosen.shape == (3, 5)
    assert not bool(terms[~chosen].any())
    for query in range(3):
        parts = gradient(terms[query].sum(), module)
        assert relative(parts, gradient(whole[query], module)) < EXACT


class Step(LightningModule):
    """A training_step that was not written to be asked: a dictionary, ignored labels, a penalty."""

    def __init__(self):
        super().__init__()
        self.gpt = GPT(6, 5, 8, 1, 2)

    def training_step(self, batch, batch_idx):
        logits = self.gpt(batch["input_ids"])
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        return loss + 0.01 * self.gpt.head.weight.square().sum()


def texts_of_a_step():
    torch.manual_seed(3)
    module = Step().double().eval()
    inputs, labels = TEXTS.batch(3)
    labels[0, 3:] = -100
    labels[2, 0] = -100
    return module, {"input_ids": inputs, "labels": labels}


@pytest.mark.parametrize("task", [TrainingStepTask(), "alone"])
def test_the_outputs_of_an_unchanged_step_are_known(task):
    module, batch = texts_of_a_step()
    if task == "alone":
        task = TrainingStepTask()
        task.one_by_one = True
    found = class_outputs(task, module, batch)
    assert torch.equal(found.counted, batch["labels"] != -100)
    assert relative(found.logits, module.gpt(batch["input_ids"])) < EXACT
    asked = Probability(positions=-1)  # the last that counts: another place in each query
    logits = module.gpt(batch["input_ids"])
    places = [(0, 2), (1, 4), (2, 4)]
    expected = torch.stack([logits[q, t].softmax(0)[batch["labels"][q, t]] for q, t in places])
    assert relative(asked.measure(task, module, batch, torch.arange(3)), -expected) < EXACT


def test_bits_are_classes():
    class Bits(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def training_step(self, batch, batch_idx):
            logits = self.layer(batch[0]).squeeze(1)
            return F.binary_cross_entropy_with_logits(logits, batch[1])

    module = Bits().double()
    batch = [torch.randn(4, 3).double(), torch.tensor([0.0, 1, 1, 0]).double()]
    logit, queries = module.layer(batch[0]).squeeze(1), torch.arange(4)
    signs = 2 * batch[1] - 1
    for asked, expected in [
        (Probability(), (signs * logit).sigmoid()),
        (Probability(target=1), logit.sigmoid()),
        (Logit(target=1), logit),
        (Margin(), signs * logit),
    ]:
        assert (
            relative(asked.measure(TrainingStepTask(), module, batch, queries), -expected) < EXACT
        )


def test_one_output_of_a_regression_is_asked_about():
    module, batch = NUMBERS.build(), NUMBERS.batch(3)
    found = Output(1).measure(RegressionTask(), module, batch, torch.arange(3))
    assert relative(found, -module(batch[0])[:, 1]) < EXACT
    with pytest.raises(ValueError, match="index must be 0 to 1, the outputs of a query; got 2"):
        Output(2).measure(RegressionTask(), module, batch, torch.arange(3))


@dataclasses.dataclass
class Contrasted(CaseTask):
    """The contrast of classes 1 and 2 as a task's own measurement."""

    @property
    def measures_loss(self):
        return False

    def measurement(self, module, batch):
        chances = module(batch[0]).softmax(-1)
        return chances[:, 2] - chances[:, 1]


@pytest.mark.parametrize(
    "estimator", [TracIn(), InfluenceFunction(), Unrolled()], ids=lambda e: type(e).__name__
)
def test_scores_are_about_what_was_asked(estimator):
    run, module, data = train(CLASSES, SGD, checkpoints=(4,))
    if isinstance(estimator, Unrolled):
        names = [name for name, _ in module.named_modules()]
        facts = dataclasses.replace(
            run.facts, settings={**run.facts.settings, "eval_modules": names}
        )
        run = dataclasses.replace(run, facts=facts)
    given = (CLASSES, run, module, data, estimator)
    expected = attribute(*given, task=Contrasted("classification"), self_influence=False)
    found = attribute(*given, measurement=Contrast(target=1, foil=2), self_influence=None)
    assert relative(found.values, expected.values) < EXACT
    assert found.self_influence is None
    measured = found.provenance["measurement"]
    assert measured == {"quantity": "the probability of class 1 minus that of class 2", "sign": -1}
    assert found.provenance["measurements"] == expected.provenance["measurements"]


def test_a_prediction_is_explained_as_if_it_were_the_label():
    """quanda's explanation targets: docs/questions.md, "What to ask about a query"."""
    run, module, data = train(CLASSES, SGD, checkpoints=(4,))
    inputs, labels = queries_of(CLASSES)
    with torch.no_grad():
        said = module(inputs).argmax(1)
    said = torch.where(said == labels, (labels + 1) % 4, said)  # none of the labels
    given = (CLASSES, run, module, data, TracIn())
    found = attribute(*given, measurement=Loss(target=said.tolist()), self_influence=False)
    attribution = AttributionModule(module, run, TracIn(), CaseTask("classification"))
    relabelled = TensorDataset(inputs, said)
    expected = attribution.attribute(TensorDataset(*data), relabelled, self_influence=False)
    assert relative(found.values, expected.values) < EXACT
    assert relative(found.values, attribute(*given, self_influence=False).values) > 0.1
    # "Why this rather than the label": the difference of both log-probabilities.
    rather = Contrast(target=said.tolist(), foil=labels.tolist(), of="logit")
    asked = attribute(*given, measurement=rather, self_influence=False).values
    both = [
        attribute(*given, measurement=LogProbability(target=t.tolist()), self_influence=False)
        for t in (said, labels)
    ]
    assert relative(asked, both[0].values - both[1].values) < EXACT


def test_a_positive_score_says_that_removal_lowers_the_probability():
    """To first order: a replay with the example at a little less weight."""
    from tda_lightning.evaluation import measure, retrain

    run, module, data = train(CLASSES, SGD, checkpoints=(4,))
    names = [name for name, _ in module.named_modules()]
    facts = dataclasses.replace(run.facts, settings={**run.facts.settings, "eval_modules": names})
    run = dataclasses.replace(run, facts=facts)
    asked, task = Probability(target=[0, 1, 3]), CaseTask("classification")
    scores = attribute(
        CLASSES, run, module, data, Unrolled(), measurement=asked, self_influence=False
    )
    queries, train_set = TensorDataset(*queries_of(CLASSES)), TensorDataset(*data)
    chances = []
    for step in (1e-4, -1e-4):
        weights = torch.ones(10, dtype=torch.float64)
        weights[4] -= step
        state = retrain(run, module, task, train_set, weights)
        chances.append(-measure(module, task, state, queries, measurement=asked))
    slope = (chances[0] - chances[1]) / 2e-4  # how the probability rises with removal
    assert relative(-slope, scores.values[:, 4]) < 1e-5


def test_queries_may_have_another_structure():
    run, module, data = train(CLASSES, SGD, checkpoints=(4,))
    inputs, labels = queries_of(CLASSES)
    attribution = AttributionModule(module, run, TracIn(), CaseTask("classification"))
    options = {"batch_size": 4, "trainer": quiet()}
    prompts = [{"prompt": row} for row in inputs]

    def logits(module, batch):
        return module(batch["prompt"])

    found = attribution.attribute(
        TensorDataset(*data), prompts, measurement=Probability(target=2, outputs=logits), **options
    )
    alike = attribution.attribute(
        TensorDataset(*data),
        TensorDataset(inputs, labels),
        measurement=Probability(target=2),
        **options,
    )
    own = attribution.attribute(
        TensorDataset(*data),
        prompts,
        measurement=lambda module, batch: -module(batch["prompt"]).softmax(1)[:, 2],
        **options,
    )
    assert relative(found.values, alike.values) < EXACT
    assert relative(own.values, alike.values) < EXACT


REFUSED = {
    "a foil equal to the target": (Contrast(target=1, foil=1, positions=0), "foil of query 0 is"),
    "a foil that is the label": (Contrast(foil=[3, 3, 3], positions=0), "foil of query . is its t"),
    "a span outside": (
        Loss(span=[3, 9]),
        "Position 5 lies outside of query 0, which has positions",
    ),
    "too far from the end": (Loss(positions=-9), "Position -9 lies outside of query 0"),
    "no position said": (Probability(target=1), "a query has 5 positions: say which"),
    "no such class": (Probability(target=6, positions=0), "of the model, 0 to 5; got 6"),
    "a number of targets": (
        Probability(target=[1, 2], positions=0),
        "target has 2 entries, and th",
    ),
    "a number of spans": (Loss(span=[[0, 1], [1, 2]]), "given for 2 queries, and there are 3"),
    "no key": (Reward("reward"), "have no key 'reward': give rewards as a list"),
    "no number for each": (
        Function(lambda m, b: m(b[0]).mean()),
        "one number for each of 3 queries",
    ),
    "no gradient": (Function(lambda m, b: m(b[0]).detach().sum((1, 2))), "has no gradient"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_asked_is_refused_in_words(name):
    asked, text = REFUSED[name]
    module, (inputs, labels) = TEXTS.build(), TEXTS.batch(3)
    labels[0, 0] = 3

    def ask():
        asked.check(3)
        asked.measure(CaseTask(TEXTS.kind), module, (inputs, labels), torch.arange(3))

    with pytest.raises(ValueError, match=text):
        ask()


def test_settings_are_checked_for_the_queries_at_hand():
    run, module, data = train(CLASSES, SGD)
    with pytest.raises(ValueError, match="target has 2 entries, and there are 3 queries"):
        attribute(
            CLASSES,
            run,
            module,
            data,
            TracIn(),
            measurement=Probability(target=[1, 2]),
            self_influence=False,
        )


def test_labels_that_are_all_ignored_are_named():
    module, batch = texts_of_a_step()
    batch["labels"][1] = -100
    with pytest.raises(ValueError, match="No position of query 1 counts: all its labels are ign"):
        Probability().measure(TrainingStepTask(), module, batch, torch.arange(3))
    with pytest.raises(ValueError, match="Position 3 of query 0 has no label that counts"):
        Probability(positions=3).measure(TrainingStepTask(), module, batch, torch.arange(3))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Contrast(target=1), "give foil="),
        (lambda: Contrast(foil=1, of="odds"), "of must be 'probability' or 'logit'"),
        (lambda: Loss(span=[3, 3]), r"0 <= start < stop, got \[3, 3\]"),
        (lambda: Loss(span=[0, 1], positions=1), "positions or span, not both"),
        (lambda: Loss(positions="last"), "positions must be a whole number"),
        (lambda: Reward(), "Reward needs rewards="),
        (lambda: Function("nowhere.at_all"), "function must be a function or its full name"),
    ],
)
def test_impossible_settings_are_refused_at_once(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_another_kind_of_measurement_is_refused():
    run, module, data = train(CLASSES, SGD)
    for wrong, text in ((Probability, "the class Probability: make one of it"), (3, "got 3")):
        with pytest.raises(TypeError, match=text):
            attribute(CLASSES, run, module, data, TracIn(), measurement=wrong)
    with pytest.raises(ValueError, match="the measurement's target is given for each query"):
        attribute(CLASSES, run, module, data, TracIn(), measurement=Probability(target=[1, 2, 3]))


def test_a_loss_of_no_classes_is_refused():
    module, batch = NUMBERS.build(), NUMBERS.batch(3)
    with pytest.raises(ValueError, match="Expected a loss with one cross entropy or binary cross"):
        Probability().measure(RegressionTask(), module, batch, torch.arange(3))


def test_margins_of_a_language_model_agree_with_its_loss_where_the_model_is_unsure():
    """log P / (1 - P) is log P where P is small."""
    module, (inputs, labels) = TEXTS.build(), TEXTS.batch(3)
    batch, queries, task = (inputs, labels), torch.arange(3), LanguageModelingTask()
    margin = Margin().measure(task, module, batch, queries)
    chance = -Probability().measure(task, module, batch, queries)
    log_chance = -LogProbability().measure(task, module, batch, queries)
    assert relative(-margin, log_chance - (1 - chance).log()) < EXACT
