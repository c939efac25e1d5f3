"""Examples of a pool that an index of gradients predicts to help."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tda_lightning.index import AttributionIndex
from tda_lightning.runtime.loading import ExampleSource


def helpful_by_index(
    index: AttributionIndex,
    target: ExampleSource,
    pool: object,
    new: Sequence[int],
    count: int,
    batch_size: int,
) -> Tensor:
    """Places in ``new`` of the ``count`` examples that help each example of the target most, or of
    all where there are fewer: int64 [target, count].

    Args:
        index: with its attribution and training set; the pool was appended to it.
        new: the examples of the pool that may be chosen, ascending.

    Raises:
        ValueError: the pool was not appended, or the index is of another estimator.
    """
    rows = index.appended_rows(pool)
    size = rows[1] - rows[0]
    count = min(count, len(new))
    asked = index.encode(target, batch_size=batch_size)
    found = index.search_encoded(asked, count + size - len(new), among=rows).indices - rows[0]
    place = torch.full((size,), -1)
    place[torch.tensor(new)] = torch.arange(len(new))
    places = place[found]
    # Those that may not be chosen last, the others in their order.
    order = (places < 0).long().argsort(dim=1, stable=True)[:, :count]
    return places.gather(1, order)
