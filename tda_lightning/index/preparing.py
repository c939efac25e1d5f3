"""Begins an index: the first process to come chooses the coordinates, the others take them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tda_lightning.index.choosing import Samples, chosen_compression
from tda_lightning.index.compression import Compression
from tda_lightning.index.compressions import restored
from tda_lightning.index.facts import IndexFacts
from tda_lightning.index.opened import sampled
from tda_lightning.index.responses import Responder
from tda_lightning.index.run_record import of_another_run
from tda_lightning.records.errors import TrajectoryFormatError, TrajectoryLockedError
from tda_lightning.runtime.digests import digest
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.processes import Processes, rank_and_world
from tda_lightning.session.session import Session
from tda_lightning.store.index_files import copy_file, read_compression, write_compression
from tda_lightning.store.layout import COMPRESSION_FILE, INDEX_FILE
from tda_lightning.store.lock import FolderLock

_WAIT = 0.2  # seconds between looks at a folder that another process is preparing


@dataclass(frozen=True)
class Settings:
    """What was asked for of an index.

    Attributes:
        bytes_per_example: of a row, at most.
        dtypes: of the stored numbers, from which one is chosen.
        kinds: of compressions, likewise.
        shard: rows in a shard.
        seed: of what is drawn.
        made_of: digest of the run, the task and the estimator.
        estimator: in words.
        record: which run it is (``run_record.py``).
    """

    bytes_per_example: int
    dtypes: tuple[str, ...]
    kinds: tuple[str, ...]
    shard: int
    seed: int
    made_of: str
    estimator: str
    record: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Of all of it."""
        numbers = (
            self.bytes_per_example,
            list(self.dtypes),
            list(self.kinds),
            self.shard,
            self.seed,
        )
        return digest([*numbers, self.made_of])


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
        given = source.others(queries, batch_size, "query")
        return sampled(given, drawn(len(given), "asked", seed))
    return sampled(source, drawn(len(source), "asked", seed))


def prepared(
    root: Path,
    settings: Settings,
    session: Session,
    responder: Responder,
    source: ExampleSource,
    like: Path | None = None,
) -> tuple[IndexFacts, Compression]:
    """The facts and the compression of the index in ``root``, which are made where there are none.

    Args:
        like: another index, whose compression is taken.

    Raises:
        FileExistsError: the folder holds an index of another kind.
        FileNotFoundError: ``like`` holds none.
        ValueError: ``like`` is of another kind.
    """
    rank, world = rank_and_world()
    together, lock = Processes(world, rank), FolderLock(root)
    try:
        if together.by_first(_claimed, lock, root):
            if like is not None:
                together.by_first(_taken_over, root, like, settings)
            else:
                _begin(root, settings, session, responder, source, together)
    finally:
        lock.release()
    there = IndexFacts.read(root)
    other = of_another_run(there.provenance, settings.record)
    if there.made_of != settings.digest or other:
        raise FileExistsError(
            f"{root} holds an index of another run or with other settings (made by "
            f"{there.made_by}), which is kept. Choose another folder, or delete that one."
        )
    return there, opened_compression(root, there).to(session.device, session.dtype)


def _claimed(lock: FolderLock, root: Path) -> bool:
    """Whether an index is to be begun, by whoever has the lock; waits while another begins it."""
    while not (root / INDEX_FILE).exists():
        try:
            lock.acquire()
        except TrajectoryLockedError:
            time.sleep(_WAIT)
            continue
        if not (root / INDEX_FILE).exists():
            return True
        lock.release()
    return False


def _taken_over(root: Path, like: Path, settings: Settings) -> None:
    try:
        facts = IndexFacts.read(like)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"like={like} holds no index. Build that one first, or leave like away."
        ) from error
    if facts.made_of != settings.digest or of_another_run(facts.provenance, settings.record):
        raise ValueError(
            f"like={like} is an index of another run or with other settings (made by "
            f"{facts.made_by}). Build with the settings of that one, or leave like away."
        )
    copy_file(like / COMPRESSION_FILE, root / COMPRESSION_FILE)
    replace(facts, appended=()).write(root)


def _begin(
    root: Path,
    settings: Settings,
    session: Session,
    responder: Responder,
    source: ExampleSource,
    together: Processes,
) -> None:
    """Choose how gradients are compressed, in every process, since responses may take all of them;
    the first one writes it."""
    seed = settings.seed
    samples = Samples(
        _batches(session, drawn(len(source), "directions", seed)),
        _batches(session, drawn(len(source), "components", seed)),
        _batches(session, drawn(len(source), "judging", seed)),
    )
    made, dtype, agreement = chosen_compression(
        session,
        responder,
        settings.bytes_per_example,
        settings.dtypes,
        settings.kinds,
        samples,
        settings.seed,
    )
    provenance = {
        "estimator": settings.estimator,
        **settings.record,
        "bytes_per_example": settings.bytes_per_example,
        "compression": f"{made.kind} in {dtype}",
        "agreement": agreement,
    }
    facts = IndexFacts(
        num_train=len(source),
        width=made.width,
        dtype=dtype,
        shard=settings.shard,
        terms=tuple(responder.terms),
        compression=digest_of(made),
        made_of=settings.digest,
        provenance=provenance,
    )
    together.by_first(_written, root, made, facts)


def _written(root: Path, made: Compression, facts: IndexFacts) -> None:
    write_compression(root, made.kind, made.tensors())
    facts.write(root)


def opened_compression(root: Path, facts: IndexFacts) -> Compression:
    """The compression of the index in ``root``.

    Raises:
        FileNotFoundError: it is missing.
        TrajectoryFormatError: it is damaged, or another one.
    """
    compression = read_compression(root, restored)
    if compression.width != facts.width or digest_of(compression) != facts.compression:
        raise TrajectoryFormatError(
            f"{root / COMPRESSION_FILE} is not the one that the index was built with: expected "
            f"{facts.width} numbers and its digest. Delete the index and build it again."
        )
    return compression


def digest_of(compression: Compression) -> str:
    """Of all that was drawn or fitted."""
    return digest(sorted(compression.tensors().items()))


# Places of the samples in a random order of the examples: those that stand for queries, those that
# compressions are judged by, and those that they are fitted to. So none is compared with itself.
_PLACES = {"asked": (0, 512), "judging": (512, 768), "directions": (768, 1280)}
_PLACES["components"] = (768, 2816)


def drawn(count: int, purpose: str, seed: int) -> list[int]:
    """The indices of a sample among ``count`` examples, ascending. Of few examples all purposes
    have the same."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    first, stop = _PLACES[purpose]
    if count < 2 * _PLACES["directions"][1]:
        first, stop = 0, stop - first
    return sorted(order[first:stop].tolist())


def _batches(session: Session, indices: list[int]) -> list[list[int]]:
    size = session.walk_size
    return [indices[at : at + size] for at in range(0, len(indices), size)]
