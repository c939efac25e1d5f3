"""experiments/serve: the README has what the results say."""

import json

from experiments.marked import with_block
from experiments.serve import table


def test_the_readme_has_the_kept_waits():
    rows = json.loads((table.HERE / "results" / "load.json").read_text())["rows"]
    text = (table.HERE / "README.md").read_text(encoding="utf-8")
    assert with_block(text, "load", table.load_table(rows)) == text
    assert all(row["walks"] == row["searches"] for row in rows if row["batch"] == 1)
