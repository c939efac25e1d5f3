"""What a page keeps of the examples: each is rendered once, and pictures, sounds and texts are
left out when the page is full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from tda_lightning.records.rendered import Rendered, Renderer
from tda_lightning.report.pictures import picture
from tda_lightning.report.sounds import sound

# Queries are few, so they are shown larger.
_PIXELS = {"query": 112, "train": 64}
_ENLARGED = 256
_LETTERS = 4000


@dataclass(frozen=True)
class Look:
    """What is kept of one example; ``shape`` is the width and height of the picture as shown."""

    caption: str
    image: str | None = None
    shape: tuple[int, int] = (0, 0)
    sound: str | None = None
    text: str | None = None
    row: Mapping[str, str] | None = None
    pieces: tuple[tuple[str, int | None], ...] | None = None
    left_out: bool = False  # it did not fit into the page

    @property
    def size(self) -> int:
        """About how many bytes it takes in the page."""
        parts = [self.image or "", self.sound or "", self.text or "", *(self.row or {}).values()]
        parts += [text for text, _ in self.pieces or ()]
        return 120 + sum(map(len, parts)) + sum(map(len, self.row or ())) + 8 * len(parts)

    def without_content(self) -> Look:
        """Its caption alone."""
        return Look(self.caption, left_out=True)


class KeptExamples:
    """Examples as a page shows them, as long as there is room.

    Args:
        render: shows an example to a reader.
        room: bytes that pictures, sounds, texts and rows may take in all.

    Attributes:
        kept: by split and index, what is in the page beside its sections.
        left_out: whether anything did not fit.
    """

    def __init__(self, render: Renderer, room: float) -> None:
        self.render = render
        self.room = room
        self.kept: dict[tuple[str, int], Look] = {}
        self.left_out = False
        self._looks: dict[tuple[str, int], Look] = {}
        self._in_sections: set[tuple[str, int]] = set()

    def in_section(self, split: str, index: int) -> Look:
        """The example for a section of the page that shows it without any script."""
        look = self._fitting(self._look(split, index))
        if not look.left_out:
            self._in_sections.add((split, index))
        return look

    def keep(self, split: str, index: int) -> bool:
        """Keep the example for the workbench, which reads pictures and sounds that a section shows
        from there; False where the page is full."""
        key = (split, index)
        if key in self.kept:
            return True
        look = self._look(split, index)
        if key in self._in_sections:
            # The script reads them from the section.
            image, heard = look.image and "", look.sound and ""
            look = replace(look, image=image, sound=heard)
        fitting = self._fitting(look)
        if not fitting.left_out:
            self.kept[key] = fitting
        return not fitting.left_out

    def enlarged(self, split: str, index: int) -> str | None:
        """A larger picture of the example, where its own is larger and there is room."""
        image = self._rendered(split, index).image
        look = self._look(split, index)
        if image is None or look.image is None:
            return None
        uri, width, height = picture(image, _ENLARGED)
        if max(width, height) <= _PIXELS[split] or len(uri) > self.room:
            return None
        self.room -= len(uri)
        return uri

    def _fitting(self, look: Look) -> Look:
        if look.size > self.room:
            self.left_out = True
            return look.without_content()
        self.room -= look.size
        return look

    def _look(self, split: str, index: int) -> Look:
        key = (split, index)
        if key not in self._looks:
            self._looks[key] = look_of(self._rendered(split, index), _PIXELS[split])
        return self._looks[key]

    def _rendered(self, split: str, index: int) -> Rendered:
        rendered = self.render(split, index)
        if not isinstance(rendered, Rendered):
            raise TypeError(
                f"render({split!r}, {index}) must return a tda_lightning.report.Rendered, got "
                f"{type(rendered).__name__}."
            )
        return rendered


def look_of(rendered: Rendered, pixels: int) -> Look:
    """What is kept of an example whose picture is shown in ``pixels``."""
    image, shape = None, (0, 0)
    if rendered.image is not None:
        image, width, height = picture(rendered.image, pixels)
        # Small pictures are enlarged to the size of the others, by the browser.
        scale = pixels / max(width, height)
        shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    row = rendered.row
    pieces = None
    if rendered.pieces is not None:
        pieces = tuple(_cut_pieces(rendered.pieces, _LETTERS))
    return Look(
        shorten(rendered.caption, 60),
        image,
        shape,
        None if rendered.sound is None else sound(*rendered.sound),
        None if rendered.text is None else shorten(rendered.text, _LETTERS),
        None if row is None else {str(name): cell(value) for name, value in row.items()},
        pieces,
    )


def _cut_pieces(
    pieces: Sequence[tuple[str, int | None]], letters: int
) -> list[tuple[str, int | None]]:
    shown: list[tuple[str, int | None]] = []
    for text, position in pieces:
        if len(text) > letters:
            return [*shown, ("…", None)]
        letters -= len(text)
        shown.append((text, position))
    return shown


def shorten(text: str, letters: int) -> str:
    """``text``, cut with an ellipsis where it is longer than ``letters``."""
    text = str(text)
    return text if len(text) <= letters else text[: letters - 1].rstrip() + "…"


def cell(value: Any) -> str:
    """A value as a cell of a table."""
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        value = value.item()
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")
    return shorten(str(value), 40)
