"""Queries as an index compares them with its rows, of a run that stays open."""

from __future__ import annotations

from torch import Tensor

from tda_lightning.attribution.sessions import ask
from tda_lightning.estimators import Estimator
from tda_lightning.index.compression import Compression
from tda_lightning.index.responses import responder_of
from tda_lightning.index.samples import query_coordinates
from tda_lightning.measurements import as_measurement
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.session.session import Session


class Asker:
    """Encodes queries. Curvature is fitted, or read, once: what follows costs the queries' own
    gradients and their products with it.

    Args:
        estimator: that the index was built with.
        compression: of the index.
        session: of the run, which stays open.
    """

    def __init__(self, estimator: Estimator, compression: Compression, session: Session) -> None:
        self.session = session
        self._responder = responder_of(estimator, session)
        self._compression = compression.to(session.device, session.dtype)

    def encode_others(self, queries: ExampleSource, measurement: object) -> Tensor:
        """:meth:`encode` of other queries than those that the session was opened with."""
        ask(self.session, queries, as_measurement(measurement))
        return self.encode()

    def encode(self) -> Tensor:
        """The session's queries: [query, any]."""
        (coordinates,) = query_coordinates(self.session, self._responder, [self._compression])
        return self._compression.asked(coordinates).cpu()
