"""What an index is, as its file says it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tda_lightning.index.responses import Term
from tda_lightning.store.index_files import DTYPES, read_about, write_about

MOST_ROWS = 1 << 40


@dataclass(frozen=True)
class Appended:
    """Examples that were appended together.

    Attributes:
        first: number of their first row.
        count: how many.
        fingerprint: of the data set.
        finished: whether all their rows are there; until then they are not searched.
    """

    first: int
    count: int
    fingerprint: Mapping[str, str] | None
    finished: bool

    @property
    def known(self) -> bool:
        """Whether the fingerprint has any example that reads the same every time."""
        return self.fingerprint is not None and len(self.fingerprint) > 1

    def same_examples(self, other: Appended) -> bool:
        """Whether the two are the same data set, as far as its fingerprint can tell."""
        return self.count == other.count and self.fingerprint == other.fingerprint


@dataclass(frozen=True)
class IndexFacts:
    """What an index holds.

    Attributes:
        num_train: examples of the training set, the first rows.
        width: numbers in a row.
        dtype: of the numbers.
        shard: rows in a shard, at most.
        terms: of the estimator's sum.
        compression: digest of how gradients are compressed.
        made_of: digest of the run, the task and the estimator.
        provenance: how it was made, in words.
        appended: examples after those of the training set.
    """

    num_train: int
    width: int
    dtype: str
    shard: int
    terms: tuple[Term, ...]
    compression: str
    made_of: str
    provenance: Mapping[str, Any]
    appended: tuple[Appended, ...] = ()

    @property
    def num_examples(self) -> int:
        """Rows that are searched."""
        return self.num_train + sum(own.count for own in self.appended if own.finished)

    @property
    def num_rows(self) -> int:
        """Rows that are there or being appended."""
        return self.num_train + sum(own.count for own in self.appended)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The rows, first to stop, of every shard that is searched, in order. One by one: a file
        may claim any number of them."""
        for stretch in self.stretches():
            yield from self.cut(*stretch)

    def stretches(self) -> Iterator[tuple[int, int]]:
        """The rows, first to stop, that are searched: the training set's, then those of each data
        set that was appended. Shards do not reach from one into the next."""
        yield 0, self.num_train
        for own in self.appended:
            if own.finished:
                yield own.first, own.first + own.count

    def rows_of(self, count: int, fingerprint: Mapping[str, str] | None) -> tuple[int, int]:
        """The rows (first, stop) of examples that were appended.

        Raises:
            ValueError: they were not, or not all of them.
        """
        for own in self.appended:
            if own.count == count and own.fingerprint == fingerprint and own.finished:
                return own.first, own.first + own.count
        raise ValueError(
            f"These {count} examples are not in the index: expected them to be appended, "
            "AttributionIndex.append(examples) or tda index RUN append={KEY: VALUE}, as they are "
            "here and in this order."
        )

    @property
    def made_by(self) -> str:
        """Estimator, bytes and compression, for messages."""
        known = self.provenance
        return (
            f"{known.get('estimator')}, {known.get('bytes_per_example')} bytes an example, "
            f"{known.get('compression')}"
        )

    def require_whole_shards(self, first: int, stop: int) -> None:
        """Refuse rows that are not all those of some shards that are searched.

        Raises:
            ValueError: they are not.
        """
        begin = any(s <= first < e and (first - s) % self.shard == 0 for s, e in self.stretches())
        end = any(
            s < stop <= e and (stop == e or (stop - s) % self.shard == 0)
            for s, e in self.stretches()
        )
        if not (begin and end and first < stop):
            raise ValueError(
                f"Rows {first} to {stop - 1} are not whole shards of the index: expected those of "
                f"a data set that was appended (appended_rows), or of shards of {self.shard} rows."
            )

    def cut(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Rows ``first`` to ``stop`` as shards."""
        for at in range(first, stop, self.shard):
            yield at, min(at + self.shard, stop)

    def same_as(self, other: IndexFacts) -> bool:
        """Whether the two are of one kind, whatever was appended."""
        return replace(self, appended=(), provenance={}) == replace(
            other, appended=(), provenance={}
        )

    def write(self, root: Path) -> None:
        """Write them into the folder of the index."""
        write_about(root, asdict(self))

    @classmethod
    def read(cls, root: Path) -> IndexFacts:
        """What :meth:`write` wrote.

        Raises:
            FileNotFoundError: there is no index.
            TrajectoryFormatError: the file is damaged.
        """
        return read_about(root, cls._of)

    @classmethod
    def _of(cls, about: Mapping[str, Any]) -> IndexFacts:
        """From JSON, which may hold anything."""
        terms = tuple(
            Term(tuple(map(_count, own["steps"])), (_count(own["used"][0]), _count(own["used"][1])))
            for own in about["terms"]
        )
        appended = tuple(
            Appended(
                _count(own["first"]),
                _count(own["count"]),
                own["fingerprint"],
                own["finished"] is True,
            )
            for own in about["appended"]
        )
        facts = cls(
            num_train=_count(about["num_train"]),
            width=_count(about["width"]),
            dtype=about["dtype"],
            shard=_count(about["shard"]),
            terms=terms,
            compression=str(about["compression"]),
            made_of=str(about["made_of"]),
            provenance=dict(about["provenance"]),
            appended=appended,
        )
        if facts.dtype not in DTYPES or not terms or not all(own.steps for own in terms):
            raise ValueError(f"dtype {facts.dtype!r} and {len(terms)} terms")
        if min(facts.shard, facts.width, facts.num_train) < 1:
            raise ValueError("an index without rows")
        stop = facts.num_train
        for own in appended:
            if own.first != stop or own.count < 1:
                raise ValueError(f"rows appended at {own.first}, expected {stop}")
            stop += own.count
        return facts


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value <= MOST_ROWS:
        raise ValueError(f"{value!r:.40} is no count")
    return value
