"""Some edits of one training set: the columns of an attribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tda_lightning.edits.documents import DocumentRemoval, require_own_labels
from tda_lightning.edits.edits import Edit, Term
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.provenance import EditRecord
from tda_lightning.runtime.indexed import Keys, one_key
from tda_lightning.runtime.loading import ExampleSource


@dataclass(frozen=True)
class EditedRows:
    """What a batch of the gradients that edits are made of belongs to.

    Attributes:
        columns: of the scores, int64 [batch].
        examples: indices in the training set; from its size on, of examples from elsewhere.
        used_as: the training examples whose uses they go with; -1 for an average one.
        signs: what they count by, float64 [batch].
        labels: other labels than their own, by position in the batch.
    """

    columns: Tensor
    examples: Tensor
    used_as: Tensor
    signs: Tensor
    labels: Mapping[int, object]


class EditSet:
    """The edits that are scored, column by column.

    Args:
        edits: at least one.
        source: the training set.

    Attributes:
        terms: the gradients that make up the columns, as (column, term).
        source: reads the examples of ``terms``, by their positions.

    Raises:
        ValueError: no edits, an index outside the training set, or an example of another form than
            those of the training set; names the edit.
    """

    def __init__(self, edits: Sequence[Edit], source: ExampleSource) -> None:
        if not len(edits):
            raise ValueError("edits is empty: give at least one, or None to score every removal.")
        self.edits = list(edits)
        self.terms = [
            (column, term) for column, edit in enumerate(self.edits) for term in edit.terms()
        ]
        self._require_fitting(source)
        self.source = source.with_dataset(
            _TermExamples(source.dataset, [term for _, term in self.terms], source.keys)
        )
        self._by_index: dict[int, list[int]] = {}
        for position in range(len(self.terms)):
            index = self.used_with(position)
            if index is not None:
                self._by_index.setdefault(index, []).append(position)

    def __len__(self) -> int:
        return len(self.edits)

    def used_with(self, position: int) -> int | None:
        """The training example whose uses the term at ``position`` goes with; None for those of an
        average one."""
        column, term = self.terms[position]
        return self.edits[column].index if term.used_with is None else term.used_with

    def positions_of(self, index: int) -> list[int]:
        """Positions of the terms that go with a use of training example ``index``."""
        return self._by_index.get(index, [])

    def rows(self, places: Tensor, num_train: int) -> EditedRows:
        """What the gradients at some positions of ``terms`` belong to.

        Args:
            places: positions, int64 [batch].
            num_train: training examples.
        """
        chosen = [self.terms[place] for place in places.tolist()]
        used_with = [self.used_with(place) for place in places.tolist()]
        return EditedRows(
            columns=torch.tensor([column for column, _ in chosen]),
            # The index seeds an example's noise; those from elsewhere come after all others.
            examples=torch.tensor(
                [
                    num_train + column if term.index is None else term.index
                    for column, term in chosen
                ]
            ),
            used_as=torch.tensor([-1 if index is None else index for index in used_with]),
            signs=torch.tensor([term.sign for _, term in chosen], dtype=torch.float64),
            labels={n: term.labels[0] for n, (_, term) in enumerate(chosen) if term.labels},
        )

    def require_in_batches(self, question: str) -> None:
        """Refuse edits that no recorded batch knows of.

        Raises:
            UnsupportedTrainingError: names the edit.
        """
        for position, (column, _) in enumerate(self.terms):
            edit = self.edits[column]
            if self.used_with(position) is None:
                raise UnsupportedTrainingError(
                    f"Edit {column}, {type(edit).__name__}, changes no example of the recorded "
                    f"batches, and {question} follows those alone. Use "
                    "Source(order='average'), InfluenceFunction or TracIn."
                )

    def records(self) -> list[EditRecord]:
        """The edits for the provenance."""
        records: list[EditRecord] = []
        for edit in self.edits:
            record: EditRecord = {"kind": type(edit).__name__}
            if edit.index is not None:
                record["index"] = edit.index
            if isinstance(edit, DocumentRemoval):
                record["document"] = edit.document
            for term in edit.terms():
                for label in term.labels:
                    record["label"] = _plain(label)
            records.append(record)
        return records

    def _require_fitting(self, source: ExampleSource) -> None:
        count = len(source)
        for column, term in self.terms:
            name = f"Edit {column}, {type(self.edits[column]).__name__},"
            if term.index is None:
                _require_same_form(source, term.example, name)
                continue
            if not isinstance(term.index, Integral):
                raise TypeError(
                    f"{name} must name a training example by its whole number, got "
                    f"{term.index!r}. Give one edit for each example."
                )
            if not 0 <= term.index < count:
                raise ValueError(
                    f"{name} names training example {term.index}; expected 0 to {count - 1}."
                )
        first = next((edit for edit in self.edits if isinstance(edit, DocumentRemoval)), None)
        if first is not None:
            require_own_labels(first.pieces[0][1], source.join([first.pieces[0][1]]))


@dataclass(frozen=True)
class _TermExamples(Dataset[object]):
    dataset: Dataset[object]
    terms: Sequence[Term]
    keys: Keys | None

    def __len__(self) -> int:
        return len(self.terms)

    def __getitem__(self, position: Any) -> object:
        if self.keys is not None and self.keys is not one_key:  # the data set makes the batches
            asked = [self.terms[int(one)].index for one in position]
            keys: Any = self.keys([index for index in asked if index is not None])
            return self.dataset[keys]
        term = self.terms[position]
        return term.example if term.index is None else self.dataset[term.index]


def _require_same_form(source: ExampleSource, example: object, name: str) -> None:
    """Refuse an example that cannot stand in a batch with the training set's own."""
    own = source.dataset[0]
    try:
        source.join([own, example])
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{name} gives an example of another form than those of the training set: expected "
            f"{_form(own)}, got {_form(example)}, which cannot be put into one batch: "
            f"{str(error).splitlines()[0][:200]}"
        ) from error


def _form(example: object) -> str:
    if isinstance(example, torch.Tensor):
        return f"{str(example.dtype).removeprefix('torch.')} {list(example.shape)}"
    if isinstance(example, list | tuple):
        return f"({', '.join(map(_form, example))})"
    if isinstance(example, dict):
        return f"{{{', '.join(f'{key}: {_form(value)}' for key, value in example.items())}}}"
    return type(example).__name__


def _plain(label: object) -> object:
    """A label as numbers, lists or text: it is written down with the scores."""
    plain = label.tolist() if hasattr(label, "tolist") else label
    return plain if isinstance(plain, int | float | str | bool | list) else repr(plain)
