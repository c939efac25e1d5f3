"""What experiments/diffusion counts among proponents, its tables and its picture."""

import struct

import pytest
import torch
from torch.utils.data import TensorDataset

from experiments.diffusion import outliers, table
from experiments.diffusion.picture import contact_sheet
from tda_lightning import Scores


def test_proponents_are_counted_as_the_readme_says(monkeypatch):
    monkeypatch.setattr(outliers, "TOP", 2)
    # Two aeroplanes, then two zeros; of five training examples the last two are zeros.
    values = torch.tensor(
        [
            [3.0, 2.0, 1.0, 0.0, 0.0],
            [0.0, 3.0, 2.0, 1.0, 0.0],
            [0.0, 0.0, 1.0, 3.0, 2.0],
            [0.0, 2.0, 0.0, 3.0, 1.0],
        ]
    )
    by_timestep = torch.stack([values / 2, values * 3 / 2])
    found = outliers.judged(
        Scores(values, by_timestep=by_timestep),
        torch.tensor([False, False, False, True, True]),
        torch.tensor([False, False, True, True]),
    )
    assert found == {
        "mnist_of_zeros": pytest.approx(0.75),
        "mnist_of_planes": 0.0,
        "overlap": 0.5,  # example 1
        "generally_influential": 5.0,  # every one is named by a quarter of four queries
        "distinct": 5.0,
        "size_by_timestep": pytest.approx(3.0),
    }


def test_the_kept_results_make_the_tables():
    text = table.README.read_text()
    for name, make in table.TABLES.items():
        path = table.RESULTS / f"{name}.json"
        if path.exists():
            assert make(table.json.loads(path.read_text())) in text


def test_a_contact_sheet_has_a_line_for_each_query():
    train = TensorDataset(torch.rand(4, 3, 8, 8))
    sheet = contact_sheet(train, train, [0, 2], {"a": Scores(torch.rand(4, 4))}, top=3)
    width, height = struct.unpack(">II", sheet[16:24])
    assert (width, height) == (4 * 36 + 12, 2 * 36)
