"""What stands in for the trainer while a recorded module's steps run outside of training.

A ``training_step`` may read the epoch, the step, the rates, the logger. Each must be what the
recorded run had at the moment that is asked about, or an error: a wrong epoch would be a wrong loss
without a word.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_HELD = ("_trainer", "_fabric")
_METHODS = ("optimizers", "lr_schedulers")


@dataclass(frozen=True)
class Moment:
    """A moment of a recorded run: when a batch went through ``training_step``.

    Attributes:
        epoch: ``current_epoch``.
        step: ``global_step``, the steps taken before it.
        batch: ``batch_idx``, the batch's number in its epoch.
        batches: of an epoch; None where it is not known.
        rates: learning rates of the parameter groups.
        settings: of the run.
        optimizer: makes the optimizer with the settings of that moment.
    """

    epoch: int
    step: int
    batch: int
    batches: int | None
    rates: Sequence[float]
    settings: Mapping[str, Any]
    optimizer: Callable[[], torch.optim.Optimizer]


@dataclass
class TrainerStandIn:
    """In the place of ``module.trainer``: what is known of the run at a moment, and an error for
    everything else."""

    module: nn.Module
    moment: Moment | None = None
    source: Any = None  # the training set as it is read; see runtime/loading.py
    unknown: list[str] = field(default_factory=list)  # what steps see otherwise than in training
    shown: dict[str, Any] = field(default_factory=dict)  # what hooks were last called for
    # Attributes that hooks have set meanwhile: whether the module had them, and what they were.
    kept: dict[str, tuple[bool, Any]] = field(default_factory=dict)
    _optimizer: tuple[Moment, torch.optim.Optimizer] | None = field(default=None, repr=False)

    # Constant in training.
    training = True
    validating = testing = predicting = sanity_checking = evaluating = False
    fast_dev_run = should_stop = interrupted = False
    is_global_zero = True
    global_rank = local_rank = node_rank = 0
    progress_bar_callback = None

    def __deepcopy__(self, memo: object) -> TrainerStandIn:
        return self

    # What cannot be given is a RuntimeError where a property of the module may stand before it:
    # torch replaces an AttributeError behind a property by one of its own.

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if (known := _OF_MOMENT.get(name)) is not None:
            if self.moment is None:
                raise RuntimeError(
                    f"training_step reads trainer.{name} (or what follows from it), and here it is "
                    "not known at which moment of which run. Pass the trajectory, or give a task "
                    "that does without."
                )
            return known(self, self.moment)
        raise AttributeError(
            f"training_step reads trainer.{name}, which is not known outside of training. Give a "
            "task with the loss of each example, or let the step do without it."
        )

    @property
    def input_dtype(self) -> torch.dtype | None:
        """What Lightning converts the numbers of a batch to, by the precision of the run; None:
        nothing, or the module is here in another precision than there."""
        kinds = {"64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}
        precision = None if self.moment is None else self.moment.settings.get("precision")
        wanted = kinds.get(str(precision))
        return wanted if next(self.module.parameters()).dtype == wanted else None

    @property
    def state(self) -> _State:
        """As in ``Trainer.fit``."""
        return _State(self.module)

    @property
    def strategy(self) -> _Strategy:
        """One process, where the run had one."""
        return _Strategy(self)

    @property
    def lightning_module(self) -> nn.Module:
        """The module."""
        return self.module

    model = lightning_module

    @property
    def datamodule(self) -> Any:
        """The data module that was passed; None where the run had none."""
        given = getattr(self.source, "data_module", None)
        settings: Mapping[str, Any] = {} if self.moment is None else self.moment.settings
        recorded = settings.get("data_module", "data module, as far as is known")
        if given is None and recorded is not None:
            raise RuntimeError(
                f"training_step reads trainer.datamodule, and the run had a {recorded}: pass the "
                "data module as train, attribute(train=datamodule, query=...)."
            )
        return given

    @property
    def train_dataloader(self) -> Any:
        """The training loader that was passed."""
        loader = getattr(self.source, "loader", None)
        return _LoaderStandIn(self) if loader is None else loader

    @property
    def profiler(self) -> _Nothing:
        """Measures nothing."""
        return _Nothing()

    def print(self, *args: object, **kwargs: object) -> None:
        """Print nothing."""

    def made_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the moment; its step changes nothing that is kept."""
        optimizer: torch.optim.Optimizer = self.optimizers[0]
        return optimizer

    def schedulers(self) -> Any:
        """What ``lr_schedulers()`` returns."""
        if self.moment is None:
            return self.optimizers  # raises the error
        count = len(self.moment.settings.get("schedulers") or ())
        each = [_Schedule(self) for _ in range(count)]
        return None if not each else each[0] if count == 1 else each


