"""Training anew on part of the training set."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, WeightedRandomSampler

from tda_lightning.evaluation import FreshTraining, retrain_from_scratch
from tda_lightning.evaluation.from_scratch import smaller_loader
from tda_lightning.records.errors import UnsupportedTrainingError
from tests import runs as recorded


class Data(LightningDataModule):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def train_dataloader(self) -> DataLoader:
        order = torch.Generator().manual_seed(self.seed)
        return recorded.loader(recorded.Numbered(), shuffle=True, generator=order)


def fresh(seed: int) -> FreshTraining:
    torch.manual_seed(seed)
    made.append(recorded.Net())
    return FreshTraining(recorded.trainer(), made[-1], Data(seed))


made: list[recorded.Net] = []


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_examples_left_out_are_never_seen_and_seeds_decide_the_rest() -> None:
    kept = torch.ones(22, dtype=torch.bool)
    kept[[3, 7, 11]] = False
    before = torch.get_rng_state()
    first, again, other = (retrain_from_scratch(fresh, kept, seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    seen = {index for batch in made[-1].seen for index in batch}
    assert seen == set(range(22)) - {3, 7, 11}
    assert [len(batch) for batch in made[-1].seen] == [4, 4, 4, 4, 3] * 2  # full, but for the last
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
    assert not torch.equal(first["net.0.weight"], other["net.0.weight"])
    assert set(first) == set(made[-1].state_dict())


def test_a_smaller_loader_is_like_the_whole_one() -> None:
    loader = DataLoader(recorded.Numbered(), batch_size=4, drop_last=True, collate_fn=list)
    found = smaller_loader(loader, torch.arange(22) < 9)
    assert [[int(example[2]) for example in batch] for batch in found] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]


def test_loaders_that_cannot_be_made_smaller_are_refused() -> None:
    weighted = WeightedRandomSampler(torch.ones(22), 22)
    for loader in (
        DataLoader(recorded.Stream(), batch_size=4),
        recorded.loader(sampler=weighted),
        DataLoader(recorded.Numbered(), batch_size=None),
        [recorded.loader()],
    ):
        with pytest.raises(UnsupportedTrainingError, match="single_run"):
            smaller_loader(loader, torch.ones(22, dtype=torch.bool))
    with pytest.raises(ValueError, match="each of 22 training examples"):
        smaller_loader(recorded.loader(), torch.ones(21, dtype=torch.bool))
