"""Lists of scored examples, ready to be drawn: as pictures, as texts or as rows of one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tda_lightning.report.charts import Chart, number, sparkline
from tda_lightning.report.kept import KeptExamples, shorten

_LETTERS = {"query": 1500, "train": 320}
_COLUMNS = 14


@dataclass(frozen=True)
class Piece:
    """A piece of an example's text; ``share`` is its term's score in percent of the strongest."""

    text: str
    kind: str = ""  # proponent or opponent; nothing where the piece has no score
    share: float = 0.0
    score: str = ""


@dataclass(frozen=True)
class Example:
    """One example and, unless it is a query, its score."""

    index: int
    key: str  # names it to the page's script
    caption: str
    image: str | None
    sound: str | None
    shape: tuple[int, int]  # width and height in which the picture is shown
    text: str | None
    row: Mapping[str, str] | None
    score: str = ""
    kind: str = ""  # proponent, opponent or suspect: a class of the style sheet
    share: float = 0.0  # of the strongest score beside it, in percent
    spark: Chart | None = None
    pieces: tuple[Piece, ...] = ()  # in place of the text
    label: str = ""  # that the score is about, where it is not about removal
    same_sign: str = ""  # runs of an ensemble with the sign of their mean, where others differ


@dataclass(frozen=True)
class Listing:
    """Examples with their strongest first; ``form`` is pictures, texts, table or indices."""

    form: str
    examples: tuple[Example, ...]
    columns: tuple[str, ...] = ()
    left_out: int = 0  # columns that did not fit

    @property
    def pieces(self) -> bool:
        """Whether any example's text is shaded."""
        return any(entry.pieces for entry in self.examples)

    @property
    def captions(self) -> bool:
        """Whether any example has a caption."""
        return any(entry.caption for entry in self.examples)


def example(
    kept: KeptExamples,
    split: str,
    index: int,
    tokens: Sequence[float] | None = None,
    helps: int = 1,
    **score: Any,
) -> Example:
    """Example ``index`` of ``split``.

    Args:
        tokens: score of each term of its loss.
        helps: sign of a score that helps.
    """
    look = kept.in_section(split, index)
    return Example(
        index,
        f"{split}-{index}",
        look.caption,
        look.image,
        look.sound,
        look.shape,
        None if look.text is None else shorten(look.text, _LETTERS[split]),
        look.row,
        pieces=_pieces(look.pieces, tokens, helps),
        **score,
    )


def _pieces(
    pieces: Sequence[tuple[str, int | None]] | None, tokens: Sequence[float] | None, helps: int
) -> tuple[Piece, ...]:
    """A text with the scores of its terms; nothing where they do not fit it."""
    if tokens is None or pieces is None:
        return ()
    positions = [position for _, position in pieces if position is not None]
    if any(not 0 <= position < len(tokens) for position in positions):
        return ()
    strongest = max((abs(tokens[position]) for position in positions), default=0.0)
    shown, left = [], _LETTERS["query"]  # where it is shaded, most of a text may matter
    for text, position in pieces:
        if len(text) > left:
            shown.append(Piece("…"))
            break
        left -= len(text)
        value = 0.0 if position is None else tokens[position]
        if value == 0:
            shown.append(Piece(text))
            continue
        kind = "proponent" if helps * value > 0 else "opponent"
        score = number(value, signed=True, among=strongest)
        shown.append(Piece(text, kind, 100 * abs(value) / strongest, score))
    return tuple(shown)


def listing(
    kept: KeptExamples,
    indices: Sequence[int],
    values: Sequence[float],
    kind: str,
    strongest: float,
    segments: Sequence[Sequence[float]] | None = None,
    tokens: Sequence[Sequence[float]] | None = None,
    labels: Mapping[str, str] | None = None,
    members: Sequence[Sequence[float]] | None = None,
    helps: int = 1,
) -> Listing:
    """Training examples with their scores.

    Args:
        indices: of the examples, in the order in which they are shown.
        values: their scores.
        kind: proponent, opponent or suspect.
        strongest: the size of score that fills a bar.
        segments: for each example its score in each segment.
        tokens: for each example the score of each term of its loss.
        labels: those that scores are about in place of removal, by index.
        members: for each example its score in each run of an ensemble.
        helps: sign of a score that helps.
    """
    tallest = max((abs(part) for parts in segments or () for part in parts), default=0.0)
    examples = tuple(
        example(
            kept,
            "train",
            index,
            score=number(value, kind != "suspect", among=strongest or None),
            kind=kind,
            share=100 * abs(value) / strongest if strongest else 0.0,
            spark=sparkline(segments[place], tallest) if segments else None,
            tokens=tokens[place] if tokens else None,
            helps=helps,
            label=(labels or {}).get(str(index), ""),
            same_sign=_same_sign(value, members[place]) if members else "",
        )
        for place, (index, value) in enumerate(zip(indices, values, strict=True))
    )
    return arrange(examples)


def _same_sign(mean: float, members: Sequence[float]) -> str:
    """How many members have the sign of their mean; nothing where none has the other.

    Example:
        >>> _same_sign(1.0, [3.0, -1.0])
        '1/2'
    """
    if all(mean * value >= 0 for value in members):
        return ""
    return f"{sum(mean * value > 0 for value in members)}/{len(members)}"


def arrange(examples: tuple[Example, ...]) -> Listing:
    """Choose the form that shows these examples, and the columns of a table."""
    if any(entry.row is not None for entry in examples):
        names = dict.fromkeys(name for entry in examples for name in entry.row or ())
        columns = tuple(names)[:_COLUMNS]
        return Listing("table", examples, columns, len(names) - len(columns))
    if any(entry.image is not None for entry in examples):
        return Listing("pictures", examples)
    if any(entry.text is not None for entry in examples):
        return Listing("texts", examples)
    return Listing("indices", examples)
