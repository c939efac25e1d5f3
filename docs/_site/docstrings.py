"""Docstrings are reStructuredText in a few places: formulas, roles, references. Here they become
Markdown.

Formulas become MathML, which browsers draw by themselves.
"""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

import griffe
from latex2mathml.converter import convert

_BLOCK = re.compile(r"^( *)\.\. math::[ ]*\n((?:\1 +\S.*\n?|\s*\n)+)", re.MULTILINE)
_INLINE = re.compile(r":math:`([^`]+)`")
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([^`]+)`")


class Docstrings(griffe.Extension):
    """Rewrites the docstring of every object that mkdocstrings shows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring as Markdown.

    Example:
        >>> as_markdown("See :func:`~a.b`::")
        'See `a.b`:'
    """
    text = _BLOCK.sub(_formula, text)
    # In a span, since Markdown would take a formula at the start of a line for a paragraph.
    text = _INLINE.sub(lambda m: f"<span>{convert(' '.join(m[1].split()))}</span>", text)
    text = _ROLE.sub(r"`\1`", text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return re.sub(r"^( *)\| ", r"\1- ", text, flags=re.MULTILINE)


def _formula(match: re.Match[str]) -> str:
    latex = " ".join(dedent(match[2]).split())
    return f"{match[1]}{convert(latex, display='block')}\n\n"
