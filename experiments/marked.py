"""Blocks of a README that code writes, between two marks."""

from __future__ import annotations


def with_block(text: str, name: str, block: str) -> str:
    """``text`` with what stands between the marks of ``name`` replaced by ``block``.

    Example:
        >>> text = "A\\n<!-- table: begin -->\\nold\\n<!-- table: end -->\\nB"
        >>> with_block(text, "table", "new").splitlines()
        ['A', '<!-- table: begin -->', 'new', '<!-- table: end -->', 'B']
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"Expected the marks {begin} and {end} in the text, once each.")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"
