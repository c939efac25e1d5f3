"""What stands behind wrong predictions: their top proponents, as numbers and as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from experiments.mislabelled.ranking import TASK, quiet
from experiments.mislabelled.setting import final, network
from tda_lightning import AttributionModule, Trajectory
from tda_lightning.estimators import Source
from tda_lightning.evaluation.baselines import last_layer_cosine
from tda_lightning.examples.data import FashionMNISTData
from tda_lightning.report.pictures import picture

ASKED, SHOWN, TOP = 100, 5, 10
TITLES = {"source": "SOURCE", "last_layer": "last-layer cosine"}
_SIDE, _GAP, _LEFT = 44, 6, 128


def wrong_predictions(run: Trajectory, data: FashionMNISTData) -> tuple[Tensor, Tensor]:
    """The first test pictures that the model gets wrong, and what it takes them for, [query]."""
    inputs, labels = data.query_dataset.tensors
    with torch.no_grad():
        classes = final(run)(inputs).argmax(1)
    examples = (classes != labels).nonzero()[:ASKED, 0]
    return examples, classes[examples]


def proponents(
    run: Trajectory, data: FashionMNISTData, examples: Tensor, classes: Tensor
) -> dict[str, Tensor]:
    """Those that speak most for the class that was predicted, [query, top], by each way.

    The label asked about is the predicted one: its proponents are the training examples without
    which the model would be less sure of its mistake.
    """
    inputs = data.query_dataset.tensors[0][examples]
    asked, train = TensorDataset(inputs, classes), data.train_dataset
    end = run.checkpoints[run.last_step].parameters
    module = AttributionModule(network(), run, Source(), TASK)
    scores = {
        "source": module.attribute(train, asked, trainer=quiet(), self_influence=False),
        "last_layer": last_layer_cosine(network(), TASK, end, train, asked),
    }
    return {name: item.values.topk(TOP, dim=1).indices for name, item in scores.items()}


def drawing(
    data: FashionMNISTData, examples: Tensor, classes: Tensor, found: Mapping[str, Tensor]
) -> str:
    """An SVG file of the first few: the query, and under one another its proponents by each way."""
    flipped = set(data.flipped.tolist())
    row = _SIDE + 16
    block = len(found) * row + 22
    width, height = _LEFT + 100 + TOP * (_SIDE + _GAP), SHOWN * block + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        'font-family="sans-serif" font-size="9" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        '<text x="8" y="18" font-size="12">wrong prediction</text>',
        f'<text x="{_LEFT}" y="18" font-size="12">its ten top proponents; red: the label was '
        "flipped (in brackets: the right one)</text>",
    ]
    for number in range(SHOWN):
        top = 30 + number * block
        query = int(examples[number])
        right = data.classes[int(data.query_dataset.tensors[1][query])]
        taken = data.classes[int(classes[number])]
        parts.append(_picture(data, "query", query, 8, top + 8, False))
        parts.append(f'<text x="8" y="{top + _SIDE + 22}" font-size="11">{escape(right)},</text>')
        parts.append(f'<text x="8" y="{top + _SIDE + 36}" font-size="11">taken for {taken}</text>')
        for place, (name, chosen) in enumerate(found.items()):
            y = top + place * row
            parts.append(f'<text x="{_LEFT}" y="{y + 26}" font-size="11">{TITLES[name]}</text>')
            for column, example in enumerate(chosen[number].tolist()):
                x = _LEFT + 100 + column * (_SIDE + _GAP)
                wrong = example in flipped
                label = data.classes[int(data.train_dataset.tensors[1][example])]
                words = f"({data.classes[int(data.clean_labels[example])]})" if wrong else label
                parts.append(_picture(data, "train", example, x, y, wrong))
                parts.append(f'<text x="{x}" y="{y + _SIDE + 9}">{escape(words)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _picture(
    data: FashionMNISTData, split: str, index: int, x: float, y: float, framed: bool
) -> str:
    uri, _, _ = picture(data.render(split, index).image, 28)
    frame = 'stroke="#d22" stroke-width="3"' if framed else 'stroke="#bbb"'
    return (
        f'<image href="{uri}" x="{x}" y="{y}" width="{_SIDE}" height="{_SIDE}"/>'
        f'<rect x="{x}" y="{y}" width="{_SIDE}" height="{_SIDE}" fill="none" {frame}/>'
    )
