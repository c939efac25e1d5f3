r"""Documents of packed rows: columns of scores where a row of the training set holds several.

Texts are packed into rows of one length before a language model is trained on them, several to a
row, or one across rows. A row then says of each position which document it belongs to
(``example_ids``), and what is asked about is a document: what if its tokens had counted nothing?

.. math::
    \delta_d = \sum_r \sum_{t \in d} \nabla l_{rt}

with the other tokens' losses, the context that they are predicted from and what a mean divides by
left as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tda_lightning.edits.edits import Term

EXAMPLE_IDS, LABELS = "example_ids", "labels"


@dataclass(frozen=True)
class DocumentRemoval:
    """The tokens of a document count nothing, in every row that holds some of them.

    Attributes:
        document: its number in ``example_ids``.
        pieces: (row, that row with the labels of all other documents ignored).
    """

    document: int
    pieces: tuple[tuple[int, object], ...] = field(repr=False)

    @property
    def index(self) -> int | None:
        """The row, where there is one."""
        return self.pieces[0][0] if len(self.pieces) == 1 else None

    def terms(self) -> tuple[Term, ...]:
        """The gradients of its tokens' losses, row by row."""
        return tuple(Term(1.0, example=own, used_with=row) for row, own in self.pieces)


def holds_documents(example: object) -> bool:
    """Whether a training example is a row of several documents."""
    return isinstance(example, Mapping) and EXAMPLE_IDS in example


def document_removals(rows: Sequence[Any], ignored: int = -100) -> list[DocumentRemoval]:
    """The removal of each document: column d of the scores is document d.

    Args:
        rows: the training set: dictionaries with ``example_ids`` [position], the document of each
            position, from 0, and negative where there is none (padding); and ``labels``
            [position]. A token belongs to the document at the position of its label.
        ignored: the label that the loss ignores.

    Raises:
        ValueError: a row has no labels or ids, or they are of different lengths; a number has no
            tokens that count.
    """
    pieces: dict[int, list[tuple[int, object]]] = {}
    for number in range(len(rows)):
        row = rows[number]
        ids, labels = _ids_and_labels(row, number)
        for document in ids[(ids >= 0) & (labels != ignored)].unique().tolist():
            own = labels.where(ids == document, ignored)
            like = row[LABELS]
            kept = own.to(like) if isinstance(like, Tensor) else type(like)(own.tolist())
            pieces.setdefault(document, []).append((number, {**row, LABELS: kept}))
    if not pieces:
        raise ValueError(
            f"No row has a token that counts: expected {EXAMPLE_IDS} from 0 where labels are not "
            f"{ignored}."
        )
    if missing := sorted(set(range(max(pieces) + 1)) - set(pieces)):
        raise ValueError(
            f"Document {missing[0]} has no token that counts ({len(missing)} such in all); "
            f"expected the numbers 0 to {max(pieces)} in {EXAMPLE_IDS}, each with labels that are "
            f"not {ignored}. Number the documents that are there."
        )
    return [DocumentRemoval(number, tuple(pieces[number])) for number in range(max(pieces) + 1)]


def require_own_labels(row: Any, batch: Any) -> None:
    """Refuse a collator that puts labels of its own in the place of the rows'.

    Raises:
        ValueError: the labels of the batch of ``row`` are not those of the row.
    """
    own = torch.as_tensor(row[LABELS])
    made = batch.get(LABELS) if isinstance(batch, Mapping) else None
    if isinstance(made, Tensor) and not torch.equal(made.flatten()[: len(own)].cpu(), own.cpu()):
        raise ValueError(
            f"The collator makes {LABELS!r} itself; expected it to keep those of the rows, of "
            "which documents are told apart. Use one that stacks or pads what the rows hold "
            "(DefaultDataCollator, DataCollatorForSeq2Seq)."
        )


def sum_by_document(by_token: Tensor, rows: Sequence[Any], shift: int = 1) -> Tensor:
    """Scores [query, document] from scores of the tokens of rows, as those of
    ``Unrolled(token_weights=True)``.

    Args:
        by_token: [query, row, position] (:attr:`Scores.by_token`).
        rows: as in :func:`document_removals`.
        shift: which later position's label the loss at a position is for; 1 in models of
            ``transformers``, 0 where the data set's labels are shifted already.
    """
    ids = [_ids_and_labels(rows[number], number)[0] for number in range(len(rows))]
    count = 1 + max(int(own.max()) for own in ids)
    out = by_token.new_zeros(len(by_token), count)
    for number, own in enumerate(ids):
        own = own[shift:][: by_token.shape[2]]
        known = (own >= 0).nonzero().squeeze(1)
        parts = torch.nan_to_num(by_token[:, number])[:, known]
        out.index_add_(1, own[known].to(out.device), parts)
    return out


def _ids_and_labels(row: Any, number: int) -> tuple[Tensor, Tensor]:
    if not isinstance(row, Mapping) or EXAMPLE_IDS not in row or LABELS not in row:
        keys = list(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(
            f"Row {number} has {keys}, expected a dictionary with {EXAMPLE_IDS!r} and {LABELS!r}. "
            "Put labels into the rows: those that a collator makes cannot be told apart by "
            "document."
        )
    ids, labels = (torch.as_tensor(row[name]) for name in (EXAMPLE_IDS, LABELS))
    if ids.shape != labels.shape or ids.dim() != 1:
        raise ValueError(
            f"Row {number} has {EXAMPLE_IDS} {list(ids.shape)} and {LABELS} {list(labels.shape)}, "
            "expected both [position]."
        )
    return ids, labels
