"""A table of text on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of text under their column names.

    Example:
        >>> print_table("Errors", ["layer", "error"], [["head", "1e-07"]])
            Errors
        ┏━━━━━━━┳━━━━━━━┓
        ┃ layer ┃ error ┃
        ┡━━━━━━━╇━━━━━━━┩
        │ head  │ 1e-07 │
        └───────┴───────┘
    """
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
