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

# The damping of influence functions: absolute, or as a multiple of a mean eigenvalue.
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
    """Curvature statistics that were recorded during training."""

    gathered: str  # in training
    eigenvalues: str  # how they were corrected: in one pass, or from recorded traces
    examples: list[Count]  # behind the statistics of each segment
    fitted: list[str]  # blocks of which training gathered none


class Residual(TypedDict):
    """Relative errors over the queries."""

    max: float
    median: float


class _SolverName(TypedDict):
    name: str  # class of the solver


class SolverRecord(_SolverName, total=False):
    """How the linear systems of influence functions were solved."""

    settings: dict[str, object]  # fields of the solver
    damping: float | list[float]  # one number, or the least and the largest
    products: float  # curvature-vector products spent on the solutions
    products_by: str  # how they were computed
    tolerance: float | None  # relative residual asked for
    relative_residual: Residual | None  # None where unknown
    reached: bool | None  # whether all queries reached the tolerance; None without one
    step: float  # step size (ASTRA)
    scale: float  # of the recursion (LiSSA)
    rank: Count  # of the Krylov basis (Lanczos)
    ended_by: str  # rounding, if that ended the iteration (conjugate gradients)
    negative_eigenvalues: Count  # how many there were (direct solver)


class ProductCounts(TypedDict):
    """Curvature-vector products per query and segment."""

    max: Count
    mean: float


class MatrixFreeRecord(TypedDict, total=False):
    """Matrix-free SOURCE."""

    blocks: str  # full or layer
    products: Count  # all curvature-vector products together
    products_per_query_and_segment: ProductCounts
    products_by: str  # how they were computed
    walks_over_training_set: Count
    tolerance: float  # relative error asked for
    relative_error: Residual  # of the matrix functions, estimated
    reached: bool  # whether all are within the tolerance


class ProjectionRecord(TypedDict, total=False):
    """The directions that TRAK projects gradients on."""

    dimension: Count
    kind: str  # how they are drawn
    rank: Count  # dimensions that the training examples span
    seed: int


class CandidatesRecord(TypedDict, total=False):
    """Which training examples FastIF scored."""

    k: Count  # per query
    examples: Count  # distinct candidates of all queries
    features: str  # where in the model they were read
    metric: str  # by which they were compared


class Certificate(TypedDict):
    """How close a replay came to the recorded checkpoints."""

    bit_equal: bool
    largest_difference: float  # of a single weight
    relative_difference: float  # of all weights, relative to their movement between checkpoints
    checkpoints: Count  # compared
    tolerance: float  # relative difference allowed


class Directions(TypedDict):
    """Directions that were carried back through a run in place of queries."""

    kept: Count
    probes: Count  # carried back besides, to measure what is left out
    queries: Count  # whose scores are made of them
    tolerance: float  # of what is left out of a query's gradient, relative to its length
    relative_error: float  # of a query's scores, root mean square; the median over queries
    error_bound: float  # of any query's scores, relative to their length; 99.9% sure


class BeyondRange(TypedDict):
    """Scores far beyond the range of the measurement over the run."""

    largest: float  # size of a score
    count: Count  # how many there are


class WhatIfRecord(TypedDict, total=False):
    """Where the derivative was taken, if not at the recorded run."""

    keep: Share  # mean weight of the training examples
    # All at ``keep``; the same with expected second moments; random subsets at 0 and 1
    weights: Literal["uniform", "expected", "subsets"]
    draws: Count  # of random subsets, for each recorded run
    rate: float  # times the recorded rates
    runs: list[str]  # folders of the what-if runs, or "in memory"


class StageRecord(TypedDict):
    """One of several stages of training; other keys mean what they mean in :class:`Provenance`."""

    trajectory: str
    model: str
    task: dict[str, object]
    num_train: Count
    columns: Pair  # of the scores that belong to the stage
    segments: Pair  # likewise
    steps: Pair  # counted from the start of the first stage
    trained_parameters: Count
    frozen_parameters: list[str]  # used by the stage, but trained by an earlier one
    notes: list[str]


class _EditKind(TypedDict):
    kind: str


class EditRecord(_EditKind, total=False):
    """The edit that a column is about.

    Attributes:
        kind: its class.
        index: of the training example that it changes; absent where it changes none.
        label: the example's other label.
        document: the document whose tokens count nothing.
    """

    index: Count
    label: object
    document: Count


class PoolRecord(TypedDict):
    """The examples outside of training that columns are about.

    Attributes:
        size: how many.
        in_training: how many of them the training set holds as well.
        same: pairs (column, training example) of the first of those.
    """

    size: Count
    in_training: Count
    same: list[Pair]


class MemberRecord(TypedDict, total=False):
    """One run of an ensemble; the keys mean what they mean in :class:`Provenance`."""

    trajectory: str
    steps: Count
    measurements: list[float]
    predictions: list[str]
    certificate: Certificate
    notes: list[str]


class _JudgedCounts(TypedDict):
    num_subsets: Count  # retrained on; examples given up, for pbrf
    num_queries: Count


class SpotCheck(_JudgedCounts, total=False):
    """How well scores predict retraining."""

    lds: Correlation | None  # linear datamodeling score; None where undefined
    reason: str  # why it is undefined
    over_queries: Interval  # 95%
    over_subsets: Interval  # 95%
    limit_by_seeds: Correlation  # the best lds that noise between seeds allows
    slope: float | None  # of measured changes on predicted ones; None for scores without a unit
    protocol: str  # single_run, algorithm or pbrf
    alpha: Share  # of the training set that a subset keeps
    num_seeds: Count  # per subset
    damping: float  # of the proximal Bregman response


