"""How records show themselves: a few lines at a prompt, a small table in a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_MOST = 400  # characters of a fact


def fact_lines(title: str, facts: Mapping[str, object]) -> str:
    """A title, and a line for each fact.

    Example:
        >>> print(fact_lines("Scores of 2 queries", {"estimator": "TracIn"}))
        Scores of 2 queries
          estimator: TracIn
    """
    return "\n".join([title, *(f"  {name}: {_short(fact)}" for name, fact in facts.items())])


def html_facts(title: str, facts: Mapping[str, object]) -> str:
    """The same for a notebook."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th>"
        f"<td style='text-align:left'>{escape(_short(fact))}</td></tr>"
        for name, fact in facts.items()
    )
    return f"<div><p><b>{escape(title)}</b></p><table><tbody>{rows}</tbody></table></div>"


def html_rows(columns: Sequence[str], rows: Sequence[Sequence[object]], note: str = "") -> str:
    """A table for a notebook, with a line below it."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_short(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    below = f"<p>{escape(note)}</p>" if note else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"


def listed(values: Sequence[object], most: int = 8) -> str:
    """Some values, the middle left out where there are many.

    Example:
        >>> listed([1, 2, 3]), listed(range(100), most=4)
        ('1, 2, 3', '0, 1, ..., 98, 99')
    """
    words = [str(value) for value in values]
    if len(words) > most:
        half = most // 2
        words = [*words[:half], "...", *words[-half:]]
    return ", ".join(words)


def _short(fact: object) -> str:
    text = f"{fact:.4g}" if isinstance(fact, float) else str(fact)
    return text if len(text) <= _MOST else f"{text[: _MOST - 3]}..."
