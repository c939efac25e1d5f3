"""Training steps, tasks, and small models and data for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tda_lightning.tasks import (
    ClassificationTask,
    LanguageModelingTask,
    RegressionTask,
    TrainingStepTask,
    gauss_newton_losses,
)

EXAMPLES, CLASSES, TIME = 6, 4, 3


class Step(nn.Module):
    """A small network with the training step of a case, as a LightningModule would have it."""

    def __init__(self, step, outputs=CLASSES):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
        self.step = step

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        return self.step(self, *batch)


class Segmenter(nn.Module):
    """Logits [batch, classes, time]."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, CLASSES).double()

    def forward(self, inputs):
        return self.net(inputs).movedim(-1, 1)


class LanguageModel(nn.Module):
    def __init__(self, vocabulary=CLASSES):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 3).double()
        self.head = nn.Linear(3, vocabulary).double()

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.embedding(input_ids).cumsum(1))


def flat_gradient(loss, module):
    gradients = torch.autograd.grad(
        loss, list(module.parameters()), retain_graph=True, allow_unused=True
    )
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(module.parameters(), gradients, strict=True)
        ]
    )


def per_example_gradients(losses, module):
    return torch.stack([flat_gradient(loss, module) for loss in losses])


torch.manual_seed(0)
INPUTS = torch.randn(EXAMPLES, 5, dtype=torch.float64)
LABELS = torch.randint(CLASSES, (EXAMPLES,))
SERIES = torch.randn(EXAMPLES, TIME, 5, dtype=torch.float64)
SERIES_LABELS = torch.randint(CLASSES, (EXAMPLES, TIME))
HOLES = SERIES_LABELS.clone()
HOLES[0, 1:] = -100
HOLES[4, 0] = -100
NUMBERS = torch.randn(EXAMPLES, CLASSES, dtype=torch.float64)
BITS = torch.randint(2, (EXAMPLES, CLASSES)).double()
SOFT = NUMBERS.softmax(1)
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64)


def flat(reduction="mean", **options):
    def step(self, x, y):
        logits = self(x).reshape(-1, CLASSES)
        return F.cross_entropy(logits, y.reshape(-1), reduction=reduction, **options)

    return step


# name: (step, inputs, targets). What the steps have in common: the loss is a sum over examples.
STEPS = {
    "mean": (lambda s, x, y: F.cross_entropy(s(x), y), INPUTS, LABELS),
    "module": (lambda s, x, y: nn.CrossEntropyLoss()(s(x), y), INPUTS, LABELS),
    "sum": (lambda s, x, y: F.cross_entropy(s(x), y, reduction="sum") / len(x), INPUTS, LABELS),
    "none": (lambda s, x, y: F.cross_entropy(s(x), y, reduction="none").mean(), INPUTS, LABELS),
    "legacy": (lambda s, x, y: F.cross_entropy(s(x), y, size_average=False), INPUTS, LABELS),
    "weights": (lambda s, x, y: F.cross_entropy(s(x), y, WEIGHTS), INPUTS, LABELS),
    "smoothing": (
        lambda s, x, y: F.cross_entropy(s(x), y, WEIGHTS, label_smoothing=0.2),
        INPUTS,
        LABELS,
    ),
    "probabilities": (
        lambda s, x, y: F.cross_entropy(s(x), y, WEIGHTS, label_smoothing=0.2),
        INPUTS,
        SOFT,
    ),
    "nll": (lambda s, x, y: F.nll_loss(s(x).log_softmax(1), y), INPUTS, LABELS),
    "nll weights": (
        lambda s, x, y: nn.NLLLoss(WEIGHTS)(s(x).log_softmax(1), y),
        INPUTS,
        LABELS,
    ),
    "tokens": (flat(), SERIES, SERIES_LABELS),
    "padding": (flat(), SERIES, HOLES),
    "padding sum": (flat("sum", ignore_index=2), SERIES, SERIES_LABELS),
    "class axis": (
        lambda s, x, y: F.cross_entropy(s(x).movedim(-1, 1), y, WEIGHTS),
        SERIES,
        HOLES,
    ),
    "mse": (lambda s, x, y: 0.5 * F.mse_loss(s(x), y), INPUTS, NUMBERS),
    "mse swapped": (lambda s, x, y: F.mse_loss(y, s(x), reduction="sum"), INPUTS, NUMBERS),
    "bce": (lambda s, x, y: F.binary_cross_entropy_with_logits(s(x), y), INPUTS, BITS),
    "bce weights": (
        lambda s, x, y: F.binary_cross_entropy_with_logits(
            s(x), y, weight=WEIGHTS, pos_weight=WEIGHTS.flip(0)
        ),
        INPUTS,
        BITS,
    ),
    "two losses": (
        lambda s, x, y: {
            "loss": 0.3 * F.cross_entropy(s(x), y) + 2 * F.mse_loss(s(x), NUMBERS[: len(x)]),
            "other": F.cross_entropy(s(x) * 2, y),
        },
        INPUTS,
        LABELS,
    ),
    "masked": (
        lambda s, x, y: (F.cross_entropy(s(x), y, reduction="none") * (y != 1)).sum() / 3,
        INPUTS,
        LABELS,
    ),
}


