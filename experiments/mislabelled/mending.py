"""What looking at suspicious labels gains: mend or remove them, train anew, test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from experiments.mislabelled.setting import accuracy, trained_anew
from tda_lightning.examples.data import FashionMNISTData

LOOKED = (0.05, 0.10, 0.15, 0.20)  # shares of the training set that are looked through
COMPARED = 0.10  # at which removing is compared with mending


def worklist(
    rankings: Mapping[str, Tensor], data: FashionMNISTData
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Name and training set [pictures, labels] of every retraining.

    ``RANKING mend SHARE``: the wrong labels among those looked at are put right. ``remove``: they
    are removed. ``remove unseen``: everything that would have been looked at is removed. ``all``
    is the ranking of somebody who knows: every wrong label, and nothing else.
    """
    count = len(data.clean_labels)
    wrong = torch.zeros(count, dtype=torch.bool)
    wrong[data.flipped] = True
    none = torch.zeros(count, dtype=torch.bool)
    yield "as it is", changed(data, mended=none, removed=none)
    yield "all mend", changed(data, mended=wrong, removed=none)
    yield "all remove", changed(data, mended=none, removed=wrong)
    for name, suspicion in rankings.items():
        for share in LOOKED:
            looked = none.clone()
            looked[suspicion.argsort(descending=True)[: round(share * count)]] = True
            yield f"{name} mend {share:g}", changed(data, looked & wrong, none)
            if share == COMPARED:
                yield f"{name} remove {share:g}", changed(data, none, looked & wrong)
                yield f"{name} remove unseen {share:g}", changed(data, none, looked)


def changed(data: FashionMNISTData, mended: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
    """The training set with some labels put right and some examples removed."""
    inputs, labels = data.train_dataset.tensors
    labels = torch.where(mended, data.clean_labels, labels)
    return inputs[~removed], labels[~removed]


def tested(work: tuple[Tensor, Tensor], data: FashionMNISTData, seed: int) -> float:
    """Test accuracy after training anew; all retrainings of a seed begin with the same weights."""
    return accuracy(trained_anew(*work, seed=1000 + seed), data.query_dataset)
