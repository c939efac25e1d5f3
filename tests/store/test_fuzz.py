"""Damaged files give an error of ours or valid data: no other exception, no hang, no new file.

What a call may raise is part of its contract:

- ``open_trajectory``, ``checkpoints[step]``, ``curvature[key]``, ``describe``: ``TrajectoryError``
  and, where the user may not read a file or folder, ``PermissionError``.
- ``Scores.load``: ``TrajectoryFormatError``, ``FileNotFoundError``, ``PermissionError``.
- An attribution of what was accepted: ``TrajectoryError``, ``NonFiniteError`` (extreme numbers).
- A report of what was accepted: nothing.

``TDA_FUZZ_CASES=20000`` runs more cases than the usual 2040, which are 30 of each mutation, eleven
twelfths of them slow tests; ``TDA_FUZZ_SEED`` runs others.
"""

from __future__ import annotations

import io
import math
import os
import random
import shutil
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from rich.console import Console

from tda_lightning import AttributionModule, Scores, Trajectory
from tda_lightning.cli.inspect_table import description_table
from tda_lightning.estimators import InfluenceFunction, TracIn
from tda_lightning.records.curvature_statistics import BlockStatistics
from tda_lightning.records.errors import (
    NonFiniteError,
    TrajectoryError,
    TrajectoryFormatError,
    TrajectoryMismatchError,
)
from tda_lightning.report import write_report
from tda_lightning.runtime.random_states import current_states, restore_states, unchanged_randomness
from tda_lightning.store import open_trajectory
from tda_lightning.store.inspect import describe
from tda_lightning.store.writer import TrajectoryWriter
from tda_lightning.tasks import RegressionTask
from tests import fuzzing
from tests.attributing import quiet
from tests.fuzzing import Case, Outcome, run_cases
from tests.mutations import BYTES, FOLDER
from tests.mutations_hdf5 import CONTENT
from tests.runs import Net, Numbered, adamw, fit, loader

pytestmark = pytest.mark.filterwarnings("ignore")

CASES = int(os.environ.get("TDA_FUZZ_CASES", "2040"))
PARTS = 12  # tests of their own, which several processes share
QUICK = 1  # of them in make test
SEED = int(os.environ.get("TDA_FUZZ_SEED", "0"))
MUTATIONS = {**BYTES, **FOLDER, **CONTENT}
REFUSALS = (TrajectoryError, PermissionError)


class Pairs(Numbered):
    """Examples without their index, as an attribution takes them."""

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)[:2]


class Plain(Net):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


