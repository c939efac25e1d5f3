r"""Training with weights on the examples, whatever the module: by the loss or by the sampler.

The loss of a batch becomes

.. math::
    L_B = \frac1{|B|} \sum_{n \in B} w_n\, l_n(\theta),

read off the ``training_step`` as it is, by what finds the losses of single examples everywhere in
this library (``tasks/training_step.py``). The denominator stays that of the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler, WeightedRandomSampler

from tda_lightning.recording.example_indices import ExampleIndices
from tda_lightning.recording.trainer_hooks import ReplacedMethod
from tda_lightning.records.errors import UnseenBatchError, UnsupportedTrainingError
from tda_lightning.reweighting.projection import check_weights
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.module_state import borrowed
from tda_lightning.runtime.random_states import Snapshot, unchanged_randomness
from tda_lightning.tasks import TrainingStepTask, seeded_examples

BY = ("loss", "sampler")


class _Share(Sampler[int]):
    """Examples drawn by weight with replacement, those of one process: all processes draw the same,
    as many as a training set holds, and take turns."""

    def __init__(self, weights: Tensor, seed: int, rank: int, count: int) -> None:
        own = torch.Generator().manual_seed(seed)
        self._drawn = WeightedRandomSampler(
            cast(Any, weights), len(weights), replacement=True, generator=own
        )
        self._rank, self._count = rank, count

    def __len__(self) -> int:
        return len(self._drawn) // self._count

    def __iter__(self) -> Iterator[int]:
        drawn = list(self._drawn)[self._rank :: self._count]
        return iter(drawn[: len(self)])


class WeightedTraining(Callback):
    """Train any LightningModule, unchanged, with a weight on every training example.

    ``by="loss"`` multiplies each example's loss in the batch that it comes in. Logged values are
    those of the ``training_step``, without weights. A ``TrajectoryRecorder`` of the same trainer
    writes the weights down, and replays and attributions of its trajectory know them.

    ``by="sampler"`` draws as many examples per epoch as there are, with replacement, in proportion
    to the weights. It works for any loss, with more noise; the recorder records what was drawn.

    In several processes (DDP) each weights the examples of its own batch, or takes its turn of what
    all draw alike.

    Args:
        weights: [train], at least 0.
        by: ``loss`` or ``sampler``.
        seed: of the sampler.

    Raises:
        ValueError: at once, for an unknown ``by``, weights that are negative, not finite or 0 for
            all; when training starts, for another number than that of the training examples.
        UnsupportedTrainingError: when training starts, with another strategy than DDP in several
            processes, or a loader whose examples are not known or cannot be sampled; in training,
            by ``loss``, where the loss of a batch cannot be taken apart.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> weighted = WeightedTraining(torch.tensor([1.0, 0.0, 2.0]))
        >>> Trainer(callbacks=[weighted]).fit(module, loader)  # doctest: +SKIP
    """

    def __init__(
        self, weights: Tensor, by: Literal["loss", "sampler"] = "loss", seed: int = 0
    ) -> None:
        if by not in BY:
            raise ValueError(f"by must be one of {', '.join(BY)}, got {by!r}.")
        given = torch.as_tensor(weights, dtype=torch.float64)
        self.weights = check_weights(given, given.numel()).cpu()
        self.by, self.seed = by, seed
        self._source: ExampleSource | None = None
        self._task: TrainingStepTask | None = None
        self._preparing = False
        self._detach()

    @property
    def loss_weights(self) -> Tensor | None:
        """The weights on the losses; None where the sampler has them. A recorder asks for them."""
        return self.weights if self.by == "loss" else None

    def _detach(self) -> None:
        self._listening: ExampleIndices | None = None
        self._replaced: ReplacedMethod | None = None
        self._samplers: list[tuple[BatchSampler, Any]] = []
        self._place = 0, 1  # of how many processes
        self._module: LightningModule | None = None
        self._examples: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen to the loaders that are about to be used."""
        if stage != "fit":
            return
        if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
            raise UnsupportedTrainingError(
                "WeightedTraining takes the loss of a batch apart in a process that has the whole "
                f"model, and {type(trainer.strategy).__name__} shares it out. Use strategy='ddp', "
                "or one process."
            )
        self._place = trainer.global_rank, trainer.world_size
        if self.by == "sampler":
            self._replaced = ReplacedMethod(trainer.strategy, "process_dataloader", self._sample)
        else:
            self._listening = ExampleIndices(snapshots=False)
            self._listening.attach(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weight the steps of the module."""
        loader: Any = trainer.train_dataloader
        check_weights(self.weights, len(getattr(loader, "dataset", ())))
        if self._listening is None:
            return
        self._listening.begin(trainer, cast(Any, None))
        data = getattr(trainer, "datamodule", None)
        self._source = ExampleSource.of(loader, 1, "training", data)
        self._task, self._module = None, pl_module
        step = pl_module.training_step

        @functools.wraps(step)  # Lightning looks at its arguments
        def weighted(*args: Any, **kwargs: Any) -> Any:
            if self._preparing:
                return step(*args, **kwargs)
            return self._weighted(step, args, kwargs)

        vars(pl_module)["training_step"] = weighted

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Know which examples the batch is made of, and how its loss is."""
        if self._listening is None:
            return
        self._listening.begin_batch()
        if self._listening.batch is None:
            raise UnsupportedTrainingError(
                "Weights belong to training examples, and which are in a batch is not known: "
                f'{self._listening.absent}. Use WeightedTraining(weights, by="sampler").'
            )
        self._examples = torch.from_numpy(self._listening.batch)
        assert self._source is not None
        self._source.recognise(batch, pl_module, self._examples)
        if self._task is None:
            self._task = TrainingStepTask()
            size = getattr(trainer.train_dataloader, "batch_size", None)
            self._task.training_batch_size = size or len(self._examples)
            self._prepare(batch)

    def _prepare(self, batch: Any) -> None:
        """Find out how the loss of a batch is made of those of its examples."""
        assert self._task is not None and self._module is not None and self._examples is not None
        self._preparing = True
        try:
            with borrowed(self._module), unchanged_randomness(), torch.enable_grad():
                self._module.eval()
                with seeded_examples(0, self._examples):
                    self._task.prepare(self._module, batch)
        finally:
            self._preparing = False
        if self._task.one_by_one:
            raise UnsupportedTrainingError(
                "The loss of a batch cannot be taken apart into those of its examples in one run: "
                f'{" ".join(self._task.notes)} Use WeightedTraining(weights, by="sampler").'
            )

    def _weighted(self, step: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the step returns, with the weighted loss."""
        task, module, examples = self._task, self._module, self._examples
        assert task is not None and module is not None and examples is not None
        batch = args[0] if args else next(iter(kwargs.values()))
        returned: list[Any] = []

        def run() -> Tensor:
            returned.append(step(*args, **kwargs))
            made = returned[-1]
            return made["loss"] if isinstance(made, Mapping) else made  # type: ignore[no-any-return]

        before = Snapshot.take()
        with seeded_examples(0, examples, own_noise=False):
            try:
                total, parts = task.loss_of_step(module, batch, run)
            except UnseenBatchError:  # made otherwise than the batch that the task was prepared on
                self._prepare(batch)
                before.restore()
                total, parts = task.loss_of_step(module, batch, run)
        own = self.weights[examples].to(parts)
        loss = total + ((own - 1) * parts).sum()
        made = returned[-1]
        return {**made, "loss": loss} if isinstance(made, Mapping) else loss

    def _sample(self, process_dataloader: Any, loader: Any) -> Any:
        sampler = getattr(loader, "batch_sampler", None)
        if not isinstance(loader, DataLoader) or not isinstance(sampler, BatchSampler):
            raise UnsupportedTrainingError(
                "WeightedTraining draws the examples of a DataLoader with a batch size, got "
                f"{type(loader).__name__} with {type(sampler).__name__}."
            )
        drawn = _Share(self.weights, self.seed, *self._place)
        if not any(sampler is known for known, _ in self._samplers):
            self._samplers.append((sampler, sampler.sampler))
            sampler.sampler = drawn
        return process_dataloader(loader)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The batch is done."""
        if self._listening is not None:
            self._listening.end_batch(outputs)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave module and loaders as they were."""
        if self._listening is not None:
            self._listening.detach()
        if self._replaced is not None:
            self._replaced.remove()
        for sampler, before in self._samplers:
            sampler.sampler = before
        if self._module is not None:
            vars(self._module).pop("training_step", None)
        self._detach()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Likewise when training fails."""
        self.teardown(trainer, pl_module, "fit")
