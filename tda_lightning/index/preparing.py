"""Begins an index: the first process to come chooses the coordinates, the others take them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from tda_lightning.index.compression import Compression
from tda_lightning.index.compressions import restored
from tda_lightning.index.facts import IndexFacts
from tda_lightning.index.fit_directions import Samples, fit_directions
from tda_lightning.index.opened import sampled
from tda_lightning.index.responses import Responder
from tda_lightning.records.errors import TrajectoryLockedError
from tda_lightning.runtime.digests import digest
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.session.session import Session
from tda_lightning.store.index_files import read_compression, write_compression
from tda_lightning.store.layout import INDEX_FILE
from tda_lightning.store.lock import FolderLock

# Examples that directions and principal components are found by, and that stand for queries.
_SAMPLE, _MIXING, _ASKED = 512, 4096, 256
_WAIT = 0.2  # seconds between looks at a folder that another process is preparing


def part_of(part: tuple[int, int] | str | None) -> tuple[int, int]:
    """A part counted from 0, and the number of parts.

    Raises:
        ValueError: it is none.

    Example:
        >>> part_of("2/4"), part_of(None)
        ((1, 4), (0, 1))
    """
    if part is None:
        return 0, 1
    numbers = part.split("/") if isinstance(part, str) else part
    try:
        number, parts = (int(own) for own in numbers)
    except (TypeError, ValueError):
        number, parts = 0, 0
    if not 1 <= number <= parts:
        raise ValueError(f'part must be (K, N) or "K/N" with 1 <= K <= N, got {part!r}.')
    return number - 1, parts


def stand_ins(source: ExampleSource, queries: object, batch_size: int, seed: int) -> ExampleSource:
    """The queries that coordinates are chosen for: those given, or some training examples."""
    if queries is not None:
        given = ExampleSource.of(queries, batch_size, "query", source.data_module)
        return sampled(given, _spread(len(given), _ASKED, seed))
    return sampled(source, _spread(len(source), _ASKED, seed))


def prepared(
    root: Path,
    facts: IndexFacts,
    session: Session,
    responder: Responder,
    source: ExampleSource,
    seed: int,
) -> tuple[IndexFacts, Compression]:
    """The facts and the compression of the index in ``root``, which are made where there are none.

    Raises:
        FileExistsError: the folder holds an index of another kind.
    """
    lock = FolderLock(root)
    while not (root / INDEX_FILE).exists():
        try:
            lock.acquire()
        except TrajectoryLockedError:
            time.sleep(_WAIT)
            continue
        try:
            if not (root / INDEX_FILE).exists():
                size, count = session.walk_size, len(source)
                samples = Samples(
                    _batches(_spread(count, _SAMPLE, seed), size),
                    _batches(_spread(count, _MIXING, seed), size),
                )
                made = fit_directions(session, responder, facts.width, samples, seed)
                write_compression(
                    root, made.kind, made.to(torch.device("cpu"), made.mix.dtype).tensors()
                )
                replace(facts, width=made.width, compression=digest(made.tensors())).write(root)
        finally:
            lock.release()
    there = IndexFacts.read(root)
    if there.made_of != facts.made_of or (there.dtype, there.shard) != (facts.dtype, facts.shard):
        raise FileExistsError(
            f"{root} holds an index of another run or with other settings "
            f"({there.provenance}), which is kept. Choose another folder, or delete that one."
        )
    compression = read_compression(root, restored)
    return there, compression.to(session.device, session.dtype)


def _spread(count: int, wanted: int, seed: int) -> list[int]:
    """Some of ``count`` indices, drawn at random, in ascending order."""
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(count, generator=generator)[:wanted].tolist())


def _batches(indices: list[int], size: int) -> list[list[int]]:
    return [indices[at : at + size] for at in range(0, len(indices), size)]