def _setting(name: str, default: object = None) -> Callable[[TrainerStandIn, Moment], Any]:
    def read(trainer: TrainerStandIn, moment: Moment) -> Any:
        if default is None and name not in moment.settings:
            raise RuntimeError(
                f"training_step reads trainer.{name}, which this run's recording does not hold. "
                "Record it again with this version, or give a task."
            )
        return moment.settings.get(name, default)

    return read


def _batches(trainer: TrainerStandIn, moment: Moment) -> float:
    if moment.batches is None:
        raise RuntimeError(
            "training_step reads trainer.num_training_batches, which this run's recording does "
            "not hold. Record it again with this version, or give a task."
        )
    return moment.batches


def _estimated_steps(trainer: TrainerStandIn, moment: Moment) -> float:
    # Lightning's formula.
    epochs, steps = trainer.max_epochs, trainer.max_steps
    if epochs == -1:
        return math.inf if steps == -1 else int(steps)
    each = math.ceil(_batches(trainer, moment) / trainer.accumulate_grad_batches)
    most = each * max(epochs, 1)
    return most if steps == -1 else min(most, int(steps))


def _loggers(trainer: TrainerStandIn, moment: Moment) -> list[_Nothing]:
    return [_Nothing() for _ in moment.settings.get("loggers", ["unknown"])]


def _logger(trainer: TrainerStandIn, moment: Moment) -> _Nothing | None:
    loggers = _loggers(trainer, moment)
    return loggers[0] if loggers else None


def _optimizers(trainer: TrainerStandIn, moment: Moment) -> list[torch.optim.Optimizer]:
    if trainer._optimizer is None or trainer._optimizer[0] is not moment:
        trainer._optimizer = (moment, moment.optimizer())
    return [trainer._optimizer[1]]


_OF_MOMENT: dict[str, Callable[[TrainerStandIn, Moment], Any]] = {
    "current_epoch": lambda trainer, moment: moment.epoch,
    "global_step": lambda trainer, moment: moment.step,
    "num_training_batches": _batches,
    "is_last_batch": lambda trainer, moment: moment.batch + 1 == _batches(trainer, moment),
    "estimated_stepping_batches": _estimated_steps,
    "max_epochs": _setting("max_epochs"),
    "max_steps": _setting("max_steps", -1),
    "accumulate_grad_batches": _setting("accumulate_grad_batches", 1),
    "gradient_clip_val": lambda trainer, moment: moment.settings.get("gradient_clip_val"),
    "gradient_clip_algorithm": _setting("gradient_clip_algorithm", "norm"),
    "precision": _setting("precision", "32-true"),
    "world_size": _setting("world_size", 1),
    "num_devices": _setting("world_size", 1),
    "log_every_n_steps": _setting("log_every_n_steps", 50),
    "logger": _logger,
    "loggers": _loggers,
    "optimizers": _optimizers,
    "lr_scheduler_configs": lambda trainer, moment: [
        _Config(schedule) for schedule in _as_list(trainer.schedulers())
    ],
}


@dataclass
class _Config:
    scheduler: _Schedule
    name: None = None


