"""How examples look to the page and to other clients: the report's renderings as JSON."""

from __future__ import annotations

from collections import OrderedDict

from tda_lightning.records.rendered import Renderer
from tda_lightning.report.kept import look_of

_REMEMBERED = 4096
_LETTERS = 1 << 26  # of all that are remembered: a sound may take a million
_PIXELS = 224  # of the longer side of a picture, as sent


class Looks:
    """The last few thousand examples that were looked at, or fewer large ones, rendered once each.

    Args:
        render: shows an example to a reader.
    """

    def __init__(self, render: Renderer) -> None:
        self._render = render
        self._known: OrderedDict[tuple[str, int], dict[str, object]] = OrderedDict()
        self._letters = 0

    def of(self, split: str, index: int) -> dict[str, object]:
        """Caption, picture, sound, text and table row of an example; those that it has."""
        key = (split, index)
        if key not in self._known:
            look = look_of(self._render(split, index), _PIXELS)
            shown = {
                "caption": look.caption,
                "image": look.image,
                "sound": look.sound,
                "text": look.text,
                "row": None if look.row is None else dict(look.row),
            }
            self._known[key] = {name: value for name, value in shown.items() if value is not None}
            self._letters += _size(self._known[key])
            while len(self._known) > 1 and (
                len(self._known) > _REMEMBERED or self._letters > _LETTERS
            ):
                self._letters -= _size(self._known.popitem(last=False)[1])
        self._known.move_to_end(key)
        return {"split": split, "index": index, **self._known[key]}


def _size(look: dict[str, object]) -> int:
    return sum(len(str(part)) for part in look.values())
