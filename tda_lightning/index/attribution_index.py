"""The index: compressed gradients of all training examples, for questions that come later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from tda_lightning.attribution.module import AttributionModule
from tda_lightning.index.appending import append_rows
from tda_lightning.index.build import damage_of, missing_rows, shard_of, there
from tda_lightning.index.building import built
from tda_lightning.index.compression import Compression
from tda_lightning.index.facts import IndexFacts
from tda_lightning.index.fetching import fetch_files
from tda_lightning.index.merging import merge_files
from tda_lightning.index.opened import in_session, training_source
from tda_lightning.index.preparing import opened_compression
from tda_lightning.index.reranking import reranked
from tda_lightning.index.responses import responder_of
from tda_lightning.index.rounding import bytes_of
from tda_lightning.index.run_record import require_same_run
from tda_lightning.index.samples import query_coordinates
from tda_lightning.index.search import SearchResult, require_finite, search
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.session.session import Session
from tda_lightning.store import fingerprint
from tda_lightning.store.index_files import Shard

SHARD = 4096  # rows: what is lost when a build is interrupted, and rebuilt when one is damaged


@dataclass
class AttributionIndex:
    """Compressed gradients of every training example of a run, in a folder, and the means to
    search them.

    Make one by :meth:`build`, or :meth:`open` one that is there.

    Attributes:
        path: the folder.
        facts: what it holds.
        compression: how gradients are compressed.
    """

    path: Path
    facts: IndexFacts
    compression: Compression
    attribution: AttributionModule | None = None
    train: object = None

    @classmethod
    def build(
        cls,
        attribution: AttributionModule,
        train: object,
        path: str | PathLike[str],
        *,
        bytes_per_example: int = 1024,
        part: tuple[int, int] | str | None = None,
        batch_size: int = 256,
        dtype: str | None = None,
        compression: str | None = None,
        queries: object = None,
        shard: int = SHARD,
        seed: int = 0,
        like: str | PathLike[str] | None = None,
        trainer: Any = None,
    ) -> AttributionIndex:
        """Compress the gradients of every training example, as the attribution's estimator would
        compare them with queries.

        If interrupted, run the same call again: shards that are whole are kept. So are those of
        other processes, each of which can write a ``part``, at the same time or later.

        Args:
            attribution: of one run, with TracIn, InfluenceFunction or Source(order="average").
            train: the recorded training set, as in :meth:`AttributionModule.attribute`.
            path: the folder of the index.
            bytes_per_example: on disk, with the scale of the row. Where there is room for all
                coordinates, nothing is lost but precision.
            part: (K, N), or "K/N": write the Kth of N parts alone, counted from 1.
            dtype: of the stored numbers: int4, int8, float16, float32 or float64; None: int4 or
                int8, whichever agrees better with exact scores on a sample.
            compression: "leading" coordinates, "factors" or "random" projection; None: the first or
                the second, by the same agreement (docs/indexing.md).
            queries: a sample of queries like those that will be asked; None: training examples
                stand for them.
            shard: examples in a file.
            seed: of what is drawn.
            like: another index of the run with the same settings, whose coordinates are taken: for
                parts in folders of their own, which :meth:`merge` puts together.
            trainer: runs it: its devices and processes, which share the shards.

        Raises:
            FileExistsError: the folder holds another index.
            TrajectoryMismatchError: ``train`` is not the data of the run.
            UnsupportedTrainingError: the estimator's scores are not such inner products.
            ValueError: an impossible setting.
            NonFiniteError: a gradient is not finite.
        """
        root = Path(path)
        facts, made = built(
            attribution,
            training_source(attribution, train, batch_size),
            root,
            bytes_per_example=bytes_per_example,
            part=part,
            dtype=dtype,
            compression=compression,
            queries=queries,
            shard=shard,
            seed=seed,
            like=None if like is None else Path(like),
            trainer=trainer,
        )
        return cls(root, facts, made, attribution, train)

    @classmethod
    def open(
        cls,
        path: str | PathLike[str],
        attribution: AttributionModule | None = None,
        train: object = None,
    ) -> AttributionIndex:
        """The index in a folder.

        Args:
            attribution, train: as it was built with; for :meth:`search` and :meth:`append`.

        Raises:
            FileNotFoundError: there is none.
            TrajectoryFormatError: a file of it is damaged or of another format version.
        """
        root = Path(path)
        facts = IndexFacts.read(root)
        compression = opened_compression(root, facts)
        return cls(root, facts, compression, attribution, train)

    @property
    def num_examples(self) -> int:
        """Rows that are searched: the training set, then what was appended."""
        return self.facts.num_examples

    @property
    def bytes_per_example(self) -> int:
        """On disk, with the scale of the row."""
        return bytes_of(self.facts.width, self.facts.dtype)

    @property
    def provenance(self) -> dict[str, Any]:
        """How it was made."""
        return dict(self.facts.provenance)

    def missing(self) -> list[tuple[int, int]]:
        """Rows (first, stop) whose shards are not there: of parts that have not been built."""
        return missing_rows(self.path, self.facts)

    def damages(self) -> list[str]:
        """What is wrong with each damaged shard, which is named; reads all of the index. Calling
        :meth:`build` again makes these shards anew, and no others; :meth:`append` those of examples
        that were appended."""
        ranges = chain.from_iterable(there(self.path, self.facts))
        found = (damage_of(self.path, self.facts, *own) for own in ranges)
        return [damage for damage in found if damage]

    def appended_rows(self, examples: object) -> tuple[int, int]:
        """The rows (first, stop) of a data set that was appended.

        Raises:
            ValueError: it was not, or not all of it.
        """
        added = ExampleSource.of(examples, 1, "appended")
        return self.facts.rows_of(len(added), fingerprint(added.dataset))

    def shards(self, among: tuple[int, int] | None = None) -> Iterator[Shard]:
        """The shards, in order, mapped into memory.

        Args:
            among: rows (first, stop), all of those of some shards; None: all that are searched.

        Raises:
            FileNotFoundError: one is missing.
            TrajectoryFormatError: one is damaged.
        """
        for first, stop in self.facts.ranges():
            if among is not None and not among[0] <= first < among[1]:
                continue
            try:
                yield shard_of(self.path, self.facts, first, stop)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{error} The index is not complete: build the part that rows {first} to "
                    f"{stop - 1} belong to, by the same call as the others."
                ) from error

    def encode(self, queries: object, *, measurement: Any = None, batch_size: int = 256) -> Tensor:
        """What :meth:`search_encoded` compares with the rows: [query, any]."""
        attribution, source = self._bound(batch_size)
        asked = source.others(queries, batch_size, "query")

        def work(session: Session) -> Tensor:
            require_same_run(self.facts.provenance, session)
            responder = responder_of(attribution.estimator, session)
            compression = self.compression.to(session.device, session.dtype)
            (coordinates,) = query_coordinates(session, responder, [compression])
            return compression.asked(coordinates).cpu()

        return in_session(attribution, source, asked, work, measurement=measurement)

    def search(
        self,
        queries: object,
        k: int = 10,
        *,
        measurement: Any = None,
        rerank: int = 0,
        batch_size: int = 256,
    ) -> SearchResult:
        """The ``k`` strongest proponents and opponents of every query.

        Args:
            queries: a ``Dataset`` or ``DataLoader``, as in :meth:`AttributionModule.attribute`.
            measurement: what to ask about each query, as there.
            rerank: compute exact scores of so many best examples on either side, and choose the
                ``k`` by them; 0: by compressed gradients alone.

        Raises:
            ValueError: no attribution or training set was given when it was opened; ``k`` or
                ``rerank`` out of range.
        """
        if rerank and not k <= rerank <= self.num_examples:
            raise ValueError(
                f"rerank must be 0, or from k = {k} to the number of examples, "
                f"{self.num_examples}; got {rerank}."
            )
        asked = self.encode(queries, measurement=measurement, batch_size=batch_size)
        found = self.search_encoded(asked, max(k, rerank))
        if not rerank:
            return found
        attribution, source = self._bound(batch_size)
        return reranked(attribution, source, queries, found, k, rerank, measurement)

    def search_encoded(
        self, asked: Tensor, k: int = 10, among: tuple[int, int] | None = None
    ) -> SearchResult:
        """:meth:`search` for what :meth:`encode` made of queries: no model is needed.

        Args:
            among: rows (first, stop) that alone are searched: those of a data set that was
                appended (:meth:`appended_rows`); None: all.

        Raises:
            NonFiniteError: a query's gradient is not finite, so that nothing is the strongest.
            ValueError: ``k`` out of range, or ``among`` cuts a shard.
        """
        facts = self.facts
        if among is not None:
            facts.require_whole_shards(*among)
        rows = self.num_examples if among is None else among[1] - among[0]
        if not 1 <= k <= rows:
            raise ValueError(f"k must be between 1 and the number of examples, {rows}; got {k}.")
        require_finite(asked)
        factor = 1 / facts.num_train
        best = search(self.compression, asked, self.shards(among), facts.dtype, k, factor)
        for values, _ in (best.helping, best.hurting):
            require_finite(values)  # products of finite numbers can be too large
        return SearchResult.of(best, rows)

    def append(self, more: object, *, batch_size: int = 256) -> None:
        """Add examples that were not in training: rows after those that are there.

        By one process at a time: others are refused. If interrupted, run the same call again; until
        it has returned, none of them is searched. Appending a data set again adds nothing, and
        makes those of its shards anew that are damaged.

        Args:
            more: examples in the form of the training set's, in the same order every time.

        Raises:
            ValueError: other examples are being appended, of which some are missing; or these may
                have been appended already, and cannot be told.
            TrajectoryLockedError: another process is appending.
        """
        attribution, source = self._bound(batch_size)
        added = source.others(more, batch_size, "appended")
        self.facts = append_rows(self.path, self.compression, attribution, source, added)

    @classmethod
    def merge(
        cls, indices: Sequence[AttributionIndex | str | PathLike[str]], path: str | PathLike[str]
    ) -> AttributionIndex:
        """One index of parts that were built in folders of their own, from the same coordinates.

        Shards are copied. If interrupted, run the same call again.

        Raises:
            ValueError: no indices, or of different runs, settings or coordinates.
            FileExistsError: the folder holds another index.
        """
        opened = [own if isinstance(own, AttributionIndex) else cls.open(own) for own in indices]
        if not opened:
            raise ValueError("merge needs at least one index, got none.")
        merge_files([(own.path, own.facts) for own in opened], Path(path))
        return cls.open(path, opened[0].attribution, opened[0].train)

    @classmethod
    def fetch(
        cls,
        url: str,
        path: str | PathLike[str],
        attribution: AttributionModule | None = None,
        train: object = None,
    ) -> AttributionIndex:
        """Copy an index from an object store (``s3://``, ``gs://``, whatever fsspec reads) into a
        folder, and open it. If interrupted, run the same call again: whole files are kept.

        Args:
            url: of its folder.
            attribution, train: as in :meth:`open`.

        Raises:
            FileNotFoundError: there is none.
            FileExistsError: the folder holds another index, or another state of this one.
        """
        fetch_files(url, Path(path))
        return cls.open(path, attribution, train)

    def _bound(self, batch_size: int) -> tuple[AttributionModule, ExampleSource]:
        if self.attribution is None or self.train is None:
            raise ValueError(
                "Queries and examples go through the model: open the index with it, "
                "AttributionIndex.open(path, attribution=..., train=...), train being the recorded "
                "training set."
            )
        built, given = self.facts.provenance.get("estimator"), repr(self.attribution.estimator)
        if built != given:
            raise ValueError(
                f"The index was built with {built}, and its values mean nothing to another "
                f"estimator; the attribution has {given}. Open it with an AttributionModule of "
                "that estimator."
            )
        return self.attribution, training_source(self.attribution, self.train, batch_size)
