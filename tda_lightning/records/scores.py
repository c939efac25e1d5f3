"""The scores of an attribution: a plain record that can be queried, saved and loaded.

One sign and one unit for every estimator: ``values[q, n] > 0`` says that *removing* training
example n is predicted to *raise* the measurement of query q by that amount. The example is a
proponent. The factor 1/N is included, so scores compare directly with leave-one-out retraining.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple, cast, overload

import torch
from torch import Tensor

from tda_lightning.records.display import fact_lines, html_facts
from tda_lightning.records.files import StoreFunction
from tda_lightning.records.provenance import Provenance, require_well_formed, well_formed
from tda_lightning.records.query_choice import chosen_queries, no_query
from tda_lightning.records.query_scores import QueryScores, query_rows
from tda_lightning.records.ranking import ranked
from tda_lightning.records.score_checks import (
    require_candidates,
    require_finite,
    require_finite_query_tokens,
    require_finite_self_influence,
    require_finite_tokens,
    require_scored,
)

if TYPE_CHECKING:
    import pandas
    import xarray

_SHOWN = 5  # queries in a notebook


class GroupScores(NamedTuple):
    """Summed scores of groups of training examples.

    Attributes:
        labels: the groups, sorted where their labels can be, else in order of appearance.
        values: [query, group], in the order of ``labels``.
    """

    labels: list[Hashable]
    values: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """Scores of every training example for every query.

    ``scores[3]`` is one query (:class:`~tda_lightning.records.query_scores.QueryScores`);
    ``scores[2:5]``, ``scores[[0, 7]]`` and ``scores[mask]`` are scores of several.

    Attributes:
        values: [query, train]; float32, or float64 for a module in float64.
        by_segment: [segment, query, train], which sums to ``values`` over the segments (with
            ``direct``, to ``through_weights``); None for an estimator without segments.
        self_influence: [train], the score of each training example as its own query; None when
            it was not computed.
        by_token: [query, train, position], the score of each term of a training example's loss
            (the tokens of a sequence), which sums to ``values`` over positions; 0 beyond the end
            of a shorter example; None when it was not asked for.
        candidates: the training examples that were scored for each query, int64 [query, k], the
            nearest first; the others have no score, NaN in ``values``. None where every example
            was scored.
        members: [member, query, train], the scores of each run of an ensemble, whose mean is
            ``values``; None for a single run.
        by_query_token: [query, position, train], the score of each token that a query's
            measurement is made of, which sums to ``values`` over positions; None when it was not
            asked for.
        direct: [query, train], of edits of a graph, the part of ``values`` that comes of a query's
            own neighbourhood at unchanged weights; None for other columns.
        by_timestep: [timestep, query, train], the scores of a diffusion model's measurement at each
            timestep (``provenance["timesteps"]``), whose mean is ``values``; None where they were
            not asked for (``DiffusionTask(by_timestep=True)``).
        provenance: how the scores were made (``tda_lightning.records.provenance``), as JSON can
            hold it. A caller may add keys.
    """

    values: Tensor
    by_segment: Tensor | None = None
    self_influence: Tensor | None = None
    provenance: Provenance = field(default_factory=Provenance)
    by_token: Tensor | None = None
    candidates: Tensor | None = None
    members: Tensor | None = None
    by_query_token: Tensor | None = None
    direct: Tensor | None = None
    by_timestep: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or not self.values.is_floating_point():
            raise ValueError(
                "values must be a floating-point tensor [query, train], got "
                f"{self.values.dtype} of shape {list(self.values.shape)}."
            )
        queries, train = self.values.shape
        if self.by_segment is not None and (
            self.by_segment.ndim != 3
            or self.by_segment.shape[1:] != self.values.shape
            or not len(self.by_segment)
        ):
            raise ValueError(
                f"by_segment must have the shape [segment, {queries}, {train}] of values, with one "
                f"segment at least, got {list(self.by_segment.shape)}."
            )
        if self.by_timestep is not None and (
            self.by_timestep.ndim != 3 or self.by_timestep.shape[1:] != self.values.shape
        ):
            raise ValueError(
                f"by_timestep must have the shape [timestep, {queries}, {train}] of values, got "
                f"{list(self.by_timestep.shape)}."
            )
        if self.self_influence is not None and self.self_influence.shape != (train,):
            raise ValueError(
                f"self_influence must hold one number for each of the {train} training examples, "
                f"got shape {list(self.self_influence.shape)}."
            )
        if self.by_token is not None and (
            self.by_token.ndim != 3 or self.by_token.shape[:2] != self.values.shape
        ):
            raise ValueError(
                f"by_token must have the shape [{queries}, {train}, position], got "
                f"{list(self.by_token.shape)}."
            )
        if self.by_query_token is not None and (
            self.by_query_token.ndim != 3
            or (self.by_query_token.shape[0], self.by_query_token.shape[2]) != (queries, train)
        ):
            raise ValueError(
                f"by_query_token must have the shape [{queries}, position, {train}], got "
                f"{list(self.by_query_token.shape)}."
            )
        if self.members is not None and (
            self.members.ndim != 3
            or len(self.members) < 2
            or self.members.shape[1:] != self.values.shape
        ):
            raise ValueError(
                f"members must have the shape [2 or more members, {queries}, {train}] of values, "
                f"got {list(self.members.shape)}."
            )
        if self.direct is not None and self.direct.shape != self.values.shape:
            raise ValueError(
                f"direct must have the shape [{queries}, {train}] of values, got "
                f"{list(self.direct.shape)}."
            )
        if self.candidates is None:
            require_finite(self.values)
        else:
            require_candidates(self.candidates, queries, train)
            require_scored(self.values, self.candidates)
        if self.self_influence is not None:
            require_finite_self_influence(self.self_influence)
        # Of candidates alone, the others have no scores by token either.
        if self.by_token is not None and self.candidates is None:
            require_finite_tokens(self.by_token)
        if self.by_query_token is not None and self.candidates is None:
            require_finite_query_tokens(self.by_query_token)

    @property
    def through_weights(self) -> Tensor:
        """The part of ``values`` that comes by way of the weights, [query, train]: all but
        ``direct``."""
        return self.values if self.direct is None else self.values - self.direct

    @property
    def num_queries(self) -> int:
        """Rows of ``values``."""
        return self.values.shape[0]

    @property
    def num_train(self) -> int:
        """Columns of ``values``."""
        return self.values.shape[1]

    @property
    def query_indices(self) -> list[int]:
        """Position of each query in the query set: 0, 1, ... unless some were chosen."""
        known = well_formed(self.provenance).get("query_indices", [])
        return known if len(known) == self.num_queries else list(range(self.num_queries))

    @property
    def num_scored(self) -> int:
        """Training examples that have a score for a query."""
        return self.num_train if self.candidates is None else self.candidates.shape[1]

    @property
    def is_complete(self) -> bool:
        """Whether every training example has a score for every query."""
        return self.num_scored == self.num_train

    @property
    def spread(self) -> Tensor:
        """Standard error of ``values`` as the mean over an ensemble's members, [query, train].

        Raises:
            ValueError: the scores are of a single run.

        Example:
            >>> members = torch.tensor([[[1.0, 2.0]], [[3.0, 2.0]]])
            >>> Scores(members.mean(0), members=members).spread
            tensor([[1., 0.]])
        """
        members = self._members()
        spread = torch.empty_like(self.values)
        for query in range(self.num_queries):  # the file may be larger than memory
            spread[query] = members[:, query].std(0) / len(members) ** 0.5
        return spread

    def member(self, number: int) -> Scores:
        """The scores of one run of an ensemble, from 0, in the order of its members.

        Raises:
            ValueError: the scores are of a single run.
            IndexError: there is no such member.
        """
        members = self._members()
        if not 0 <= number < len(members):
            raise IndexError(
                f"Member {number} does not exist: the ensemble has {len(members)}, numbered from 0."
            )
        provenance = self.provenance.copy()
        records = provenance.pop("members", [])
        if number < len(records):
            provenance.update(records[number])  # type: ignore[typeddict-item]
        return Scores(members[number], provenance=provenance)

    def _members(self) -> Tensor:
        if self.members is None:
            raise ValueError(
                "These scores are of a single run, so they have no members and no spread. "
                "Attribute an Ensemble of runs."
            )
        return self.members

    def proponents(self, query: int, k: int = 10) -> tuple[Tensor, Tensor]:
        """The ``k`` training examples that helped ``query`` most, most helpful first.

        Returns:
            Their indices in the training set, int64 [k], and their scores, [k]. Among equal
            scores the lower index comes first. The tail is negative where fewer than ``k``
            examples helped. Examples without a score are never among them.

        Raises:
            IndexError: there is no such query.
            ValueError: ``k`` is below 1 or larger than the number of examples with a score.
        """
        return self._ranked(query, k, descending=True)

    def opponents(self, query: int, k: int = 10) -> tuple[Tensor, Tensor]:
        """The ``k`` training examples that harmed ``query`` most, most harmful first.

        Returns and raises as :meth:`proponents`; the values are mostly negative.
        """
        return self._ranked(query, k, descending=False)

    def _ranked(self, query: int, k: int, descending: bool) -> tuple[Tensor, Tensor]:
        if not 0 <= query < self.num_queries:
            raise IndexError(no_query(query, self.num_queries))
        candidates = None if self.candidates is None else self.candidates[query]
        return ranked(self.values[query], candidates, k, descending)

    def by_group(self, train_groups: Sequence[Hashable] | Tensor) -> GroupScores:
        """Sum the columns of ``values`` by the caller's labels: class, source, author, shard.

        A sum is the predicted change of the measurement if the whole group is removed, to first
        order: what the members do only together is not in it.

        Args:
            train_groups: one label for each training example, in the order of the training set.

        Raises:
            ValueError: another number of labels, or examples without a score.

        Example:
            >>> scores = Scores(torch.tensor([[1.0, 2.0, 4.0]]))
            >>> scores.by_group(["cat", "dog", "cat"])
            GroupScores(labels=['cat', 'dog'], values=tensor([[5., 2.]]))
        """
        if not self.is_complete:
            raise ValueError(
                f"Only {self.num_scored} of {self.num_train} training examples were scored for "
                "each query, so the sums of groups are not known. Score all of them, with "
                "InfluenceFunction for example."
            )
        # Elements of a tensor hash by identity, their Python numbers by value.
        listed = train_groups.tolist() if hasattr(train_groups, "tolist") else train_groups
        groups = [label.item() if isinstance(label, Tensor) else label for label in listed]
        if len(groups) != self.num_train:
            raise ValueError(
                f"train_groups must hold one label for each of the {self.num_train} training "
                f"examples, got {len(groups)}."
            )
        labels: list[Any] = list(dict.fromkeys(groups))
        with suppress(TypeError):  # labels of several types have no order
            labels = sorted(labels)
        position = {label: column for column, label in enumerate(labels)}
        columns = torch.tensor([position[label] for label in groups], dtype=torch.int64)
        sums = self.values.new_zeros(self.num_queries, len(labels))
        return GroupScores(labels, sums.index_add_(1, columns, self.values))

    def stage(self, number: int) -> Scores:
        """The columns of one stage of training, from 0, where ``provenance["stages"]`` lists
        several: column n is index n of that stage's training set.

        Raises:
            IndexError: there is no such stage.
            TrajectoryFormatError: the provenance describes stages in another form.
        """
        require_well_formed(self.provenance, ["stages", "segments"])
        stages = self.provenance.get("stages", [])
        if not 0 <= number < len(stages):
            raise IndexError(
                f"Stage {number} does not exist: the scores know {len(stages)} stages, numbered "
                "from 0."
            )
        stage = stages[number]
        columns, segments = slice(*stage["columns"]), slice(*stage["segments"])
        by_segment = None if self.by_segment is None else self.by_segment[segments, :, columns]
        values = self.values[:, columns] if by_segment is None else by_segment.sum(0)
        own = None if self.self_influence is None else self.self_influence[columns]
        provenance = self.provenance.copy()
        del provenance["stages"]
        provenance["stage"] = stage
        if by_segment is not None and "segments" in provenance:
            provenance["segments"] = provenance["segments"][segments]
        by_token = None if self.by_token is None else self.by_token[:, columns]
        tokens = self.by_query_token
        by_query_token = None if tokens is None else tokens[:, :, columns]
        by_timestep = None if self.by_timestep is None else self.by_timestep[:, :, columns]
        return Scores(
            values,
            by_segment,
            own,
            provenance,
            by_token,
            by_query_token=by_query_token,
            by_timestep=by_timestep,
        )

    def __len__(self) -> int:
        return self.num_queries

    def __iter__(self) -> Iterator[QueryScores]:
        return (self._row(query) for query in range(self.num_queries))

    @overload
    def __getitem__(self, query: int) -> QueryScores: ...

    @overload
    def __getitem__(self, query: slice | Sequence[int] | Tensor) -> Scores: ...

    def __getitem__(self, query: int | slice | Sequence[int] | Tensor) -> QueryScores | Scores:
        """One query, or the scores of several: a slice, a list of rows, or a mask over queries.

        Raises:
            IndexError: there is no such query.
        """
        kept = chosen_queries(query, self.num_queries)
        if isinstance(kept, int):
            return self._row(kept)
        return Scores(
            self.values[kept],
            None if self.by_segment is None else self.by_segment[:, kept],
            self.self_influence,
            _of_queries(self.provenance, kept.tolist(), self.query_indices),
            None if self.by_token is None else self.by_token[kept],
            None if self.candidates is None else self.candidates[kept],
            None if self.members is None else self.members[:, kept],
            by_timestep=None if self.by_timestep is None else self.by_timestep[:, kept],
        )

    def _row(self, query: int) -> QueryScores:
        made = well_formed(self.provenance)
        measured, said = made.get("measurements", []), made.get("predictions", [])
        return QueryScores(
            self.query_indices[query],
            self.values[query],
            None if self.by_segment is None else self.by_segment[:, query],
            None if self.by_token is None else self.by_token[query],
            None if self.candidates is None else self.candidates[query],
            None if self.members is None else self.members[:, query],
            measured[query] if len(measured) == self.num_queries else None,
            said[query] if len(said) == self.num_queries else None,
        )

    def _facts(self) -> dict[str, object]:
        made = well_formed(self.provenance)
        facts: dict[str, object] = {
            key: made[key]
            for key in ("estimator", "question", "trajectory", "model", "sizes", "created")
            if key in made
        }
        if self.by_segment is not None:
            facts["segments"] = len(self.by_segment)
        if self.members is not None:
            facts["runs of an ensemble"] = len(self.members)
        if self.candidates is not None:
            facts["candidates of each query"] = self.num_scored
        if self.by_token is not None:
            facts["by token"] = f"up to {self.by_token.shape[2]} positions"
        if self.self_influence is not None:
            facts["self-influence"] = "yes"
        if notes := made.get("notes"):
            facts["notes"] = f"{len(notes)}, in provenance['notes']"
        return facts

    def _title(self) -> str:
        columns = "edits" if "edits" in self.provenance else "training examples"
        return f"Scores of {self.num_train} {columns} for {self.num_queries} queries"

    def __repr__(self) -> str:
        return fact_lines(self._title(), self._facts())

    def _repr_html_(self) -> str:
        shown = [self._row(query) for query in range(min(_SHOWN, self.num_queries))]
        return html_facts(self._title(), self._facts()) + query_rows(shown, self.num_queries)

    def to_pandas(self, k: int | None = None) -> pandas.DataFrame:
        """A table with a row for each query and training example (long form).

        Columns: ``query``, its position in the query set; ``train``, or ``edit`` where the columns
        of the scores are edits; ``rank``, 1 for the most helpful; ``score``; ``spread`` in an
        ensemble; ``segment_1``, ``segment_2``, ... in an estimator with segments. Rows are ordered
        by query and rank. Examples without a score have no row. ``frame.attrs`` holds the
        provenance.

        Args:
            k: of each query only the ``k`` most helpful and the ``k`` most harmful examples; None:
                all.

        Raises:
            ImportError: pandas is not installed.
            ValueError: ``k`` is below 1.
        """
        return _to_pandas(self, k)

    def to_xarray(self) -> xarray.Dataset:
        """All tensors as one labelled data set with dimensions ``query``, ``train``, ``segment``,
        ``position`` and ``member``; what is known of queries and segments are coordinates, the
        provenance is in the attributes. ``to_netcdf`` can write it.

        Raises:
            ImportError: xarray is not installed.
        """
        return _to_xarray(self)

    def to_parquet(
        self, path: str | PathLike[str], k: int | None = None, overwrite: bool = False
    ) -> None:
        """Write the table of :meth:`to_pandas` to a Parquet file, some queries at a time.

        Raises:
            FileExistsError: ``path`` exists and ``overwrite`` was not asked for.
            ImportError: pyarrow is not installed.
            ValueError: ``k`` is below 1.
        """
        _to_parquet(self, path, k, overwrite)

    def save(self, path: str | PathLike[str], overwrite: bool = False) -> None:
        """Write the scores to one HDF5 file (described in ``tda_lightning.store.layout``).

        Raises:
            FileExistsError: ``path`` exists and ``overwrite`` was not asked for.
        """
        _write_scores(self, path, overwrite)

    @staticmethod
    def load(
        path: str | PathLike[str], queries: slice | None = None, mapped: bool = False
    ) -> Scores:
        """The scores saved at ``path``.

        Args:
            path: a file written by :meth:`save` or by an attribution with ``scores_path``.
            queries: read only these rows, as in ``values[queries]``; all of them when None.
            mapped: leave the numbers in the file and let the operating system page them in when
                they are used, for files larger than memory. Otherwise everything is read into
                memory and compared with its checksums. Replace a mapped file only by renaming.

        Raises:
            FileNotFoundError: there is no such file.
            TrajectoryFormatError: it holds no scores, is damaged, or of a newer format version.
        """
        return _read_scores(path, queries, mapped)


_write_scores: StoreFunction[[Scores, str | PathLike[str], bool], None]
_write_scores = StoreFunction("write_scores")
_read_scores: StoreFunction[[str | PathLike[str], slice | None, bool], Scores]
_read_scores = StoreFunction("read_scores")
_to_pandas: StoreFunction[[Scores, int | None], pandas.DataFrame]
_to_pandas = StoreFunction("to_pandas", "exports")
_to_xarray: StoreFunction[[Scores], xarray.Dataset]
_to_xarray = StoreFunction("to_xarray", "exports")
_to_parquet: StoreFunction[[Scores, str | PathLike[str], int | None, bool], None]
_to_parquet = StoreFunction("to_parquet", "exports")


def _of_queries(provenance: Provenance, rows: list[int], before: list[int]) -> Provenance:
    """The provenance of some of the queries: entries of one each are chosen likewise."""
    made = well_formed(provenance)
    kept = _rows_of(provenance, rows, len(before))
    if "members" in made:
        kept["members"] = [_rows_of(member, rows, len(before)) for member in made["members"]]
    kept["query_indices"] = [before[row] for row in rows]
    return cast(Provenance, kept)


def _rows_of(record: Mapping[str, object], rows: list[int], count: int) -> dict[str, object]:
    kept = dict(record)
    for key in ("measurements", "predictions"):
        values = kept.get(key)
        if isinstance(values, list) and len(values) == count:
            kept[key] = [values[row] for row in rows]
    return kept
