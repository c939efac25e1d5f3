"""What exact unrolling cannot do, each by its name."""

from __future__ import annotations

from collections.abc import Collection

from tda_lightning.edits import DocumentRemoval, GraphEditSet
from tda_lightning.optimizers import require_formula
from tda_lightning.records.errors import TrajectoryMismatchError, UnsupportedTrainingError
from tda_lightning.replay.run import Replay
from tda_lightning.session.session import Session


def require_exact(
    replay: Replay,
    session: Session,
    moving: Collection[str],
    token_weights: bool,
) -> None:
    """Check that the run can be replayed and differentiated.

    Args:
        moving: layers whose running statistics move.
        token_weights: whether the terms of a loss are scored too.

    Raises:
        UnsupportedTrainingError: it cannot, and why.
        TrajectoryMismatchError: the module computes in another precision than the run.
        ValueError: token_weights with edits or with several processes.
    """
    replay.check()
    trajectory, task = session.trajectory, session.task
    require_formula(trajectory, "adjoint", "exact unrolling")
    if trajectory.last_step == 0:
        raise UnsupportedTrainingError(
            "The trajectory holds the initial weights alone: no step was recorded that could be "
            "differentiated."
        )
    if moving and int(trajectory.facts.settings.get("world_size") or 1) > 1:
        raise UnsupportedTrainingError(
            f"The run was trained in several processes, each with running statistics of its own "
            f"({', '.join(list(moving)[:3])}), of which those of the first were recorded. Train "
            "in one process, or keep these layers in eval mode."
        )
    if token_weights and session.num_processes > 1:
        raise ValueError(
            "Scores by token of exact unrolling (token_weights) are gathered in one process, got "
            f"{session.num_processes}. Give a trainer with devices=1."
        )
    if task.layers is not None:
        raise UnsupportedTrainingError(
            f"task.layers={list(task.layers)} restricts attribution to some layers, and exact "
            "unrolling follows every trained parameter: what one layer learns changes the others. "
            "Give a task without layers."
        )
    named = dict(session.module.named_parameters())
    for name, fact in trajectory.facts.parameters.items():
        own = str(named[name].dtype).removeprefix("torch.")
        if own != fact.dtype:
            raise TrajectoryMismatchError(
                f"{name} was trained in {fact.dtype}, and the module holds it in {own}: replayed "
                "in another precision, the run goes elsewhere. Convert the module, for example "
                "module.double()."
            )
    if session.edits is None:
        return
    session.edits.require_in_batches("exact unrolling")
    if token_weights:
        raise ValueError(
            "edits change an example's whole loss, and token_weights (by_token) splits its score "
            "by the terms of the old one: ask for one of them at a time."
        )
    if isinstance(session.edits, GraphEditSet):
        if moving:
            raise UnsupportedTrainingError(
                "An edit of the graph changes the statistics of its normalisation "
                f"({', '.join(list(moving)[:3])}), which is not followed through the steps. Use "
                "Source, InfluenceFunction or TracIn for it."
            )
        return
    if any(isinstance(edit, DocumentRemoval) for edit in session.edits.edits):
        raise UnsupportedTrainingError(
            "The rows hold several documents, and exact unrolling splits a row's loss by its "
            "positions: ask for Unrolled(token_weights=True), whose columns are the rows, and add "
            "up scores.by_token with tda_lightning.edits.sum_by_document."
        )
    replaced = [edit for edit in session.edits.edits if any(t.index is None for t in edit.terms())]
    if moving and replaced:
        raise UnsupportedTrainingError(
            f"{type(replaced[0]).__name__} puts another input into a batch, whose normalisation "
            f"({', '.join(list(moving)[:3])}) every other example of the batch feels: what that "
            "does to them is not followed. Use Source, InfluenceFunction or TracIn for it."
        )
