"""The tables of experiments/index are those of its kept results."""

from experiments.index.table import README, written


def test_the_table_is_of_the_results():
    text = README.read_text(encoding="utf-8")
    assert written(text) == text
    assert "| 1024 | factor pairs, int8 |" in text
