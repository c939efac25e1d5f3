"""How the examples of any data set look, guessed from their types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tda_lightning.records.rendered import Rendered


@dataclass(frozen=True)
class DatasetRenderer:
    """Shows the examples of map-style data sets, guessing from their types.

    The input is the first entry of a tuple, or the entry of a dictionary under one of the usual
    names; a single number or text beside it is the label. Images are tensors [channels, height,
    width], rows are 1-d floats, texts are strings or integer tokens.

    Args:
        train: the training set; None shows indices only.
        query: the queries; None shows indices only.
        class_names: by integer label.
        columns: names of the entries of a 1-d float input.
        decode: turns a list of tokens into text; without it the numbers are shown.
    """

    train: object = None
    query: object = None
    class_names: Sequence[str] | None = None
    columns: Sequence[str] | None = None
    decode: Callable[[list[int]], str] | None = None

    def __call__(self, split: str, index: int) -> Rendered:
        """Example ``index`` of ``split``."""
        dataset = self.train if split == "train" else self.query
        # An iterable data set has no example number ``index`` to show.
        return self.render(dataset[index]) if hasattr(dataset, "__getitem__") else Rendered()

    def render(self, item: object) -> Rendered:
        """What one item of a data set looks like."""
        if isinstance(item, Rendered):
            return item
        example, label = _split(item)
        return self._input(example, self._label(label))

    def _input(self, example: object, caption: str) -> Rendered:
        if isinstance(example, str):
            return Rendered(caption, text=example)
        if isinstance(example, Mapping):
            return Rendered(caption, row={str(name): cell for name, cell in example.items()})
        array = _as_array(example)
        if array is None:
            return Rendered(caption, text=str(example))
        if _is_image(array):
            return Rendered(caption, image=array)
        if array.ndim <= 1 and np.issubdtype(array.dtype, np.integer):
            tokens = array.reshape(-1).tolist()
            words = self.decode(tokens) if self.decode else " ".join(map(str, tokens))
            return Rendered(caption, text=words)
        if array.ndim <= 1:
            cells = array.reshape(-1).tolist()
            names = self.columns or [f"x{number}" for number in range(len(cells))]
            return Rendered(caption, row=dict(zip(names, cells, strict=False)))
        return Rendered(caption, text=f"array of shape {list(array.shape)}")

    def _label(self, label: object) -> str:
        if label is None or isinstance(label, str):
            return label or ""
        array = _as_array(label)
        if array is None or array.size != 1:
            return ""
        number = array.reshape(-1)[0].item()
        if isinstance(number, int) and not isinstance(number, bool):
            known = self.class_names is not None and 0 <= number < len(self.class_names)
            return (
                str(self.class_names[number]) if known and self.class_names else f"label {number}"
            )
        return f"target {number:.4g}" if isinstance(number, float) else f"label {number}"


_INPUT_NAMES = ("image", "pixel_values", "input_ids", "text", "input", "inputs", "x")
_LABEL_NAMES = ("label", "labels", "target", "targets", "y")


def _split(item: object) -> tuple[object, object]:
    """The input and the label of an item, which may lack the latter."""
    if isinstance(item, Mapping):
        label = next((item[name] for name in _LABEL_NAMES if name in item), None)
        for name in _INPUT_NAMES:
            if name in item:
                return item[name], label
        return {name: cell for name, cell in item.items() if name not in _LABEL_NAMES}, label
    if isinstance(item, tuple | list) and item:
        return item[0], (item[1] if len(item) > 1 else None)
    return item, None


def _as_array(value: object) -> np.ndarray | None:
    """Tensors, arrays, numbers, lists of numbers and PIL images as an array; else None."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype is torch.bfloat16 else value).numpy()
    array: np.ndarray = np.asarray(value)
    return array if array.dtype.kind in "biuf" else None


def _is_image(array: np.ndarray) -> bool:
    if array.ndim == 2:
        return bool(min(array.shape) > 3)
    return array.ndim == 3 and bool(array.shape[0] in (1, 3) or array.shape[2] in (1, 3, 4))
