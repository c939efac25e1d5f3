"""How scores were made: the one schema of ``Scores.provenance``, as it is written to JSON.

Estimators, the attribution and ``tda evaluate`` write its parts; the report and ``tda evaluate``
read them. Every key is optional, and a caller may add keys of its own. A scores file can come from
anywhere, so what reads one goes through :func:`well_formed`.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Iterable, Mapping
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypedDict,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from tda_lightning.records.errors import TrajectoryFormatError


class Bounds(NamedTuple):
    """The least and the largest value that a number, or the length of a list, may have."""

    least: float
    largest: float


Count = Annotated[int, Bounds(0, 2**53)]
Pair = Annotated[list[Count], Bounds(2, 2)]  # [start, stop], the stop excluded
Share = Annotated[float, Bounds(0, 1)]
Correlation = Annotated[float, Bounds(-1 - 1e-9, 1 + 1e-9)]
Interval = Annotated[list[Correlation | None], Bounds(2, 2)]  # [low, high], None where unknown
Seconds = Annotated[float, Bounds(0, 1e12)]  # longer than any attribution

# The damping as applied: absolute, or as a multiple of a mean eigenvalue.
Damping = TypedDict(
    "Damping",
    {
        "absolute": float,
        "relative to the layer's mean eigenvalue": float,
        "relative to each layer's mean eigenvalue": float,
        "relative to the mean eigenvalue": float,
    },
    total=False,
)


class Statistics(TypedDict, total=False):
    """Curvature statistics that were recorded during training.

    Attributes:
        gathered: ``in training``.
        eigenvalues: how eigenvalues were corrected: by one pass, or from recorded traces.
        examples: number of examples behind the statistics of each segment.
    """

    gathered: str
    eigenvalues: str
    examples: list[Count]


class Residual(TypedDict):
    """Relative residuals of the linear systems, over the queries."""

    max: float
    median: float


class _SolverName(TypedDict):
    name: str


class SolverRecord(_SolverName, total=False):
    """How the linear systems of influence functions were solved.

    Attributes:
        name: class of the solver.
        settings: its fields.
        damping: one number, or the least and the largest.
        products: curvature-vector products spent on the solutions.
        products_by: how products were computed.
        tolerance: relative residual asked for.
        relative_residual: the residuals reached; None where they are unknown.
        reached: whether every query reached the tolerance; None where none was asked for.
        step: step size (ASTRA).
        scale: scale of the recursion (LiSSA).
        rank: dimension of the Krylov basis (Lanczos).
        ended_by: ``rounding`` where rounding ended the iteration (conjugate gradients).
        negative_eigenvalues: how many there were (direct solver).
    """

    settings: dict[str, Any]
    damping: float | list[float]
    products: float
    products_by: str
    tolerance: float | None
    relative_residual: Residual | None
    reached: bool | None
    step: float
    scale: float
    rank: Count
    ended_by: str
    negative_eigenvalues: Count


class ProductCounts(TypedDict):
    """Curvature-vector products per query and segment."""

    max: Count
    mean: float


class MatrixFreeRecord(TypedDict, total=False):
    """Matrix-free SOURCE.

    Attributes:
        blocks: ``full`` or ``layer``.
        products: all curvature-vector products together.
        products_per_query_and_segment: largest number and mean.
        products_by: how products were computed.
        walks_over_training_set: passes over the training set that they took.
        tolerance: relative error asked for.
        relative_error: the estimated errors of the matrix functions.
        reached: whether all of them are within the tolerance.
    """

    blocks: str
    products: Count
    products_per_query_and_segment: ProductCounts
    products_by: str
    walks_over_training_set: Count
    tolerance: float
    relative_error: Residual
    reached: bool


class CandidatesRecord(TypedDict, total=False):
    """Which training examples FastIF scored.

    Attributes:
        k: candidates per query.
        examples: distinct candidates of all queries.
        features: where in the model features were read.
        metric: by which they were compared.
    """

    k: Count
    examples: Count
    features: str
    metric: str


class Certificate(TypedDict):
    """How close the replay came to the recorded checkpoints.

    Attributes:
        bit_equal: whether it landed on all of them bit for bit.
        largest_difference: of a single weight.
        relative_difference: of all weights, relative to how far they moved between checkpoints.
        checkpoints: how many were compared.
        tolerance: relative difference allowed.
    """

    bit_equal: bool
    largest_difference: float
    relative_difference: float
    checkpoints: Count
    tolerance: float


class StageRecord(TypedDict):
    """One of several stages of training; the keys have the meaning of those of `Provenance`.

    Attributes:
        columns: columns of the scores that belong to the stage.
        segments: segments of the scores that belong to it.
        steps: optimizer steps, counted from the start of the first stage.
        frozen_parameters: parameters that the stage uses and does not train.
    """

    trajectory: str
    model: str
    task: dict[str, Any]
    num_train: Count
    columns: Pair
    segments: Pair
    steps: Pair
    trained_parameters: Count
    frozen_parameters: list[str]
    notes: list[str]


class _EditKind(TypedDict):
    kind: str


class EditRecord(_EditKind, total=False):
    """The edit that a column is about.

    Attributes:
        kind: its class.
        index: of the training example that it changes; absent where it changes none.
        label: the example's other label.
    """

    index: Count
    label: Any


class MemberRecord(TypedDict, total=False):
    """One run of an ensemble; the keys have the meaning of those of `Provenance`."""

    trajectory: str
    steps: Count
    measurements: list[float]
    predictions: list[str]
    certificate: Certificate
    notes: list[str]


class _Judgement(TypedDict):
    num_subsets: Count
    num_queries: Count


class SpotCheck(_Judgement, total=False):
    """How well the scores predict retraining.

    Attributes:
        num_subsets: subsets of the training set that were retrained on.
        num_queries: queries that were measured.
        lds: linear datamodeling score; None where undefined.
        reason: why it is undefined.
        over_queries: 95% interval over queries.
        over_subsets: 95% interval over subsets.
        slope: of the measured changes on the predicted ones; None for scores without a unit.
        protocol: ``single_run``, ``algorithm`` or ``pbrf``.
        alpha: share of the training set in a subset.
        num_seeds: retrainings per subset.
        damping: of the proximal Bregman response (``pbrf``).
    """

    lds: Correlation | None
    reason: str
    over_queries: Interval
    over_subsets: Interval
    slope: float | None
    protocol: str
    alpha: Share
    num_seeds: Count
    damping: float


# Rank correlation of the scores with those at a tenth of the damping and at ten times it.
DampingSensitivity = TypedDict(
    "DampingSensitivity",
    {
        "setting": Literal["damping", "relative_damping"],
        "value": float,
        "0.1": Correlation,
        "10": Correlation,
    },
    total=False,
)


class Trust(TypedDict, total=False):
    """What ``tda evaluate spot_check=true`` found. A new check replaces an earlier one of its kind.

    Attributes:
        spot_check: against retraining.
        pbrf: against the proximal Bregman response, what influence functions approximate.
        agreement: rank correlation with other scores, by their names.
        damping: sensitivity to the damping; influence functions only.
        seed_variance_share: share of the measurements' variance that lies between seeds.
        command: of the last check.
        created: when it was made.
    """

    spot_check: SpotCheck
    pbrf: SpotCheck
    agreement: dict[str, Correlation]
    damping: DampingSensitivity
    seed_variance_share: Share
    command: str
    created: str


class CommandConfig(TypedDict, total=False):
    """The configuration of ``tda attribute``, as far as anything reads it again."""

    trajectory: str
    data: dict[str, Any]


class Provenance(TypedDict, total=False):
    """How scores were made.

    Attributes:
        estimator: class name.
        settings: the estimator's fields.
        question: which question the scores answer, in words.
        curvature: kind of curvature; None where the estimator uses none.
        fisher: which Fisher or Gauss-Newton matrix it stands for; one per stage for several.
        statistics: curvature recorded in training, where it was used; one per stage likewise.
        damping: of influence functions.
        solver: of influence functions without an eigenbasis.
        matrix_free: of matrix-free SOURCE.
        leading_directions: eigenvectors that SOURCE keeps exactly; one number per stage.
        candidates: of FastIF.
        edits: what each column is about, where it is not the removal of the training example of
            the same number.
        relabel: other labels that the scores are about, by training index (files of earlier
            versions).
        certificate: of a replay (exact unrolling).
        replayed_steps: steps that were replayed (exact unrolling).
        checkpoints: steps of the checkpoints used; a list per segment for SOURCE.
        segments: first and last step of each segment.
        stages: one record per stage, where there are several.
        members: one record per run of an ensemble; ``measurements`` are their means.
        stage: the record of the only stage that is left (:meth:`Scores.stage`).
        task: its class and settings.
        trajectory: folder of the run, or ``in memory``; a list for several runs.
        model: class name.
        steps: optimizer steps of the run.
        num_train: training examples.
        trained_parameters: number of scalars.
        world_size: processes that scored.
        precision: of the Trainer that scored.
        device: likewise.
        versions: of packages.
        created: time, ISO 8601.
        seconds: wall-clock time of the attribution.
        processor_seconds: processor time of its process, all threads together.
        notes: what a reader should know.
        measurements: of each query, by the final model.
        predictions: for each query, in words.
        query_indices: positions of the queries in their data set, where these are not 0, 1, ...
        command: the ``tda`` command that made the scores.
        config: its configuration.
        trust: what a spot check found.
    """

    estimator: str
    settings: dict[str, Any]
    question: str
    curvature: str | None
    fisher: str | list[str | None] | None
    statistics: Statistics | list[Statistics | None]
    damping: Damping
    solver: SolverRecord
    matrix_free: MatrixFreeRecord
    leading_directions: Count | list[Count]
    candidates: CandidatesRecord
    edits: list[EditRecord]
    relabel: dict[str, Any]
    certificate: Certificate
    replayed_steps: Pair
    checkpoints: list[Count] | list[list[Count]]
    segments: list[Pair]
    members: list[MemberRecord]
    stages: list[StageRecord]
    stage: StageRecord
    task: dict[str, Any]
    trajectory: str | list[str]
    model: str
    steps: Count
    num_train: Count
    trained_parameters: Count
    world_size: Count
    precision: str
    device: str
    versions: dict[str, str]
    created: str
    seconds: Seconds
    processor_seconds: Seconds
    notes: list[str]
    measurements: list[float]
    predictions: list[str]
    query_indices: list[Count]
    command: str
    config: CommandConfig
    trust: Trust


def well_formed(provenance: Mapping[str, Any]) -> Provenance:
    """The part of a provenance that has the form above.

    An entry of another form is left out, at any depth; a nested record that lacks a required key is
    left out as a whole. Keys that the schema does not know stay.

    Example:
        >>> well_formed({"estimator": "TracIn", "seconds": "soon", "my_key": 1})
        {'estimator': 'TracIn', 'my_key': 1}
    """
    return cast(Provenance, _fitting(provenance, Provenance))


def require_well_formed(provenance: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse a provenance whose entries ``names`` have another form.

    Raises:
        TrajectoryFormatError: names the first of them.
    """
    fitting: Mapping[str, Any] = well_formed(provenance)
    for name in names:
        if name in provenance and fitting.get(name) != provenance[name]:
            raise TrajectoryFormatError(
                f"The provenance of these scores is damaged: expected {name!r} as described in "
                f"tda_lightning.records.provenance, got {provenance[name]!r:.200}. Make the scores "
                "again."
            )


