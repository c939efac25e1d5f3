"""Examples as JSON: the structure, shapes and types of a data set's items, learned from some of
them. What arrives is compared with that and copied number by number; nothing is executed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tda_lightning.runtime.structures import parts, with_parts
from tda_lightning.serve.refusal import Refusal

_PROBED = 32  # items by which a form is told
# Times the longest of them: what a model takes of longer ones grows, with attention by the square.
_LONGER = 4
_SHORT = 1000  # letters that a text may have in any case
_SHOWN = 80  # letters of what arrived, in a message


class Form(ABC):
    """What JSON an item, or a part of one, is written as."""

    @abstractmethod
    def read(self, value: object, place: str) -> Any:
        """The part that ``value`` stands for.

        Args:
            place: where it stands in the request, for messages.

        Raises:
            Refusal: it has another form.
        """

    @abstractmethod
    def write(self, part: Any) -> object:
        """The part as JSON."""

    @property
    @abstractmethod
    def words(self) -> str:
        """What is expected, in words."""

    def refused(self, value: object, place: str) -> Refusal:
        """That something else arrived."""
        return Refusal(400, f"{place} must be {self.words}; got {_shown(value)}.")


@dataclass(frozen=True)
class Numbers(Form):
    """A tensor, an array or a number.

    Attributes:
        like: one of its kind.
        dtype: of its numbers.
        shape: the lengths that each axis may have.
    """

    like: Any
    dtype: torch.dtype
    shape: tuple[range, ...]

    def read(self, value: object, place: str) -> Any:
        rows: list[Any] = [value]
        lengths: list[int] = []
        for allowed in self.shape:
            if not all(isinstance(row, list) for row in rows):
                raise self.refused(value, place)
            found = {len(row) for row in rows}
            if len(found) != 1 or not all(length in allowed for length in found):
                raise self.refused(value, place)
            lengths += found
            rows = [entry for row in rows for entry in row]
        if not all(self._fits(entry) for entry in rows):
            raise self.refused(value, place)
        made = torch.tensor(rows, dtype=self.dtype).reshape(lengths)
        if self.dtype.is_floating_point and not bool(made.isfinite().all()):
            raise Refusal(400, f"{place} holds a number that is too large for {self.type_name}.")
        if isinstance(self.like, Tensor):
            return made
        array = made.numpy()
        if isinstance(self.like, np.ndarray):
            return array.astype(self.like.dtype)
        if isinstance(self.like, np.generic):
            return self.like.dtype.type(array.item())
        return array.tolist() if isinstance(self.like, list) else type(self.like)(made.item())

    def _fits(self, entry: object) -> bool:
        if self.dtype == torch.bool:
            return isinstance(entry, bool)
        if isinstance(entry, bool) or not isinstance(entry, int | float):
            return False
        if self.dtype.is_floating_point:
            return abs(entry) < 1 << 1000 if isinstance(entry, int) else math.isfinite(entry)
        bounds = torch.iinfo(self.dtype)
        return isinstance(entry, int) and bounds.min <= entry <= bounds.max

    def write(self, part: Any) -> object:
        if isinstance(part, Tensor):
            return part.detach().cpu().tolist()
        return part.tolist() if isinstance(part, np.ndarray | np.generic) else part

    @property
    def type_name(self) -> str:
        """The type of its numbers."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def words(self) -> str:
        if not self.shape:
            return f"one number ({self.type_name})"
        shape = ", ".join(
            f"{own[0]}" if len(own) == 1 else f"{own[0]} to {own[-1]}" for own in self.shape
        )
        return f"numbers ({self.type_name}) in lists of the shape [{shape}]"


@dataclass(frozen=True)
class Text(Form):
    """A text.

    Attributes:
        most: letters that it may have.
    """

    most: int

    def read(self, value: object, place: str) -> str:
        if not isinstance(value, str) or len(value) > self.most:
            raise self.refused(value, place)
        return value

    def write(self, part: str) -> str:
        return part

    @property
    def words(self) -> str:
        return f"a text of at most {self.most} letters"


@dataclass(frozen=True)
class Nothing(Form):
    """None."""

    def read(self, value: object, place: str) -> None:
        if value is not None:
            raise self.refused(value, place)

    def write(self, part: None) -> None:
        return None

    @property
    def words(self) -> str:
        return "null"


