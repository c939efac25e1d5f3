"""How examples look to the page and to other clients: the report's renderings as JSON."""

from __future__ import annotations

from collections import OrderedDict

from tda_lightning.records.rendered import Renderer
from tda_lightning.report.kept import look_of

_REMEMBERED = 4096
_PIXELS = 224  # of the longer side of a picture, as sent


class Looks:
    """The last few thousand examples that were looked at, rendered once each.

    Args:
        render: shows an example to a reader.
    """

    def __init__(self, render: Renderer) -> None:
        self._render = render
        self._known: OrderedDict[tuple[str, int], dict[str, object]] = OrderedDict()

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
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return {"split": split, "index": index, **self._known[key]}
