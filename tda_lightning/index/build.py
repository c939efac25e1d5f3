"""Writes the shards of an index: gradients of examples, compressed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tda_lightning.gradients import Gradient
from tda_lightning.index.compression import Compression
from tda_lightning.index.facts import IndexFacts
from tda_lightning.index.responses import Term
from tda_lightning.index.rounding import rounded
from tda_lightning.index.samples import averaged_coordinates
from tda_lightning.records.errors import NonFiniteError, TrajectoryFormatError
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.session.pace import loaded_batches
from tda_lightning.session.session import Session
from tda_lightning.store.index_files import Shard, read_shard, write_shard
from tda_lightning.store.layout import SHARD_NAME, shard_file

_TOGETHER = 256  # rows whose coordinates are held at a time


def write_missing(
    root: Path,
    facts: IndexFacts,
    compression: Compression,
    session: Session,
    source: ExampleSource,
    ranges: Sequence[tuple[int, int]],
    first_row: int = 0,
) -> list[str]:
    """Write the shards of ``ranges`` that are not there, or damaged.

    Args:
        source: the examples; row ``first_row`` of the index is its first one.

    Returns:
        What was wrong with each shard that was damaged.
    """
    damages: list[str] = []
    wanted = []
    for own in ranges:
        damage = damage_of(root, facts, *own)
        if damage is not None:
            wanted.append(own)
            damages += [damage] if damage else []
    for first, stop in session.loop("index: shards", wanted):
        parts = (range(at, min(at + _TOGETHER, stop)) for at in range(first, stop, _TOGETHER))
        found = [
            rounded(rows, facts.dtype)  # at once, while they are in the processor's cache
            for own in parts
            for rows in _stored(facts.terms, compression, session, source, own, first_row)
        ]
        codes, scales = (np.concatenate(own) for own in zip(*found, strict=True))
        write_shard(root, first, codes, scales, facts.compression)
    return damages


def damage_of(root: Path, facts: IndexFacts, first: int, stop: int) -> str | None:
    """What is wrong with a shard: "" where it is missing, None where nothing is."""
    try:
        if not shard_of(root, facts, first, stop).whole:
            path = shard_file(root, first, stop)
            return f"{path} is damaged: its codes do not match their checksum."
    except FileNotFoundError:
        return ""
    except TrajectoryFormatError as error:
        return str(error)
    return None


def there(root: Path, facts: IndexFacts) -> list[list[tuple[int, int]]]:
    """The rows, first to stop, of every shard that is searched and has a file, in order, by stretch
    (:meth:`IndexFacts.stretches`). Found by their names: an index may claim more rows than can be
    gone through."""
    folder = shard_file(root, 0, 1).parent
    names = os.listdir(folder) if folder.is_dir() else []
    matches = (SHARD_NAME.fullmatch(name) for name in names)
    ranges = sorted((int(own[1]), int(own[2])) for own in matches if own)
    return [
        [
            (first, stop)
            for first, stop in ranges
            if start <= first < end
            and (first - start) % facts.shard == 0
            and stop == min(first + facts.shard, end)
        ]
        for start, end in facts.stretches()
    ]


def missing_rows(root: Path, facts: IndexFacts) -> list[tuple[int, int]]:
    """The rows, first to stop, between the shards that have a file."""
    gaps = []
    for (start, end), ranges in zip(facts.stretches(), there(root, facts), strict=True):
        before = start
        for first, stop in [*ranges, (end, end)]:
            if before < first:
                gaps.append((before, first))
            before = stop
    return gaps


def shard_of(root: Path, facts: IndexFacts, first: int, stop: int) -> Shard:
    """The shard of these rows.

    Raises:
        FileNotFoundError: it is not there.
        TrajectoryFormatError: it is damaged.
    """
    path = shard_file(root, first, stop)
    return read_shard(path, facts.compression, facts.width, facts.dtype)


def _stored(
    terms: Sequence[Term],
    compression: Compression,
    session: Session,
    source: ExampleSource,
    rows: range,
    first_row: int,
) -> Iterator[Tensor]:
    """What is stored of some rows, batch by batch: [row, width]."""
    size = session.walk_size
    batches = [range(at, min(at + size, rows.stop)) for at in range(rows.start, rows.stop, size)]
    order = [[row - first_row for row in batch] for batch in batches]

    def walk() -> Iterator[Mapping[str, Gradient]]:
        for _, indices, data in loaded_batches(source, session.module, list(enumerate(order))):
            # The index seeds an example's noise; those appended come after all others.
            examples = (indices + first_row).to(session.device)
            yield session.train_gradients(data, examples).blocks

    (found,) = averaged_coordinates(terms, session, [compression], walk)
    if first_row == 0:  # others count as used evenly
        for number, term in enumerate(terms):
            weights = session.weights(torch.arange(rows.start, rows.stop), term.used)
            if weights is None:
                continue
            for own, part in zip(found, weights[:, None].split(size), strict=True):
                own[number] = own[number] * part
    for batch, own in zip(order, found, strict=True):
        stored = compression.stored(own)
        if not bool(stored.sum().isfinite()):  # the sum of finite numbers may be too large
            _require_finite(stored, batch)
        yield stored


def _require_finite(stored: Tensor, examples: Sequence[int]) -> None:
    if not bool((finite := stored.isfinite().all(1)).all()):
        raise NonFiniteError(
            f"The gradient of example {examples[int((~finite).nonzero()[0])]} is NaN or infinite "
            "at one of the checkpoints: an index cannot hold it. Look at this example and its loss."
        )
