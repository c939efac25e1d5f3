"""Members of kind ``dropout``: the recorded run seen under fixed dropout masks (Deng et al., 2024).

Nothing is trained. Within a member the gradients of the training examples, those of the queries and
the curvature are all taken under one mask, which is the same for all examples.

References:
    | Efficient Ensembles Improve Training Data Attribution (Deng, Li, Zhang & Ma, 2024)
    | https://arxiv.org/abs/2405.17293
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from tda_lightning.attribution.matching import require_same_parameters
from tda_lightning.attribution.member_modules import DROPOUT, dropout_sites
from tda_lightning.ensembles.folder import begin, note, require_room, waiting
from tda_lightning.records.ensemble import FINISHED, Ensemble, MemberFact
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.compiled import uncompiled
from tda_lightning.store import layout
from tda_lightning.store.ensemble_file import read_ensemble
from tda_lightning.store.shared_files import share
from tda_lightning.store.writer import TrajectoryWriter

KIND = "dropout"
RATE = 0.1  # as the authors' library has it (dattri)


def drop_out(
    run: str | os.PathLike[str],
    module: nn.Module,
    members: int = 5,
    rate: float = RATE,
    layers: Sequence[str] | None = None,
) -> Ensemble:
    """See a recorded run under ``members`` dropout masks.

    They are kept in ``RUN/ensemble/dropout/member-1`` and so on, trajectories that share the run's
    files. Exact unrolling refuses them: the run was not trained under any of the masks.

    Args:
        run: folder of the recorded run.
        module: built as it was trained, with or without dropout.
        members: number of masks. The run without a mask is not among them.
        rate: share of units that a mask drops.
        layers: names of the parts of the module that get masks: behind dropout modules, in front of
            others. None: every dropout module; in a model without any, every linear layer and
            convolution but the first, so that hidden units are dropped as their values are read.

    Raises:
        ValueError: an impossible rate, no place for a mask, fewer than two members.

    Example:
        >>> from tda_lightning import ensembles
        >>> ensemble = ensembles.drop_out("runs/fashion", Net(), members=10)  # doctest: +SKIP
    """
    trajectory = Trajectory.load(run)
    settings = mask_settings(trajectory, module, rate, layers)
    root = begin(run, KIND, members, settings, with_run=False)
    missing = waiting(root)
    require_room(root, missing, [mask_bytes(run)] * len(missing))
    for member in missing:
        mask_member(root, member, trajectory)
    return Ensemble.load(root)


def mask_settings(
    trajectory: Trajectory, module: nn.Module, rate: float, layers: Sequence[str] | None = None
) -> dict[str, object]:
    """What the masks of an ensemble have in common, checked.

    Raises:
        TrajectoryMismatchError: the module is not the recorded one.
        ValueError: as :func:`drop_out` does.
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate must be between 0 and 1, got {rate}.")
    plain = uncompiled(module)
    require_same_parameters(plain, trajectory)
    sites = dropout_sites(plain) if layers is None else list(layers)
    known = {name for name, _ in plain.named_modules()}
    if not sites or not set(sites) <= known:
        expected = "names of parts of the module" if layers is not None else "at least two layers"
        raise ValueError(
            f"There is no place for dropout masks: expected {expected}, got "
            f"{sorted(set(sites) - known) or 'none'}."
        )
    return {"rate": rate, "sites": sites}


def mask_bytes(run: str | os.PathLike[str]) -> int:
    """Bytes that a member takes: everything but its facts is shared."""
    return (Path(run) / layout.FACTS_FILE).stat().st_size


def mask_member(root: Path, member: MemberFact, run: Trajectory) -> None:
    """Make the trajectory of one mask."""
    folder, recorded = root / member.folder, Path(str(run.path))
    settings = dict(run.facts.settings)
    settings.pop("curvature", None)  # it was gathered without a mask
    settings |= {
        "run_id": uuid.uuid4().hex,  # touches no random generator
        DROPOUT: {**read_ensemble(root).settings, "seed": member.seed},
    }
    writer = TrajectoryWriter(folder)
    writer.begin(replace(run.facts, settings=settings), run.checkpoints[0], overwrite=True)
    for first, last, file in layout.steps_files(recorded):
        share(file, layout.steps_file(folder, first, last))
    for step, file in layout.checkpoint_files(recorded).items():
        share(file, layout.checkpoint_file(folder, step))
    note(root, member.number, FINISHED)
