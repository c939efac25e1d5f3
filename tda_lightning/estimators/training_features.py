"""Features of the training examples, read in one walk and kept next to the trajectory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.estimators.features import read_features
from tda_lightning.records.errors import NonFiniteError
from tda_lightning.runtime.digests import digest
from tda_lightning.session.session import Session
from tda_lightning.tasks import NodeBatch

_FORMAT = 1  # part of the key: raise it when the meaning of cached features changes
_ROWS = 1 << 16  # of features that go over processes at a time


@dataclass(frozen=True)
class Features:
    """Features at the last checkpoint.

    Attributes:
        values: float32 [example, feature].
        place: where in the model they were read, in words.
    """

    values: Tensor
    place: str


def training_features(session: Session, layer: str | None) -> Features:
    """Those of the training examples; ``layer``: see
    :func:`~tda_lightning.estimators.features.read_features`."""
    step = session.trajectory.last_step
    key = digest([_FORMAT, layer, step, session.cache_key([step])])
    if (cached := session.trajectory.features.get(key)) is not None:
        return Features(cached["features"], bytes(cached["place"].tolist()).decode())
    features: Features | None = None
    visited = torch.zeros(session.num_train, dtype=torch.bool)
    for batch in session.walk("features", step):
        rows = _read(session, layer, session.train_loss, batch.data, batch.examples, features)
        if features is None:
            # Random, so that neighbours differ where a dry run leaves examples out.
            generator = torch.Generator().manual_seed(0)
            shape = (session.num_train, rows.values.shape[1])
            noise = torch.rand(shape, generator=generator, dtype=rows.values.dtype)
            features = Features(noise, rows.place)
        features.values[batch.examples.cpu()] = rows.values
        visited[batch.examples.cpu()] = True
    assert features is not None
    if session.num_processes > 1:
        features.values[~visited] = 0  # the other processes have them
        for part in features.values.split(_ROWS):
            part.copy_(session.reduce(part.to(session.device)))
    place = torch.tensor(list(features.place.encode()), dtype=torch.uint8)
    session.trajectory.features[key] = {"features": features.values, "place": place}
    return features


def query_features(session: Session, layer: str | None, training: Features) -> Tensor:
    """Those of the queries, float32 [query, feature], as wide as the ``training`` examples'."""
    session.load(session.trajectory.last_step)
    return torch.cat(
        [
            _read(session, layer, session.measurement, batch, indices, training).values
            for batch, indices in session.queries(0, session.num_query)
        ]
    )


def _read(
    session: Session,
    layer: str | None,
    loss: Callable[..., Tensor],
    batch: object,
    examples: Tensor,
    before: Features | None,
) -> Features:
    """Those of a batch; refused where they are not as those ``before``."""
    what = "query" if loss == session.measurement else "training example"
    with torch.no_grad():
        values, name = read_features(
            session.module,
            layer,
            lambda: len(loss(session.module, batch, examples)),
            batch.nodes if isinstance(batch, NodeBatch) else None,
        )
    values = values.cpu()
    place = f"{'inputs' if layer is None else 'outputs'} of {name or 'the model'}"
    if before is not None:
        width = before.values.shape[1]
        if (before.place, width) != (place, values.shape[1]):
            raise ValueError(
                f"Features must be alike for all examples: expected {width} {before.place}, got "
                f"{values.shape[1]} {place} for {what} {int(examples[0])}. Name a layer "
                "(layer=...) that every example passes, of a width that does not depend on it."
            )
    if not bool(values.isfinite().all()):
        example = int(examples[int((~values.isfinite()).any(1).nonzero()[0])])
        raise NonFiniteError(
            f"The features of {what} {example} ({place}) are not finite. Look at its inputs, "
            "or name another layer."
        )
    return Features(values, place)