_UNFIT = object()
_typed_keys = functools.cache(functools.partial(get_type_hints, include_extras=True))


def _fitting(value: Any, form: Any) -> Any:
    """``value`` without what does not have the type ``form``; ``_UNFIT`` where nothing is left."""
    if form is Any:
        return value
    if is_typeddict(form):
        return _fitting_record(value, form)
    origin, arguments = get_origin(form), get_args(form)
    if origin is Annotated:
        kind, bounds = arguments
        value = _fitting(value, kind)
        size = len(value) if isinstance(value, list) else value
        return value if size is not _UNFIT and bounds.least <= size <= bounds.largest else _UNFIT
    if origin in (Union, types.UnionType):
        fitting = (_fitting(value, choice) for choice in arguments)
        return next((choice for choice in fitting if choice is not _UNFIT), _UNFIT)
    if origin is Literal:
        return value if isinstance(value, str) and value in arguments else _UNFIT
    if origin is list:
        entries = [_fitting(entry, arguments[0]) for entry in value] if type(value) is list else ()
        return _UNFIT if type(value) is not list or _UNFIT in entries else entries
    if origin is dict:
        if not isinstance(value, Mapping):
            return _UNFIT
        pairs = ((str(name), _fitting(entry, arguments[1])) for name, entry in value.items())
        return {name: entry for name, entry in pairs if entry is not _UNFIT}
    if form is float:  # JSON writes 1.0 as 1
        finite = type(value) is float and math.isfinite(value)
        return value if finite or (type(value) is int and abs(value) < 2**53) else _UNFIT
    return value if type(value) is form else _UNFIT


def _fitting_record(value: Any, form: Any) -> Any:
    if not isinstance(value, Mapping):
        return _UNFIT
    typed_keys = _typed_keys(form)
    fitting = {name: _fitting(entry, typed_keys.get(name, Any)) for name, entry in value.items()}
    fitting = {name: entry for name, entry in fitting.items() if entry is not _UNFIT}
    return fitting if form.__required_keys__ <= fitting.keys() else _UNFIT