@pytest.fixture(scope="session")
def bases() -> Iterator[dict[str, Path]]:
    """Recorded folders by name; a folder of scores is one of them."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.chmod(root, 0o755)  # so that a child without privileges can be kept out of a part only
        train = loader(Pairs(), batch_size=8, shuffle=True)
        fit(root / "adamw", train, module=Plain(adamw), recorder={"num_checkpoints": 1})
        online = {"every_n_steps": 2, "curvature": "online", "curvature_every": 1}
        fit(root / "online", train, module=Plain(), recorder=online, max_steps=4)
        fit(
            root / "bfloat16",
            train,
            module=Plain().bfloat16(),
            precision="bf16-true",
            max_steps=1,
        )
        # A run that was killed before its steps were joined.
        wide = loader(Pairs(70), batch_size=16)
        with pytest.MonkeyPatch.context() as patch:  # for this run alone
            patch.setattr(TrajectoryWriter, "finish", lambda self: None)
            fit(root / "momentum", wide, module=Plain(), recorder={"every_n_steps": 2}, max_steps=4)
        _attribute(root / "adamw", InfluenceFunction(), root / "scores" / "all" / "influence.h5")
        (root / "adamw" / "scores").mkdir()
        generator = torch.Generator().manual_seed(0)
        parts = torch.randn(3, 4, 70, generator=generator, dtype=torch.float64)
        own = torch.rand(70, generator=generator)
        tokens = torch.randn(4, 70, 6, generator=generator, dtype=torch.float64)
        Scores(parts.sum(0), parts, own, _long(), tokens).save(
            root / "scores" / "all" / "segments.h5"
        )
        # Compiles the template here, once for all children.
        write_report(Scores(parts[0].float()), root / "page.html").unlink()
        Scores(parts[0].float()).save(root / "scores" / "all" / "plain.h5")
        chosen = torch.stack([torch.randperm(70, generator=generator)[:9] for _ in range(4)])
        few = torch.full((4, 70), torch.nan, dtype=torch.float64)
        few.scatter_(1, chosen, parts[0].gather(1, chosen))
        Scores(few, candidates=chosen, provenance={"candidates": {"k": 9}}).save(
            root / "scores" / "all" / "candidates.h5"
        )
        (root / "adamw" / "scores" / "plain.h5").write_bytes(
            (root / "scores" / "all" / "plain.h5").read_bytes()
        )
        yield {path.name: path for path in sorted(root.iterdir())}


def _long() -> dict[str, Any]:
    return {
        "estimator": {"name": "Source", "num_segments": 3},
        "segments": [[0, 3], [3, 6], [6, 9]],
        "predictions": ["a", "b", "c", "d"],
        "measurements": [0.1, 0.2, 0.3, 0.4],
        "query_indices": [0, 2, 4, 6],
        "notes": ["note"] * 3,
        "config": {"data": {"root": "x" * 4000}},
    }


def _attribute(folder: Path, estimator: Any, path: Path | None = None) -> Scores:
    attribution = AttributionModule(Plain(), str(folder), estimator, RegressionTask())
    given = {"train": Pairs(), "query": Pairs(3, seed=1), "trainer": quiet()}
    return attribution.attribute(**given, scores_path=None if path is None else str(path))


def cases(count: int, bases: dict[str, Path]) -> list[Case]:
    """``count`` cases: every mutation as often as any other, over all folders in turn."""
    names, folders = list(MUTATIONS), [*bases, "online", "scores", "scores"]
    found = []
    for number in range(count):
        turn, place = divmod(number, len(names))
        kind, base = names[place], folders[(turn + place) % len(folders)]
        found.append(Case(SEED * 10**6 + number, kind, base, MUTATIONS[kind]))
    return found


def read(case: Case, folder: Path, victim: Path) -> bool:
    """Read all that there is; True when nothing was refused."""
    if case.base == "scores":
        # A mutation of the folder may have moved the file, or put others beside it.
        moved = case.kind in FOLDER
        others = [p for p in folder.rglob("*") if moved and p != victim and not p.is_dir()]
        return all([read_scores(victim, report=True), *map(read_scores, others)])
    whole = read_trajectory(folder, attribute=case.base == "adamw" and case.kind in CONTENT)
    inspected = inspect_folder(folder, show=case.kind in {*CONTENT, *FOLDER})
    assert whole or not inspected, "inspect finds whole what cannot be read"
    return whole


def read_trajectory(folder: Path, attribute: bool) -> bool:
    try:
        trajectory = open_trajectory(folder)
    except REFUSALS:
        return False
    require_valid(trajectory)
    for states in trajectory.steps.random.values():
        require_restorable(states)
    refused = False
    for step in trajectory.checkpoints:
        try:
            checkpoint = trajectory.checkpoints[step]
            states, random = dict(checkpoint.optimizer or {}), dict(checkpoint.random or {})
        except REFUSALS:
            refused = True
            continue
        assert checkpoint.step == step
        assert list(checkpoint.parameters) == list(trajectory.facts.parameters)
        for name, fact in trajectory.facts.parameters.items():
            tensor = checkpoint.parameters[name]
            assert (tuple(tensor.shape), f"torch.{fact.dtype}") == (fact.shape, str(tensor.dtype))
        for name, state in states.items():
            assert name in checkpoint.parameters
            assert all(isinstance(value, torch.Tensor) for value in state.values())
        if random:
            require_restorable(random)
    try:
        for interval in trajectory.statistics:
            for block in trajectory.statistics[interval].values():
                require_statistics(block)
    except REFUSALS:
        refused = True
    with suppress(*REFUSALS):  # each may be whole, and another's
        trajectory.merged_statistics(0, trajectory.last_step)
    try:
        for value in trajectory.curvature.values():
            assert all(isinstance(tensor, torch.Tensor) for tensor in value.values())
    except REFUSALS:
        refused = True
    if attribute and not refused:
        # Whole, but perhaps of another model or with numbers beyond all measure.
        with suppress(TrajectoryError, NonFiniteError):
            assert _attribute(folder, TracIn()).values.shape == (3, 22)
    return not refused


def require_valid(trajectory: Trajectory) -> None:
    """What :class:`tda_lightning.records.trajectory.Steps` promises."""
    steps, facts = trajectory.steps, trajectory.facts
    count, groups = trajectory.last_step, 1 + max(f.group for f in facts.parameters.values())
    assert {t.shape for t in (steps.epoch, steps.loss, steps.gradient_norm)} == {(count,)}
    assert steps.learning_rate.dtype == steps.loss.dtype == torch.float64
    assert steps.learning_rate.shape[0] == count and steps.learning_rate.shape[1] >= groups
    for values in steps.hyperparameters.values():
        assert values.shape == steps.learning_rate.shape
        assert bool(values.isfinite().all())
    assert bool(steps.learning_rate.isfinite().all())
    assert bool((steps.accumulation >= 1).all()) and bool((steps.epoch >= 0).all())
    for offsets in (steps.batch_offsets, steps.example_offsets):
        assert offsets.dtype == torch.int64
        assert offsets[0] == 0 and bool((offsets.diff() >= 0).all())
    for row in range(count):
        for batch in steps.batches(row):
            assert bool((batch >= 0).all())
            assert facts.num_examples is None or bool((batch < facts.num_examples).all())
    assert trajectory.batch_size is None or trajectory.batch_size >= 0


def require_restorable(states: Mapping[str, torch.Tensor]) -> None:
    """They can be restored, and a lot be drawn from them."""
    with unchanged_randomness():
        restore_states(states)
        assert current_states().keys() >= {"torch", "python"}
        for count in (1, 2000):
            assert bool(torch.randn(count).isfinite().all())
            assert np.isfinite(np.random.randn(count)).all()  # noqa: NPY002
            # Two words each: 700 draws renew all 624 words of the state twice.
            assert all(math.isfinite(random.gauss(0, 1)) for _ in range(min(count, 700)))


def require_statistics(block: BlockStatistics) -> None:
    """What :class:`tda_lightning.records.trajectory.BlockStatistics` promises."""
    groups, rows, columns = block.shape
    for side, width in ((block.left, rows), (block.right, columns)):
        assert side.shape[:2] == (groups, width) and side.dim() in (2, 3)
    assert block.count.shape == (groups,) and block.trace.shape == block.examples.shape == (1,)
    assert block.parameters and all(isinstance(name, str) for name in block.parameters)
    for kind in block.SUMS:
        assert bool(getattr(block, kind).isfinite().all())


def inspect_folder(folder: Path, show: bool) -> bool:
    try:
        found = describe(folder)
    except REFUSALS:
        return False
    with io.TextIOWrapper(io.BytesIO(), encoding="utf-8") as screen:
        if show:
            Console(width=120, file=screen).print(description_table(found))
    return not found.problems


def read_scores(path: Path, report: bool = False) -> bool:
    accepted = False
    for options in ({}, {"mapped": True}, {"queries": slice(1, 3)}):
        try:
            scores = Scores.load(path, **options)
        except (TrajectoryFormatError, FileNotFoundError, PermissionError):
            continue
        accepted = True
        assert scores.values.dim() == 2 and scores.values.dtype in (torch.float32, torch.float64)
        scored = scores.values
        if scores.candidates is not None:
            scored = scored.gather(1, scores.candidates)
        assert bool(scored.isfinite().all())
        if scores.by_segment is not None:
            assert scores.by_segment.shape[1:] == scores.values.shape
            assert scores.by_segment.dtype == scores.values.dtype
            scores.by_segment.sum()
        if scores.self_influence is not None:
            assert scores.self_influence.shape == (scores.num_train,)
        if scores.by_token is not None:
            assert scores.by_token.shape[:2] == scores.values.shape
            assert scores.by_token.dtype == scores.values.dtype
            assert bool(scores.by_token.isfinite().all())
        for query in range(scores.num_queries if scores.num_train else 0):
            scores.proponents(query, 1)
        if not report or options:
            continue
        with tempfile.TemporaryDirectory() as elsewhere:
            write_report(scores, Path(elsewhere) / "page.html", k=2)
    return accepted


def tell(outcomes: list[Outcome]) -> str:
    """Cases by what was done to them, and what became of them."""
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        counted[outcome.case.kind]["failed" if outcome.failed else outcome.verdict] += 1
    lines = [f"{'mutation':20} cases refused accepted failed"]
    for kind, verdicts in counted.items():
        numbers = [verdicts[name] for name in ("refused", "accepted", "failed")]
        lines.append(f"{kind:20} {sum(numbers):5} {numbers[0]:7} {numbers[1]:8} {numbers[2]:6}")
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    lines.append(
        f"{len(outcomes)} cases in {sum(o.seconds for o in outcomes):.1f} s; the slowest, "
        f"{slowest.case.name}, took {slowest.seconds:.2f} s"
    )
    return "\n".join(lines)


def _quick() -> str | None:
    """A file system in memory, where there is one: removing folders is slow on others."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@pytest.mark.parametrize(
    "part", [*range(QUICK), *(pytest.param(n, marks=pytest.mark.slow) for n in range(QUICK, PARTS))]
)
def test_damaged_files_give_our_error_or_valid_data(part: int, bases: dict[str, Path]) -> None:
    chosen = cases(CASES, bases)[part * CASES // PARTS : (part + 1) * CASES // PARTS]
    with tempfile.TemporaryDirectory(dir=_quick()) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chmod(folder, 0o755)
        outcomes = run_cases(chosen, bases, read, Path(folder) / "work")
    print(f"\n{tell(outcomes)}")
    failures = [f"{o.case.name}: {o.verdict}" for o in outcomes if o.failed]
    assert not failures, f"{len(failures)} failed:\n" + "\n".join(failures[:200])
    # The mutations bite, and the untouched parts are still read.
    assert sum(outcome.verdict == "refused" for outcome in outcomes) > len(chosen) / 3
    assert sum(outcome.verdict == "accepted" for outcome in outcomes) > len(chosen) / 20


@pytest.mark.parametrize("rename", [False, True])
def test_a_buffer_that_does_not_fit_the_module(
    rename: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bases["adamw"], tmp_path / "copy"))
    last = open_trajectory(copy).last_step
    with h5py.File(copy / "checkpoints" / f"{last:08d}.h5", "r+") as file:
        buffers, name = file["buffers"], "net.1.running_mean"
        values, attributes = buffers[name][()], dict(buffers[name].attrs)
        del buffers[name]
        new = "elsewhere" if rename else name
        buffers.create_dataset(new, data=values if rename else values[:1])
        buffers[new].attrs.update(attributes)
    with pytest.raises(
        TrajectoryMismatchError, match=r"expected (elsewhere|net\.1\.running_mean) of"
    ):
        _attribute(copy, TracIn())