# Rank correlation of scores with those at a tenth of their damping and at ten times it.
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
    """What ``tda evaluate spot_check=true`` found; a check replaces an earlier one of its kind."""

    spot_check: SpotCheck  # against retraining
    pbrf: SpotCheck  # against the proximal Bregman response
    agreement: dict[str, Correlation]  # rank correlation with other scores, by their names
    damping: DampingSensitivity  # of influence functions
    seed_variance_share: Share  # share of the measurements' variance that lies between seeds
    command: str  # of the last check
    created: str  # when it was made


class CommandConfig(TypedDict, total=False):
    """The configuration of ``tda attribute``, as far as anything reads it."""

    trajectory: str
    data: dict[str, object]
    measurement: dict[str, object]  # what is asked; absent or null for the task's own
    pool: dict[str, object]  # changes of the data settings that give the pool
    estimator: dict[str, object]  # its class and settings


class MeasurementRecord(TypedDict):
    """What was asked about each query, where it is not the task's own measurement.

    Attributes:
        quantity: in words, such as "the probability of the label".
        sign: measurement = sign x quantity; -1 where larger is better.
    """

    quantity: str
    sign: Annotated[int, Bounds(-1, 1)]


class Provenance(TypedDict, total=False):
    """How scores were made."""

    # The estimator, and the question that the scores answer
    estimator: str  # class name
    settings: dict[str, Any]  # its fields
    question: str  # in words
    what_if: WhatIfRecord  # absent at the recorded run, where every weight is 1
    measurement: MeasurementRecord  # absent for the task's own
    sizes: str  # whether scores predict how much a measurement changes, or only rank examples
    segments: list[Pair]  # first and last step of each
    checkpoints: list[Count] | list[list[Count]]  # steps; SOURCE has a list per segment
    nodes: dict[str, list[int]]  # of one graph: ids of the training nodes ("train") and the queries
    edits: list[EditRecord]  # what each column is about, where it is not the removal of its example
    pool: PoolRecord  # columns are the additions of its examples
    relabel: dict[str, object]  # other labels by training index, in files of version 0.1
    candidates: CandidatesRecord  # FastIF
    projection: ProjectionRecord  # TRAK
    # Its curvature; with several stages, lists have an entry for each
    curvature: str | None  # None where the estimator uses none
    fisher: str | list[str | None] | None  # which Fisher or Gauss-Newton matrix it stands for
    statistics: Statistics | list[Statistics | None]  # recorded in training, if they were used
    leading_directions: Count | list[Count]  # eigenvectors that SOURCE keeps exactly
    damping: Damping
    proximity: list[float | None]  # multi-stage influence: of each stage
    solver: SolverRecord
    matrix_free: MatrixFreeRecord
    # Its replay (exact unrolling)
    certificate: Certificate
    directions: Directions
    replayed_steps: Pair
    # The run
    trajectory: str | list[str]  # folder, or "in memory"
    model: str  # class name
    task: dict[str, object]  # class and settings
    draws: Count  # of the noise in a loss, over which it is averaged
    timesteps: list[Count]  # of by_timestep, where a diffusion model was measured at each
    steps: Count  # of the optimizer
    num_train: Count
    trained_parameters: Count  # scalars
    members: list[MemberRecord]  # of an ensemble; measurements are their means
    ensemble: str  # its kind, if it was made by tda_lightning.ensembles
    stages: list[StageRecord]  # if there are several
    stage: StageRecord  # the one that is left (Scores.stage)
    # The machine
    world_size: Count  # processes
    precision: str
    device: str
    versions: dict[str, str]  # of packages
    created: str  # ISO 8601
    seconds: Seconds  # of the attribution
    processor_seconds: Seconds  # of its process, all threads together
    # The queries, one entry each
    measurements: list[float]  # of the final model
    predictions: list[str]  # in words
    measured_range: Annotated[list[float], Bounds(2, 2)]  # over all queries and checkpoints used
    beyond_range: BeyondRange  # where scores cannot be right in size
    query_indices: list[Count]  # positions in their data set, where these are not 0, 1, ...
    # For the reader
    notes: list[str]
    command: str  # the tda command that made the scores
    config: CommandConfig
    trust: Trust


def well_formed(provenance: Mapping[str, object]) -> Provenance:
    """The part of a provenance that has the form above.

    An entry of another form is left out, at any depth; a nested record that lacks a required key is
    left out as a whole. Keys that the schema does not know stay.

    Example:
        >>> well_formed({"estimator": "TracIn", "seconds": "soon", "my_key": 1})
        {'estimator': 'TracIn', 'my_key': 1}
    """
    return cast(Provenance, _fitting(provenance, Provenance))


def require_well_formed(provenance: Mapping[str, object], names: Iterable[str]) -> None:
    """Refuse a provenance whose entries ``names`` have another form.

    Raises:
        TrajectoryFormatError: names the first of them.
    """
    fitting: Mapping[str, object] = well_formed(provenance)
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
    if form is Any or form is object:
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
    fitting = {name: _fitting(entry, typed_keys.get(name, object)) for name, entry in value.items()}
    fitting = {name: entry for name, entry in fitting.items() if entry is not _UNFIT}
    return fitting if form.__required_keys__ <= fitting.keys() else _UNFIT
