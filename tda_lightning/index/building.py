"""Builds an index: its coordinates, then the shards of its training set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tda_lightning.attribution.module import AttributionModule
from tda_lightning.index.build import write_missing
from tda_lightning.index.compression import Compression
from tda_lightning.index.compressions import COMPRESSIONS
from tda_lightning.index.facts import IndexFacts
from tda_lightning.index.opened import in_session
from tda_lightning.index.preparing import Settings, part_of, prepared, stand_ins
from tda_lightning.index.responses import responder_of
from tda_lightning.index.rounding import width_of
from tda_lightning.index.run_record import run_record
from tda_lightning.runtime.digests import digest
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.processes import from_all, rank_and_world
from tda_lightning.session.session import Session
from tda_lightning.store.index_files import DTYPES


def built(
    attribution: AttributionModule,
    source: ExampleSource,
    root: Path,
    *,
    bytes_per_example: int,
    part: tuple[int, int] | str | None,
    dtype: str | None,
    compression: str | None,
    queries: object,
    shard: int,
    seed: int,
    like: Path | None,
    trainer: Any,
) -> tuple[IndexFacts, Compression]:
    """Write what is missing of an index; the arguments are those of
    :meth:`~tda_lightning.index.AttributionIndex.build`."""
    part_number, parts = part_of(part)
    dtypes = ("int4", "int8") if dtype is None else (dtype,)
    if not set(dtypes) <= DTYPES.keys():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)} or None, got {dtype!r}.")
    if shard < 1:
        raise ValueError(f"shard is a number of examples, at least 1; got {shard}.")
    if compression is not None and compression not in COMPRESSIONS:
        known = ", ".join(COMPRESSIONS)
        raise ValueError(f"compression must be one of {known} or None, got {compression!r}.")
    for own in dtypes:
        width_of(bytes_per_example, own)
    asked = stand_ins(source, queries, source.batch_size, seed)
    estimator = attribution.estimator

    def work(session: Session) -> tuple[IndexFacts, Compression]:
        responder = responder_of(estimator, session)
        steps = sorted({step for term in responder.terms for step in term.steps})
        settings = Settings(
            bytes_per_example,
            dtypes,
            ("leading", "factors") if compression is None else (compression,),
            shard,
            seed,
            digest([session.cache_key(steps), repr(estimator)]),
            repr(estimator),
            run_record(session),
        )
        facts, made = prepared(root, settings, session, responder, source, like)
        rank, world = rank_and_world()
        mine = list(facts.cut(0, facts.num_train))[part_number::parts][rank::world]
        write_missing(root, facts, made, session, source, mine)
        from_all(rank)  # until every process has written its shards
        return facts, made

    return in_session(attribution, source, asked, work, trainer)