def _raises(case: Case, folder: Path, victim: Path) -> bool:
    raise KeyError("not ours")


def _writes(case: Case, folder: Path, victim: Path) -> bool:
    (folder.parent / "x").write_bytes(b"")
    return True


def _hangs(case: Case, folder: Path, victim: Path) -> bool:
    while True:
        pass


def _crashes(case: Case, folder: Path, victim: Path) -> bool:
    os.abort()


def _hoards(case: Case, folder: Path, victim: Path) -> bool:
    return bool(bytearray(1 << 32))


@pytest.mark.parametrize(
    ("bad", "verdict"),
    [
        (_raises, "KeyError: \"'not ours'\""),
        (_writes, "files changed: ["),
        (_hangs, "hangs: no answer"),
        (_crashes, "the process died"),
        (_hoards, "MemoryError"),
    ],
)
def test_a_failing_reader_is_noticed(
    bad: Any, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bad is _hangs:  # the others are to be noticed at once, on a busy machine too
        monkeypatch.setattr(fuzzing, "SECONDS", 0.5)
    base = tmp_path / "base"
    base.mkdir()
    (base / "a.h5").write_bytes(b"content")
    untouched = Case(0, "none", "base", lambda generator, victim, place: None)
    (outcome,) = run_cases([untouched], {"base": base}, bad, tmp_path / "work")
    assert outcome.failed
    assert outcome.verdict.startswith(verdict)
