"""Slow, obvious answers in float64 that the library's fast ones are compared with.

Everything here loops over examples, forms dense matrices or differentiates whole training runs.
It shares no code with the package beyond the record types of ``tda_lightning.records.trajectory``.
Vectors over all parameters are flattened in the order of ``Trajectory.facts.parameters``.
"""

from tests.oracles.curvature import gauss_newton, loss_hessian, second_moment
from tests.oracles.draws import drawn_weights
from tests.oracles.ekfac import (
    KroneckerBlock,
    embed_blocks,
    kronecker_blocks,
    layer_coordinates,
    layer_positions,
)
from tests.oracles.estimators import (
    influence,
    interpolated,
    nearest,
    preconditioner,
    recorded_shares,
    source_average,
    source_recorded,
    tracin,
)
from tests.oracles.gradients import (
    checkpoint_gradients,
    cross_entropy,
    flatten,
    loss_of,
    mean_squared_error,
    per_example_gradients,
    take,
    with_state,
)
from tests.oracles.retracing import (
    Retraced,
    central_differences,
    removals,
    retrace,
    slopes,
    weighted,
)
from tests.oracles.runs import cast, cut_batches, mean_curvature, record_run
from tests.oracles.trak import Features, features, trak
from tests.oracles.unrolling import leave_one_out, measure, replay, unrolled

__all__ = [
    "Features",
    "KroneckerBlock",
    "Retraced",
    "cast",
    "central_differences",
    "checkpoint_gradients",
    "cross_entropy",
    "cut_batches",
    "drawn_weights",
    "embed_blocks",
    "features",
    "flatten",
    "gauss_newton",
    "influence",
    "interpolated",
    "kronecker_blocks",
    "layer_coordinates",
    "layer_positions",
    "leave_one_out",
    "loss_hessian",
    "loss_of",
    "mean_curvature",
    "mean_squared_error",
    "measure",
    "nearest",
    "per_example_gradients",
    "preconditioner",
    "record_run",
    "recorded_shares",
    "removals",
    "replay",
    "retrace",
    "second_moment",
    "slopes",
    "source_average",
    "source_recorded",
    "take",
    "tracin",
    "trak",
    "unrolled",
    "weighted",
    "with_state",
]
