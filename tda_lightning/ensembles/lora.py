"""Members of kind ``lora``: low-rank adapters of a recorded run's end (Deng et al., 2024).

The run's last weights are frozen, and every member trains adapters (Hu et al., 2022) on the
training set from a seed of its own. Scores are those of the adapters' training: gradients and
curvature are of the adapters alone, which are few. The adapters are peft's.

References:
    | Efficient Ensembles Improve Training Data Attribution (Deng, Li, Zhang & Ma, 2024)
    | https://arxiv.org/abs/2405.17293
    | LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2022)
    | https://arxiv.org/abs/2106.09685
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tda_lightning.attribution.matching import require_same_parameters
from tda_lightning.attribution.member_modules import ADAPTERS, adapted, require_peft
from tda_lightning.ensembles.folder import (
    begin,
    diverging,
    judge,
    recording_bytes,
)
from tda_lightning.ensembles.making import make_waiting, say
from tda_lightning.ensembles.recorder import AdapterRecorder
from tda_lightning.ensembles.seeds import seeded
from tda_lightning.records.ensemble import Ensemble, MemberFact
from tda_lightning.records.fresh_training import FreshTraining
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.module_state import load_tensors
from tda_lightning.store import layout
from tda_lightning.store.ensemble_file import read_ensemble
from tda_lightning.store.reader import read_facts
from tda_lightning.store.writer import TrajectoryWriter

KIND = "lora"
RANK = 8  # peft's


def adapt(
    run: str | os.PathLike[str],
    make: Callable[[int], FreshTraining],
    members: int = 5,
    rank: int = RANK,
    layers: Sequence[str] | None = None,
) -> Ensemble:
    """Fine-tune ``members`` sets of low-rank adapters on the training set of a recorded run.

    They are kept in ``RUN/ensemble/lora/member-1`` and so on, trajectories of the adapters. Needs
    peft: ``pip install 'tda-lightning[lora]'``.

    Args:
        run: folder of the recorded run.
        make: makes trainer, module and data from a seed, without a recorder. The module gets the
            run's last weights and adapters before it is trained; its ``configure_optimizers`` finds
            the adapters among its parameters. How long they are trained is the trainer's to say.
        members: number of sets of adapters. The recorded run is not among them.
        rank: of the adapters; the product of theirs has no further factor.
        layers: names of the layers that get adapters; None: every linear layer and convolution.

    Raises:
        ImportError: peft is not installed.
        TrajectoryMismatchError: the module is not the recorded one.
        ValueError: fewer than two members, an impossible rank, layers that are not there.

    Example:
        >>> from tda_lightning import ensembles
        >>> def make(seed):
        ...     return ensembles.FreshTraining(Trainer(max_epochs=1), Net(), Data(seed))
        >>> ensemble = ensembles.adapt("runs/fashion", make)  # doctest: +SKIP
    """
    root = begin(run, KIND, members, adapter_settings(rank, layers), with_run=False)
    return make_waiting(
        root,
        "Training adapters",
        lambda _: recording_bytes(run),
        lambda member: adapt_member(root, member, make),
    )


def adapter_settings(
    rank: int, layers: Sequence[str] | None = None, **more: object
) -> dict[str, object]:
    """What the adapters of an ensemble have in common, checked.

    Raises:
        ImportError: peft is not installed.
        ValueError: the rank is not positive.
    """
    require_peft()
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}.")
    return {"rank": rank, "layers": None if layers is None else list(layers), **more}


def adapt_member(root: Path, member: MemberFact, make: Callable[[int], FreshTraining]) -> None:
    """Train one set of adapters and note what became of it."""
    folder, facts = root / member.folder, read_ensemble(root)
    settings: Any = facts.settings
    run = Trajectory.load(root / facts.run)
    if (folder / layout.FACTS_FILE).is_file():
        say(f"Member {member.number} was cut off and starts anew: {folder}")
    assert member.seed is not None
    with seeded(member.seed), diverging(root, member.number):
        training = make(member.seed)
        require_same_parameters(training.module, run)
        last = run.checkpoints[run.last_step]
        load_tensors(training.module, {**last.buffers, **last.parameters})
        module, layers = adapted(training.module, settings["rank"], settings["layers"])
        recorder = AdapterRecorder(
            folder,
            num_checkpoints=max(1, len(run.checkpoints) - 1),
            overwrite=True,
            fingerprint=run.facts.fingerprint is not None,
        )
        training.trainer.callbacks.append(recorder)
        training.trainer.fit(module, datamodule=training.data)
        # Trainer, module and data reference each other: without this, they stay in memory.
        del training, module
        gc.collect()
        _note_adapters(folder, {"rank": settings["rank"], "layers": layers})
        judge(root, member.number)


def _note_adapters(folder: Path, adapters: dict[str, object]) -> None:
    """Among the facts of a member: attribution builds its module by them."""
    writer, recorded = TrajectoryWriter(folder), read_facts(folder)
    files = list(layout.checkpoint_files(folder))
    facts = replace(recorded, settings={**recorded.settings, ADAPTERS: adapters})
    writer.resume(recorded, max(files), files)
    writer.write_facts(facts)
