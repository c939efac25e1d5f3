"""The plain record of a training run that every estimator reads.

Nothing here knows files or trainers: the store builds a :class:`Trajectory` from a folder, and a
test builds one from dictionaries.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from os import PathLike
from typing import TYPE_CHECKING, Any

from tda_lightning.records.curvature_statistics import BlockStatistics, Statistics
from tda_lightning.records.deferred import Deferred
from tda_lightning.records.display import fact_lines, html_facts, listed
from tda_lightning.records.errors import TrajectoryFormatError, UnsupportedTrainingError
from tda_lightning.records.files import StoreFunction

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

# The setting that marks a run put together from checkpoints (``Trajectory.from_checkpoints``).
FROM_CHECKPOINTS = "from_checkpoints"


@dataclass(frozen=True)
class ParameterFact:
    """What is recorded of one trained parameter."""

    shape: tuple[int, ...]
    dtype: str
    group: int  # position of its parameter group in the optimizer


@dataclass(frozen=True)
class StageFact:
    """A stretch of the run that trains one set of parameters.

    Attributes:
        start: number of rows of the steps table before it.
        parameters: names of the parameters that the optimizer holds and trains from there on.
        new_optimizer: whether it begins with another fit and a new optimizer, whose states start
            afresh. Otherwise the states carry over, including those of parameters that were
            frozen in between.
    """

    start: int
    parameters: tuple[str, ...]
    new_optimizer: bool = False


@dataclass(frozen=True)
class Facts:
    """What is fixed over the whole run.

    Attributes:
        parameters: every parameter that the optimizer holds and trains in any stage, by name.
        optimizer: its name.
        num_examples: size of the training set; None for an iterable one.
        fingerprint: of the training set; None for an iterable one.
        settings: for display only: trainer settings, scheduler, seed, module class, versions.
        stages: a stage begins where parameters are frozen or unfrozen, and with each further fit.
            By default one stage trains all parameters.
        base: digests of the frozen weights that no checkpoint holds, by name; they are those of
            the module that was trained.
    """

    parameters: Mapping[str, ParameterFact]
    optimizer: str
    num_examples: int | None
    fingerprint: Mapping[str, str] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[StageFact, ...] = ()
    base: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.stages:
            object.__setattr__(self, "stages", (StageFact(0, tuple(self.parameters)),))


def facts_up_to(facts: Facts, num_steps: int) -> Facts:
    """The facts without stages that have no recorded step, and without what only they would train.

    A stage is recorded at its start, and the run may have been killed right after.
    """
    stages = tuple(stage for stage in facts.stages if stage.start < max(num_steps, 1))
    if stages == facts.stages:
        return facts
    trained = {name for stage in stages for name in stage.parameters}
    parameters = {name: fact for name, fact in facts.parameters.items() if name in trained}
    return replace(facts, parameters=parameters, stages=stages)


@dataclass(frozen=True, repr=False)
class Steps:
    """The optimizer steps in order, one row each: row t is step t + 1.

    Attributes:
        epoch: int64 [steps].
        learning_rate: the applied rates, float64 [steps, groups].
        hyperparameters: by name, float64 [steps, groups]; the optimizer's rule lists them
            (:mod:`tda_lightning.optimizers`).
        loss: mean training loss of the step's batches, float64 [steps].
        gradient_norm: before clipping, float64 [steps].
        batch_offsets: int64 [steps + 1]; row t holds the batches batch_offsets[t] to [t + 1],
            several when gradients were accumulated.
        example_offsets: int64 [batches + 1] into ``examples``.
        examples: int64, the training-example indices of every batch in order. Empty when the
            data set was iterable and had none.
        accumulation: int64 [steps], the number that each batch loss of the step was divided by.
        clipping: norm of the gradient after clipping divided by the norm before it, float64
            [steps]; 1 where nothing was clipped, and everywhere if not given.
        random: states of the random generators (:mod:`tda_lightning.runtime.random_states`) right
            before a batch was fetched, by the batch's position in ``example_offsets``; only for
            batches before which they differ from what the previous batch had left behind. With
            workers, a batch was ready by then, and the loader went on to request a later one.
    """

    epoch: Tensor
    learning_rate: Tensor
    hyperparameters: Mapping[str, Tensor]
    loss: Tensor
    gradient_norm: Tensor
    batch_offsets: Tensor
    example_offsets: Tensor
    examples: Tensor
    accumulation: Tensor
    clipping: Tensor = None  # type: ignore[assignment]
    random: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.clipping is None:
            import torch  # here: `tda inspect` makes no record of tensors

            object.__setattr__(self, "clipping", torch.ones(len(self.epoch), dtype=torch.float64))

    def __len__(self) -> int:
        return len(self.epoch)

    def __repr__(self) -> str:
        uses = len(self.examples)
        return f"Steps({len(self)} steps, {len(self.example_offsets) - 1} batches, {uses} examples)"

    def between(self, start: int, stop: int) -> Steps:
        """Rows ``start`` to ``stop`` as a table of their own, whose offsets count from 0."""
        batches = self.batch_offsets[start : stop + 1]
        first, last = int(batches[0]), int(batches[-1])
        examples = self.example_offsets[first : last + 1]
        return Steps(
            epoch=self.epoch[start:stop],
            learning_rate=self.learning_rate[start:stop],
            hyperparameters={name: v[start:stop] for name, v in self.hyperparameters.items()},
            loss=self.loss[start:stop],
            gradient_norm=self.gradient_norm[start:stop],
            batch_offsets=batches - batches[0],
            example_offsets=examples - examples[0],
            examples=self.examples[int(examples[0]) : int(examples[-1])],
            accumulation=self.accumulation[start:stop],
            clipping=self.clipping[start:stop],
            random={b - first: s for b, s in self.random.items() if first <= b < last},
        )

    def batches(self, row: int) -> list[Tensor]:
        """Example indices of each batch that row ``row`` accumulated, in order."""
        first, last = int(self.batch_offsets[row]), int(self.batch_offsets[row + 1])
        bounds = self.example_offsets[first : last + 1].tolist()
        return [self.examples[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """The state after ``step`` optimizer steps.

    Attributes:
        step: how many.
        parameters: the trained parameters, by name.
        buffers: all other tensors of the module, by name, but for those of ``Facts.base``.
        optimizer: a parameter's state tensors under torch.optim's own names, by parameter; None
            if not recorded.
        random: states of the random generators after the step
            (:mod:`tda_lightning.runtime.random_states`), in a run of several processes those of
            the first; None if not recorded.
    """

    step: int
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Tensor]] | None = None
    random: Mapping[str, Tensor] | None = None

    def __repr__(self) -> str:
        parts = [f"step {self.step}", f"{len(self.parameters)} parameters"]
        parts += [f"{len(self.buffers)} other tensors"]
        parts += [] if self.optimizer is None else ["optimizer state"]
        return f"Checkpoint({', '.join(parts)})"


@dataclass(frozen=True)
class Segment:
    """Steps ``start`` < step <= ``stop``, represented by the checkpoints after its start up to
    and including its end."""

    start: int
    stop: int
    checkpoints: tuple[int, ...]

    @property
    def rows(self) -> slice:
        """Its rows of the steps table."""
        return slice(self.start, self.stop)


@dataclass(frozen=True, eq=False)
class StageCheckpoints(Mapping[int, Checkpoint]):
    """Checkpoints ``start`` to ``stop`` of a run, counted from ``start``, loaded when asked for."""

    run: Mapping[int, Checkpoint]
    start: int
    stop: int
    names: tuple[str, ...]  # of the parameters that the stage trains
    # Those whose states the optimizer had when the stage began; a new one starts afresh.
    goes_on: tuple[str, ...] | None = None

    def __getitem__(self, step: int) -> Checkpoint:
        if not 0 <= step <= self.stop - self.start:
            raise KeyError(step)
        whole = self.run[self.start + step]
        frozen = {n: value for n, value in whole.parameters.items() if n not in self.names}
        states = whole.optimizer
        return Checkpoint(
            step=step,
            parameters={name: whole.parameters[name] for name in self.names},
            buffers={**frozen, **whole.buffers},
            optimizer=None if states is None else Deferred(partial(self._states, states, step)),
            random=whole.random,
        )

    def _states(
        self, whole: Mapping[str, Mapping[str, Tensor]], step: int
    ) -> dict[str, Mapping[str, Tensor]]:
        """Of the optimizer, in the stage."""
        known = whole.keys() if step or self.goes_on is None else whole.keys() & set(self.goes_on)
        return {name: whole[name] if name in known else {} for name in self.names}

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(s - self.start for s in self.run if self.start <= s <= self.stop))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True, eq=False)
class StageStatistics(Mapping[tuple[int, int], Statistics]):
    """Statistics of the intervals between ``start`` and ``stop``, counted from ``start``.

    Empty if no step of the stage was sampled, as in one shorter than ``curvature_every``.
    """

    run: Mapping[tuple[int, int], Statistics]
    start: int
    stop: int

    def __getitem__(self, interval: tuple[int, int]) -> Statistics:
        first, last = interval
        if not 0 <= first < last <= self.stop - self.start:
            raise KeyError(interval)
        return self.run[self.start + first, self.start + last]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._intervals)

    @cached_property
    def _intervals(self) -> list[tuple[int, int]]:
        inside = [at for at in self.run if self.start <= at[0] and at[1] <= self.stop]
        sampled = any(float(b.examples) for at in inside for b in self.run[at].values())
        return [(a - self.start, b - self.start) for a, b in inside] if sampled else []

    def __len__(self) -> int:
        return len(self._intervals)


@dataclass(frozen=True, repr=False)
class Trajectory:
    """A recorded run.

    Attributes:
        facts: what is fixed over the run.
        steps: the optimizer steps.
        checkpoints: by step, loaded one at a time; step 0 holds the initial weights.
        curvature: cache of fitted curvature, by a digest of everything that determines it.
        unfinished: likewise, the progress of interrupted attributions.
        features: likewise, features of the training examples at a layer.
        path: the folder; None for a run in memory.
        statistics: curvature gathered during training, by interval (start, stop) of the steps
            start < step <= stop.
        steps_before: in a stage of a run, how often its optimizer had stepped each parameter
            before row 0. The states of these parameters carry over; all others start afresh.
        data_weights: of a what-if or weighted run, what the loss of each training example was
            multiplied by, float64 [train]; None: 1.
        what_if: of a run in memory, its what-if runs by a digest of all that determines them; in a
            folder they have folders of their own.
    """

    facts: Facts
    steps: Steps
    checkpoints: Mapping[int, Checkpoint]
    curvature: MutableMapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    unfinished: MutableMapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    features: MutableMapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    path: str | None = None
    statistics: Mapping[tuple[int, int], Statistics] = field(default_factory=dict)
    steps_before: Mapping[str, int] = field(default_factory=dict)
    data_weights: Tensor | None = None
    what_if: MutableMapping[str, Trajectory] = field(default_factory=dict)

    def _facts(self) -> dict[str, object]:
        facts, settings = self.facts, self.facts.settings
        size = sum(math.prod(fact.shape) for fact in facts.parameters.values())
        shown: dict[str, object] = {
            "model": settings.get("module", "not known"),
            "optimizer": facts.optimizer,
            "steps": len(self.steps),
            "checkpoints": listed([f"{step}" for step in sorted(self.checkpoints)]),
            "trained parameters": f"{size} in {len(facts.parameters)} tensors",
            "training examples": facts.num_examples or "not known",
        }
        if len(facts.stages) > 1:
            shown["stages begin after steps"] = listed([stage.start for stage in facts.stages])
        if len(self.statistics):
            shown["curvature statistics"] = f"of {len(self.statistics)} intervals"
        if self.data_weights is not None:
            shown["what-if run"] = f"mean weight {float(self.data_weights.mean()):.3g}"
        return shown

    def __repr__(self) -> str:
        return fact_lines(f"Trajectory {self.path or 'in memory'}", self._facts())

    def _repr_html_(self) -> str:
        return html_facts(f"Trajectory {self.path or 'in memory'}", self._facts())

    def merged_statistics(self, start: int, stop: int) -> Statistics:
        """Sums of the statistics of every interval that ends in ``start`` < step <= ``stop``.

        Empty where none were recorded.
        """
        merged: dict[str, BlockStatistics] = {}
        for interval in sorted(self.statistics):
            if start < interval[1] <= stop:
                for name, block in self.statistics[interval].items():
                    merged[name] = merged[name] + block if name in merged else block
        return merged

    @staticmethod
    def load(path: str | PathLike[str]) -> Trajectory:
        """The trajectory recorded in folder ``path``.

        Raises:
            TrajectoryNotFoundError: the folder holds none.
            TrajectoryFormatError: a file of it is damaged or of another format version.
        """
        return _open_trajectory(path)

    @staticmethod
    def from_checkpoints(
        checkpoints: Sequence[str | PathLike[str] | Mapping[str, Tensor]],
        learning_rates: float | Sequence[float] | None = None,
        optimizer: Optimizer | str | None = None,
        steps: Sequence[int] | None = None,
    ) -> Trajectory:
        """A run of which only checkpoints were kept, for people who did not record it.

        Influence functions, FastIF and TRAK ask the last checkpoint; TracIn and
        ``Source(order="average")`` ask all of them, and need ``learning_rates``, Source also
        ``optimizer``. Which examples were in which batch is not known: every example counts as used
        equally often. Whatever follows the run itself (exact unrolling, the recorded order,
        ``keep`` below 1, retraining) is refused. Nothing is unpickled: files are loaded with
        ``weights_only=True``.

        Args:
            checkpoints: in order of training: state dicts of the module, files of them
                (``torch.save(module.state_dict(), ...)``), or Lightning's ``.ckpt`` files. They
                need not begin with the initial weights.
            learning_rates: the rate in the steps up to each checkpoint since the one before it
                (or since the start), or one for all. None: the rate that Lightning's files have;
                without any, estimators that need it refuse the run.
            optimizer: made as in training, for its settings (momentum, weight decay), which all its
                parameter groups must share; which parameters it holds does not matter. Or its name
                (``"SGD"``), where Lightning's files have the settings. None: not known.
            steps: the number of optimizer steps before each checkpoint, increasing; 0 for the
                initial weights. None: as Lightning's files have it. A single checkpoint needs none.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the checkpoints do not belong to one run, or something is missing that
                cannot be guessed.

        References:
            | Estimating Training Data Influence by Tracing Gradient Descent (Pruthi et al., 2020),
              section 3.2, TracInCP
            | https://arxiv.org/abs/2002.08484
        """
        return _from_checkpoints(checkpoints, learning_rates, optimizer, steps)

    def until(self, step: int, saved: Checkpoint | None = None) -> Trajectory:
        """The run up to a checkpoint: what it would be had training ended there.

        Args:
            step: of a recorded checkpoint, from 1; or of ``saved``.
            saved: the state after ``step`` steps from elsewhere, for a step that has no checkpoint.

        Raises:
            ValueError: there is no checkpoint at that step.
        """
        recorded = sorted(self.checkpoints)
        known = step in recorded or saved is not None
        if not known or not 1 <= step <= len(self.steps):
            raise ValueError(
                f"There is no recorded checkpoint at step {step!r}. Recorded checkpoints are at "
                f"steps {listed([one for one in recorded if one])}. Ask for one of them, or record "
                "more often (num_checkpoints, every_n_steps, every_n_epochs); a file that "
                "Lightning saved in between can be given as ckpt=FILE."
            )
        facts = facts_up_to(self.facts, step)
        held: Mapping[int, Checkpoint] = self.checkpoints
        if saved is not None and step not in recorded:
            held = ChainMap({step: saved}, self.checkpoints)  # type: ignore[arg-type]
        return replace(
            self,
            facts=facts,
            steps=self.steps.between(0, step),
            checkpoints=StageCheckpoints(held, 0, step, tuple(facts.parameters)),
            statistics=StageStatistics(self.statistics, 0, step),
        )

    @property
    def num_steps(self) -> int:
        """Recorded optimizer steps."""
        return len(self.steps)

    @property
    def last_step(self) -> int:
        """Step of the last checkpoint: the model whose behaviour is explained."""
        return max(self.checkpoints)

    @property
    def batch_size(self) -> int | None:
        """Examples of the largest batch that one loss was taken over; None when unknown."""
        if len(self.steps.examples):
            return int(self.steps.example_offsets.diff().max())
        recorded = self.facts.settings.get("batch_size")
        return recorded if isinstance(recorded, int) else None

    def segments(self, cuts: int | Sequence[int]) -> tuple[Segment, ...]:
        """Cut the run into segments: a number of them, or the explicit steps between them.

        A number L cuts at floor(l T / L).

        Raises:
            ValueError: a segment would hold no checkpoint, or a cut lies outside the run.
        """
        total = self.last_step
        if isinstance(cuts, int):
            if cuts < 1:
                raise ValueError(f"num_segments must be at least 1, got {cuts}.")
            bounds = [part * total // cuts for part in range(cuts + 1)]
        else:
            bounds = [0, *cuts, total]
            if any(a >= b for a, b in zip(bounds, bounds[1:], strict=False)):
                raise ValueError(
                    f"Segment cuts must be increasing steps strictly between 0 and {total}, "
                    f"got {list(cuts)}."
                )
        recorded = sorted(step for step in self.checkpoints if step > 0)
        segments = []
        for number, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False), start=1):
            inside = tuple(step for step in recorded if start < step <= stop)
            if not inside:
                raise ValueError(
                    f"Segment {number} (steps {start} to {stop}) holds no checkpoint: asked for "
                    f"{len(bounds) - 1} segments, recorded checkpoints are at steps {recorded}. "
                    "Lower num_segments or record more checkpoints (num_checkpoints)."
                )
            segments.append(Segment(start, stop, inside))
        return tuple(segments)

    def stages(self) -> tuple[Trajectory, ...]:
        """The run cut where its set of trained parameters changed or another fit began.

        Each part is a run of its own: it has the rows of its own steps, counts its checkpoints
        from its start (0 is the state there) and lists as parameters only what it trains; what is
        frozen is among the buffers. ``(self,)`` where there is only one stage.

        Raises:
            TrajectoryFormatError: a checkpoint where a stage begins is missing.
        """
        facts = self.facts
        if len(facts.stages) == 1:
            return (self,)
        stops = [*(stage.start for stage in facts.stages[1:]), self.last_step]
        for step in stops:
            if step not in self.checkpoints:
                raise TrajectoryFormatError(
                    f"The checkpoint at step {step} is missing: expected one where each stage "
                    f"begins, got checkpoints at {sorted(self.checkpoints)}. Restore the file, or "
                    "record again."
                )
        parts: list[Trajectory] = []
        steps_before: dict[str, int] = {}
        for stage, stop in zip(facts.stages, stops, strict=True):
            if stage.new_optimizer:
                steps_before = {}
            names = tuple(name for name in facts.parameters if name in stage.parameters)
            parameters = {name: facts.parameters[name] for name in names}
            part = replace(
                self,
                facts=replace(facts, parameters=parameters, stages=(StageFact(0, names),)),
                steps=self.steps.between(stage.start, stop),
                checkpoints=StageCheckpoints(
                    self.checkpoints,
                    stage.start,
                    stop,
                    names,
                    tuple(steps_before) if parts else None,
                ),
                statistics=StageStatistics(self.statistics, stage.start, stop),
                steps_before=dict(steps_before),
            )
            parts.append(part)
            for name in names:
                steps_before[name] = steps_before.get(name, 0) + stop - stage.start
        return tuple(parts)

    def clipping_factors(self, rows: slice) -> Tensor:
        """What clipping multiplied each step's gradient by, float64 [steps, 1].

        The clipped gradient is k g; the dependence of k on g is neglected. Clipping by value also
        changes the gradient's direction, which no factor describes; the ratio of the norms stands
        in for it.
        """
        return self.steps.clipping[rows, None]


def require_one_stage(trajectory: Trajectory) -> None:
    """Refuse a run with several stages, each of which is a run of its own.

    Raises:
        UnsupportedTrainingError: there are several.
    """
    stages = trajectory.facts.stages
    if len(stages) > 1:
        raise UnsupportedTrainingError(
            f"The run has {len(stages)} stages (its trained parameters change after steps "
            f"{[stage.start for stage in stages[1:]]}), expected one. Attribute its parts, "
            "Trajectory.load(path).stages(), one by one."
        )


_open_trajectory: StoreFunction[[str | PathLike[str]], Trajectory]
_open_trajectory = StoreFunction("open_trajectory")
_from_checkpoints: StoreFunction[
    [
        Sequence[str | PathLike[str] | Mapping[str, Tensor]],
        float | Sequence[float] | None,
        Optimizer | str | None,
        Sequence[int] | None,
    ],
    Trajectory,
]
_from_checkpoints = StoreFunction("from_checkpoints", "recording.from_checkpoints")
