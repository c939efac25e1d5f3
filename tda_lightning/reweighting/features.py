"""Features of training examples that are read off the data module: words, or columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor


def word_features(
    documents: Sequence[Sequence[Hashable]], min_count: int
) -> tuple[Tensor, list[str]]:
    """Which words each document has, float64 [document, word], and the words, the most frequent
    first.

    Args:
        documents: the words of each.
        min_count: words of fewer documents are left out, as are those of all.

    Raises:
        ValueError: no word is left.

    Example:
        >>> word_features([["a", "no"], ["a", "no"], ["a", "yes"]], min_count=2)
        (tensor([[1.],
                [1.],
                [0.]], dtype=torch.float64), ['no'])
    """
    return _indicators([set(document) for document in documents], min_count, "word")


def column_features(
    columns: Mapping[str, Sequence[object]], min_count: int
) -> tuple[Tensor, list[str]]:
    """Which value of each column an example has, as :func:`word_features`."""
    count = len(next(iter(columns.values()), ()))
    held = [{f"{name}: {values[n]}" for name, values in columns.items()} for n in range(count)]
    return _indicators(held, min_count, "value of a column")


def is_label(values: Sequence[Hashable], labels: Sequence[int]) -> bool:
    """Whether a column is the label under another name, or finer: each of its values, of which
    there are fewer than examples, comes with one label alone.

    Example:
        >>> is_label(["yes", "no", "maybe", "no"], [0, 1, 1, 1])
        True
        >>> is_label(["yes", "no", "yes", "no"], [0, 1, 1, 1])
        False
    """
    pairs = set(zip(values, labels, strict=True))
    return 1 < len(pairs) == len(set(values)) < len(labels)


def _indicators(
    held: Sequence[set[Hashable] | set[str]], min_count: int, what: str
) -> tuple[Tensor, list[str]]:
    if min_count < 1:
        raise ValueError(f"min_count must be at least 1, got {min_count}.")
    counted = Counter(one for own in held for one in own)
    kept = sorted(
        (one for one, count in counted.items() if min_count <= count < len(held)),
        key=lambda one: (-counted[one], str(one)),
    )
    if not kept:
        raise ValueError(
            f"No {what} is in at least {min_count} of {len(held)} training examples without being "
            "in all of them. Lower min_count."
        )
    place = {one: number for number, one in enumerate(kept)}
    found = torch.zeros(len(held), len(kept), dtype=torch.float64)
    for row, own in enumerate(held):
        for one in own:
            if one in place:
                found[row, place[one]] = 1
    return found, [str(one) for one in kept]
