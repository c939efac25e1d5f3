"""`tda serve` finds the index of a run, or says what to do."""

import pytest

from tda_lightning.cli.commands.serve import _index_folder
from tda_lightning.store.layout import INDEX_FILE


def test_the_only_index_of_a_run_is_served(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no index.*tda index .*index=FOLDER"):
        _index_folder(tmp_path, None)
    assert _index_folder(tmp_path, "elsewhere").name == "elsewhere"
    for name in ("source", "tracin"):
        folder = tmp_path / "index" / name
        folder.mkdir(parents=True)
        (folder / INDEX_FILE).touch()
        if name == "source":
            assert _index_folder(tmp_path, None) == folder
    with pytest.raises(ValueError, match=r"2 indices.*source.*tracin"):
        _index_folder(tmp_path, None)