@dataclass(frozen=True)
class Container(Form):
    """A mapping or an object (an object of JSON), a tuple or a list (an array of JSON)."""

    like: Any
    forms: Mapping[Any, Form]

    def read(self, value: object, place: str) -> Any:
        if isinstance(self.like, list | tuple):
            if not isinstance(value, list) or len(value) != len(self.forms):
                raise self.refused(value, place)
            given: dict[Any, object] = dict(enumerate(value))
        else:
            if not isinstance(value, dict) or set(value) != set(map(str, self.forms)):
                raise self.refused(value, place)
            given = {key: value[str(key)] for key in self.forms}
        read = {key: form.read(given[key], f"{place}[{key}]") for key, form in self.forms.items()}
        return with_parts(self.like, read)

    def write(self, part: Any) -> object:
        inside = parts(part) or {}
        written = {key: form.write(inside[key]) for key, form in self.forms.items()}
        if isinstance(self.like, list | tuple):
            return list(written.values())
        return {str(key): one for key, one in written.items()}

    @property
    def words(self) -> str:
        if isinstance(self.like, list | tuple):
            return f"a list [{', '.join(form.words for form in self.forms.values())}]"
        return "{" + ", ".join(f'"{key}": {form.words}' for key, form in self.forms.items()) + "}"


def form_of_dataset(dataset: Any) -> Form:
    """The form of a data set's items, from some spread over it.

    Raises:
        ValueError: items hold what JSON has no form for, or differ from one another in structure.
    """
    count = len(dataset)
    chosen = sorted({place * (count - 1) // max(1, _PROBED - 1) for place in range(_PROBED)})
    return form_of([dataset[index] for index in chosen if index < count], "an example")


def form_of(items: Sequence[Any], what: str) -> Form:
    """The form of things of one kind.

    Raises:
        ValueError: JSON has none.
    """
    first = items[0]
    if len({type(item) for item in items}) > 1:
        raise ValueError(f"{what} is not of one type in all of them")
    if first is None:
        return Nothing()
    if isinstance(first, str):
        return Text(max(_SHORT, _LONGER * max(map(len, items))))
    if isinstance(first, bool | int | float | Tensor | np.ndarray | np.generic):
        return _numbers(items, what)
    if isinstance(first, list) and first and all(_plain_numbers(item) for item in items):
        return _numbers(items, what)
    inside = [parts(item) for item in items]
    if inside[0] is None:
        raise ValueError(f"{what} holds a {type(first).__name__}")
    if isinstance(first, Mapping) and not isinstance(first, MutableMapping):
        raise ValueError(f"{what} is a {type(first).__name__}, which takes no new values")
    keys = list(inside[0])
    if any(own is None or list(own) != keys for own in inside):
        raise ValueError(f"{what} does not have the same parts in all of them")
    if len(set(map(str, keys))) < len(keys):
        raise ValueError(f"{what} has parts whose names read alike")
    forms = {
        key: form_of([own[key] for own in inside if own is not None], f"{what}[{key}]")
        for key in keys
    }
    return Container(first, forms)


def _numbers(items: Sequence[Any], what: str) -> Numbers:
    # Python's floats are float64, which torch would halve.
    exact = isinstance(items[0], float | list)
    try:
        tensors = [torch.as_tensor(np.asarray(item) if exact else item) for item in items]
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:  # texts, dates, 10**70
        raise ValueError(f"{what} is no number that a tensor can hold") from error
    first = tensors[0]
    if any(one.dtype != first.dtype or one.dim() != first.dim() for one in tensors):
        raise ValueError(f"{what} differs in type or number of axes")
    if first.is_complex() or first.is_quantized or first.layout != torch.strided:
        raise ValueError(f"{what} is a {first.dtype} tensor")
    sizes = zip(*(one.shape for one in tensors), strict=True)
    shape = tuple(
        range(own[0], own[0] + 1) if len(set(own)) == 1 else range(1, _LONGER * max(own) + 1)
        for own in sizes
    )
    return Numbers(items[0], first.dtype, shape)


def _plain_numbers(item: Any) -> bool:
    return all(isinstance(entry, int | float) and not isinstance(entry, bool) for entry in item)


def _shown(value: object) -> str:
    """What arrived, briefly: the shape of lists, the keys of objects."""
    if isinstance(value, list):
        shape: list[str] = []
        while isinstance(value, list) and len(shape) < 8:
            shape.append(str(len(value)))
            value = value[0] if value else None
        return f"lists of the shape [{', '.join(shape)}], or with a part that does not fit"
    if isinstance(value, dict):
        return f"an object with {', '.join(map(repr, value)) or 'nothing'}"[:_SHOWN]
    if isinstance(value, str):
        return f"a text of {len(value)} letters"
    return "null" if value is None else repr(value)[:_SHOWN]
