"""Features of the training examples, gathered in one pass and kept with the trajectory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tda_lightning.estimators.features import read_features
from tda_lightning.records.errors import NonFiniteError
from tda_lightning.runtime.digests import digest
from tda_lightning.session.passes import Pass, Session

_FORMAT = 1  # part of the key: raise it when the meaning of kept features changes
_ROWS = 1 << 16  # of features that go over processes at a time


class KeptFeatures:
    """Features at the last checkpoint.

    Attributes:
        known: they were kept from before, so that no pass is needed.
        place: where in the model they are read, in words; None before the first batch.
    """

    def __init__(self, context: Session, layer: str | None):
        self.context, self.layer = context, layer
        self.step = context.trajectory.last_step
        self._key = digest([_FORMAT, layer, self.step, context.cache_key([self.step])])
        kept = context.trajectory.features.get(self._key)
        self.known = kept is not None
        self.place: str | None = None
        self._values: Tensor | None = None
        if kept is not None:
            self._values, self.place = kept["features"], bytes(kept["place"].tolist()).decode()

    @property
    def values(self) -> Tensor:
        """Those of the training examples, float32 [train, feature]."""
        assert self._values is not None
        return self._values

    def passes(self) -> list[Pass]:
        """The pass that gathers them; none when they are known."""
        return [] if self.known else [Pass("features", self.step, self._add, None, self._finish)]

    def of_queries(self) -> Tensor:
        """Those of the queries, float32 [query, feature]."""
        context = self.context
        context.load(self.step)
        found = [
            self._read(context.measurement, batch, indices, "query")
            for batch, indices in context.queries(0, context.num_query)
        ]
        return torch.cat(found)

    def _add(self, batch: Any, examples: Tensor, _: int) -> None:
        found = self._read(self.context.train_loss, batch, examples, "training example")
        if self._values is None:
            self._values = torch.zeros(self.context.num_train, found.shape[1])
        self._values[examples.cpu()] = found

    def _finish(self) -> None:
        assert self.place is not None
        # Every process has the rows of its own batches, and 0 elsewhere.
        for rows in self.values.split(_ROWS):
            rows.copy_(self.context.reduce(rows.to(self.context.device)))
        place = torch.tensor(list(self.place.encode()), dtype=torch.uint8)
        kept = {"features": self.values, "place": place}
        self.context.trajectory.features[self._key] = kept

    def _read(self, loss: Any, batch: Any, examples: Tensor, what: str) -> Tensor:
        module, layer = self.context.module, self.layer
        with torch.no_grad():
            found, name = read_features(module, layer, lambda: len(loss(module, batch, examples)))
        found = found.cpu()
        place = f"{'inputs' if layer is None else 'outputs'} of {name or 'the model'}"
        width = found.shape[1] if self._values is None else self._values.shape[1]
        if (self.place or place, width) != (place, found.shape[1]):
            raise ValueError(
                f"Features must be alike for all examples: expected {width} {self.place}, got "
                f"{found.shape[1]} {place} for {what} {int(examples[0])}. Name a layer "
                "(layer=...) that every example passes, of a width that does not depend on it."
            )
        self.place = place
        if not bool(found.isfinite().all()):
            example = int(examples[int((~found.isfinite()).any(1).nonzero()[0])])
            raise NonFiniteError(
                f"The features of {what} {example} ({place}) are not finite. Look at its inputs, "
                "or name another layer."
            )
        return found