def built(name):
    step, inputs, targets = STEPS[name]
    torch.manual_seed(1)
    return Step(step), (inputs, targets)


def outer_sum(task, module, batch, example):
    rows = [
        flat_gradient(losses[example], module)
        for losses in gauss_newton_losses(task, module, batch)
    ]
    return torch.stack(rows).T @ torch.stack(rows)


LANGUAGE = torch.randint(CLASSES, (EXAMPLES, TIME + 1), generator=torch.Generator().manual_seed(3))
PADDED = LANGUAGE.clone()
PADDED[1, 2:] = -100
PADDED[3, 3:] = -100
TASKS = {
    "classification": (ClassificationTask, {}, "step", (INPUTS, LABELS)),
    "weighted": (
        ClassificationTask,
        {"class_weights": WEIGHTS.tolist(), "average_weight": 0.8, "label_smoothing": 0.1},
        "step",
        {"x": INPUTS, "label": LABELS},
    ),
    "soft": (ClassificationTask, {}, "step", (INPUTS, SOFT)),
    "segmentation": (ClassificationTask, {}, "segmenter", [SERIES, HOLES]),
    "margin": (ClassificationTask, {"measure": "margin"}, "step", (INPUTS, LABELS)),
    "regression": (RegressionTask, {"scale": 0.5}, "step", (INPUTS, NUMBERS)),
    "tokens": (LanguageModelingTask, {}, "language", LANGUAGE),
    "tokens sum": (LanguageModelingTask, {"reduction": "sum"}, "language", LANGUAGE),
    "tokens batch": (
        LanguageModelingTask,
        {"reduction": "batch", "tokens_per_example": 2.5},
        "language",
        (LANGUAGE.clamp_min(0), PADDED),
    ),
    "tokens dictionary": (
        LanguageModelingTask,
        {},
        "language",
        {"input_ids": LANGUAGE, "attention_mask": (PADDED >= 0).long()},
    ),
    "training step": (TrainingStepTask, {}, "step", (INPUTS, LABELS)),
}


def task_case(name):
    kind, options, model, batch = TASKS[name]
    torch.manual_seed(2)
    module = {
        "step": lambda: Step(STEPS["mean"][0]),
        "segmenter": Segmenter,
        "language": LanguageModel,
    }[model]()
    return kind(**options), module, batch


def one(batch, index):
    if isinstance(batch, dict):
        return {name: value[index : index + 1] for name, value in batch.items()}
    if isinstance(batch, torch.Tensor):
        return batch[index : index + 1]
    return type(batch)(value[index : index + 1] for value in batch)
