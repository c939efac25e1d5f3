"""Stages whose training sets are given in another order, and such as nothing tells apart."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from tda_lightning.attribution.data_of_stages import require_data_of_stages
from tda_lightning.records.errors import TrajectoryMismatchError
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.store import fingerprint


class Noisy(Dataset):
    """Differs at each reading, by a generator that nobody puts back."""

    def __init__(self):
        self.read = 0

    def __len__(self):
        return 3

    def __getitem__(self, index):
        self.read += 1
        return torch.tensor([float(self.read)])


def stages(*datasets):
    return [
        SimpleNamespace(
            run=run,
            trajectory=SimpleNamespace(
                facts=SimpleNamespace(
                    num_examples=len(data), fingerprint=fingerprint(data), settings={}
                )
            ),
        )
        for run, data in enumerate(datasets)
    ]


def sources(*datasets):
    return [ExampleSource.of(data, 2, "training") for data in datasets]


def test_training_sets_in_another_order_are_refused_and_the_right_one_is_named():
    first, second = TensorDataset(torch.zeros(3, 1)), TensorDataset(torch.ones(3, 1))
    require_data_of_stages(stages(first, second), sources(first, second))
    match = r"Run 1 of 2: The training set is not the recorded one.* number 2 fits this run: mind"
    with pytest.raises(TrajectoryMismatchError, match=match):
        require_data_of_stages(stages(first, second), sources(second, first))
    other = TensorDataset(torch.full((3, 1), 2.0))
    with pytest.raises(TrajectoryMismatchError, match="Run 2 of 2: .*in its order.$"):
        require_data_of_stages(stages(first, second), sources(first, other))
    with pytest.raises(TrajectoryMismatchError, match="^The training set is not"):
        require_data_of_stages(stages(first), sources(other))


def test_training_sets_that_cannot_be_told_apart_are_warned_of():
    first, second = Noisy(), Noisy()
    with pytest.warns(UserWarning, match="Runs 1 and 2 .* nothing recorded tells which is whose"):
        require_data_of_stages(stages(first, second), sources(first, second))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_data_of_stages(stages(first, first), sources(first, first))  # one set for both
        fixed = TensorDataset(torch.zeros(3, 1))
        require_data_of_stages(stages(first, fixed), sources(first, fixed))
