"""Files of edits: written and read back, and refused in words where they are odd."""

import json

import pytest
import torch

from tda_lightning.edits import Relabel, Removal, load_edits, save_edits


def test_written_and_read_back(tmp_path):
    edits = [Removal(3), Relabel(1, 7), Relabel(2, torch.tensor([0.5, 1.0])), Relabel(4, "cat")]
    save_edits(edits, tmp_path / "edits.json", num_train=5)
    read = load_edits(tmp_path / "edits.json", num_train=5)
    assert read == [Removal(3), Relabel(1, 7), Relabel(2, [0.5, 1.0]), Relabel(4, "cat")]


GOOD = {"format": "tda-lightning edits", "version": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "got no JSON"),
        ([1], "expected a file of edits"),
        ({"edits": []}, "expected a file of edits"),
        ({**GOOD, "version": 2, "edits": []}, "got version 2"),
        ({**GOOD, "edits": []}, "got no edits: mark examples"),
        ({**GOOD, "edits": [3]}, "got 3 as edit 0"),
        ({**GOOD, "edits": [{"kind": "Removal", "index": -1}]}, "got the index -1 in edit 0"),
        ({**GOOD, "edits": [{"kind": "Removal", "index": True}]}, "got the index True in edit 0"),
        ({**GOOD, "edits": [{"kind": "Relabel", "index": 1}]}, "as edit 0"),
        ({**GOOD, "edits": [{"kind": "Doubled", "index": 1}]}, "'Doubled'"),
        ({**GOOD, "edits": [{"kind": "Removal", "index": 5}]}, "example 5; expected 0 to 4"),
        ({**GOOD, "edits": [{"kind": "Removal", "index": 1}] * 2}, "two edits of training exam"),
        ({**GOOD, "num_train": 6, "edits": [{"kind": "Removal", "index": 1}]}, "count 6 .* has 5"),
    ],
)
def test_odd_files_are_refused(content, message, tmp_path):
    path = tmp_path / "edits.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_edits(path, num_train=5)


def test_a_file_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="Export edits from a report"):
        load_edits(tmp_path / "none.json")