def _as_list(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [] if found is None else [found]


class _State:
    """``trainer.state`` in ``fit``, in Lightning's own words where Lightning is there."""

    def __init__(self, module: nn.Module) -> None:
        origins = {kind.__module__.partition(".")[0] for kind in type(module).__mro__}
        package = "pytorch_lightning" if "pytorch_lightning" in origins else "lightning.pytorch"
        words: Any = sys.modules.get(f"{package}.trainer.states")
        self.fn = getattr(words, "TrainerFn", _Words).FITTING
        self.stage = getattr(words, "RunningStage", _Words).TRAINING
        self.status = getattr(words, "TrainerStatus", _Words).RUNNING
        self.finished = self.stopped = False


class _Words:
    FITTING, TRAINING, RUNNING = "fit", "train", "running"


class _LoaderStandIn:
    """The training loader, where only its data set is known."""

    def __init__(self, trainer: TrainerStandIn) -> None:
        self._trainer = trainer

    def __len__(self) -> int:
        return int(self._trainer.num_training_batches)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" and self._trainer.source is not None:
            return self._trainer.source.dataset
        raise AttributeError(
            f"training_step reads {name} of trainer.train_dataloader, and a data set was given: "
            "pass the DataLoader or the data module as train."
        )


class _Schedule:
    """A learning-rate scheduler that only says the rates."""

    def __init__(self, trainer: TrainerStandIn) -> None:
        assert trainer.moment is not None
        self._trainer = trainer
        self._last_lr = list(trainer.moment.rates)

    def get_last_lr(self) -> list[float]:
        """The rates of the groups."""
        return list(self._last_lr)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that it schedules."""
        return self._trainer.made_optimizer()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"training_step reads {name} of a learning-rate scheduler, which is not known outside "
            "of training: only get_last_lr() is. Give a task, or let the step do without it."
        )


class _Strategy:
    """What a step may ask of the strategy in one process."""

    def __init__(self, trainer: TrainerStandIn) -> None:
        self._trainer = trainer
        self.root_device = next(trainer.module.parameters()).device
        self.barrier = self.all_gather = self.reduce = self.broadcast = self._alone

    def _alone(self, value: Any = None, *args: object, **kwargs: object) -> Any:
        if self._trainer.world_size != 1:
            raise RuntimeError(
                f"training_step gathers from the {self._trainer.world_size} processes of its "
                "training, which are not there: its loss joins examples of several processes. "
                "Give a task with the loss of each example."
            )
        return value

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        size: int = self._trainer.world_size
        return size

    @property
    def _lightning_optimizers(self) -> list[torch.optim.Optimizer]:
        found: list[torch.optim.Optimizer] = self._trainer.optimizers
        return found

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"training_step reads trainer.strategy.{name}, which is not known outside of training. "
            "Give a task, or let the step do without it."
        )


class _Nothing:
    """A logger or profiler that takes everything and does nothing."""

    def __getattr__(self, name: str) -> _Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: object, **kwargs: object) -> _Nothing:
        return self

    def __getitem__(self, key: object) -> _Nothing:
        return self

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __iter__(self) -> Iterator[_Nothing]:
        return iter(())

    def __str__(self) -> str:
        raise RuntimeError(
            "training_step reads a text of its logger (a folder or a name), which is not known "
            "outside of training. Give a task, or let the step do without it."
        )

    __fspath__ = __repr__ = __str__


@contextmanager
def stand_in_for_trainer(module: nn.Module) -> Iterator[TrainerStandIn | None]:
    """Give the module and its submodules a :class:`TrainerStandIn` for their trainer; at the end
    they have the one of before. None for a module that is none of Lightning's, and within another
    such block its own stand-in."""
    present = stand_in_of(module)
    parts = [part for part in module.modules() if "_trainer" in vars(part)]
    if present is not None or not parts:
        yield present
        return
    kept = [
        {name: vars(part)[name] for name in (*_HELD, *_METHODS) if name in vars(part)}
        for part in parts
    ]
    stand_in = TrainerStandIn(module)
    for part in parts:
        vars(part).update(_trainer=stand_in, _fabric=None)
        vars(part).update(
            optimizers=lambda use_pl_optimizer=True: stand_in.made_optimizer(),
            lr_schedulers=stand_in.schedulers,
        )
    try:
        yield stand_in
    finally:
        for name, (had, value) in stand_in.kept.items():
            vars(module).pop(name, None)
            vars(module).update({name: value} if had else {})
        for part, own in zip(parts, kept, strict=True):
            for name in (*_HELD, *_METHODS):
                vars(part).pop(name, None)
            vars(part).update(own)


def stand_in_of(module: nn.Module) -> TrainerStandIn | None:
    """The stand-in in place, if there is one."""
    held = vars(module).get("_trainer")
    return held if isinstance(held, TrainerStandIn) else None
