"""Columns of the data: by what training examples and queries are grouped, filtered and judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

Columns = Mapping[str, Sequence[object]]

_LABEL_NAMES = ("label", "class", "labels", "target")
_MANY = 10_000  # examples that are read one by one to find their labels
_GROUPS = 40
_DISTINCT_NUMBERS = 12
_WIDE = 32  # columns of a table that are still grouped by


@dataclass(frozen=True)
class Column:
    """A column with few distinct values.

    Attributes:
        name: of the column.
        groups: its values in words, in order.
        train: the group of each training example, int64 [train].
        query: the group of each query, int64 [query]; None where unknown.
    """

    name: str
    groups: tuple[str, ...]
    train: np.ndarray
    query: np.ndarray | None

    @property
    def is_label(self) -> bool:
        """Whether it holds what the model should predict."""
        return self.name.lower() in _LABEL_NAMES


def group(train: Columns, query: Columns, queries: Sequence[int]) -> list[Column]:
    """The columns as groups: numbers of many values in quarters, rare values together.

    Args:
        train: values by the name of their column, one for each training example.
        query: likewise for each query of the data set.
        queries: positions of the scored queries in the data set.
    """
    columns = []
    for name, values in train.items():
        own = _plain(values)
        asked = [_plain(query[name])[index] for index in queries] if name in query else None
        words = _in_words(own, asked)
        if words is None or len(set(words[0])) < 2:
            continue
        own_words, asked_words = words
        groups = _ordered(own_words, asked_words or [])
        place = {text: number for number, text in enumerate(groups)}
        other = len(groups) - 1  # where there are too many
        numbers = [
            np.array([place.get(text, other) for text in part], dtype=np.int64)
            for part in (own_words, asked_words or [])
        ]
        columns.append(Column(str(name), groups, numbers[0], None if asked is None else numbers[1]))
    columns.sort(key=lambda column: not column.is_label)
    return columns


def guess(dataset: object, class_names: Sequence[str] | None = None) -> dict[str, Sequence[object]]:
    """The labels of a data set, under "label", and the columns of a small table of numbers.

    Labels are read from a ``TensorDataset``, from ``targets`` or ``labels``, from a column of that
    name, or from the examples themselves where these are few. Nothing where none are found.
    """
    found: dict[str, Sequence[object]] = {}
    labels = raw_labels(dataset)
    if labels is not None and not any(isinstance(label, float) for label in labels):
        found["label"] = [_named(label, class_names) for label in labels]
    if isinstance(dataset, TensorDataset):
        first = dataset.tensors[0]
        if first.ndim == 2 and first.is_floating_point() and first.shape[1] <= _WIDE:
            found |= {f"x{number}": values for number, values in enumerate(first.T.tolist())}
    return found


def raw_labels(dataset: object) -> list[Any] | None:
    """One label for each example as the data set has them: numbers or texts; None where unknown."""
    if isinstance(dataset, Subset):
        inner = raw_labels(dataset.dataset)
        return None if inner is None else [inner[index] for index in dataset.indices]
    if isinstance(dataset, TensorDataset):
        last = dataset.tensors[-1]
        last = last[:, 0] if last.ndim == 2 and last.shape[1] == 1 else last
        return last.tolist() if len(dataset.tensors) > 1 and last.ndim == 1 else None
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return None
    for name in ("labels", "targets", *_LABEL_NAMES):
        listed = getattr(dataset, name, None) if name in ("labels", "targets") else None
        if listed is None and name in (getattr(dataset, "column_names", None) or ()):
            listed = dataset[name]
        if listed is not None and hasattr(listed, "__len__") and len(listed) == len(dataset):
            return _scalars(listed)
    if len(dataset) > _MANY:
        return None
    return _scalars([_label_of(dataset[index]) for index in range(len(dataset))])


def _label_of(item: object) -> object:
    if isinstance(item, Mapping):
        return next((item[name] for name in _LABEL_NAMES if name in item), None)
    return item[1] if isinstance(item, tuple | list) and len(item) > 1 else None


def _scalars(labels: Any) -> list[Any] | None:
    """Labels as numbers or texts; None if one is neither."""
    plain = _plain(labels)
    return plain if all(isinstance(label, int | float | str) for label in plain) else None


def _plain(values: Any) -> list[Any]:
    listed = values.tolist() if hasattr(values, "tolist") else values
    return [
        value.item()
        if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1)
        else value
        for value in listed
    ]


def _named(label: object, names: Sequence[str] | None) -> str:
    if isinstance(label, int) and names is not None and 0 <= label < len(names):
        return str(names[label])
    return label if isinstance(label, str) else f"label {label}"


def _in_words(
    train: list[Any], query: list[Any] | None
) -> tuple[list[str], list[str] | None] | None:
    """Values as the names of their groups; None for texts that are hardly ever the same."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in train):
        if len(set(train)) > _DISTINCT_NUMBERS and any(isinstance(value, float) for value in train):
            edges = np.unique(np.nanquantile(np.array(train, dtype=float), [0.25, 0.5, 0.75]))
            both = [_quarters(part, edges) for part in (train, query or [])]
            return both[0], None if query is None else both[1]
    elif len(set(map(str, train))) > max(_GROUPS, len(train) // 2):
        return None
    return [str(value) for value in train], None if query is None else [str(v) for v in query]


def _quarters(values: list[Any], edges: np.ndarray) -> list[str]:
    names = [f"\N{LESS-THAN OR EQUAL TO} {edges[0]:.4g}"]
    names += [f"{low:.4g} to {high:.4g}" for low, high in zip(edges, edges[1:], strict=False)]
    names.append(f"> {edges[-1]:.4g}")
    places = np.searchsorted(edges, np.array(values, dtype=float))
    return [names[place] for place in places.tolist()]


def _ordered(train: list[str], query: list[str]) -> tuple[str, ...]:
    """Names of the groups, sorted; the rarest are one group, "other", at the end."""
    counts = Counter(train)
    names = [name for name, _ in counts.most_common()]
    names += [name for name in dict.fromkeys(query) if name not in counts]
    few = names if len(names) <= _GROUPS else names[: _GROUPS - 1]
    return (*sorted(few, key=_as_number), *(["other"] if few is not names else []))


def _as_number(name: str) -> tuple[int, float, str]:
    """Sorts ranges and numbers by size, before words."""
    first = name.replace("label ", "").split(" to ")[0].strip("\N{LESS-THAN OR EQUAL TO}> ")
    try:
        value = float(first)
    except ValueError:
        return (2, 0.0, name)
    if name[0] in "\N{LESS-THAN OR EQUAL TO}>":  # the ends of the quarters
        return (0 if name[0] != ">" else 1, value, name)
    return (1, value, name)
