"""Curvature statistics from the forward and backward passes that training runs anyway.

At every k-th optimizer step the training step is watched: what each layer was given, and the
standard losses. Labels sampled from the model then take one more backward pass through the graph
that is already there, to the layers' outputs and no further (the empirical Fisher waits for
training's own backward pass). Inputs and output gradients are summed into Kronecker factors.

Lightning has no hook around the training step alone; ``Strategy.training_step`` is the last public
point through which it goes. It is wrapped while a fit lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from tda_lightning.callbacks.processes import summed
from tda_lightning.curvature import check_dense_side, side_forms
from tda_lightning.errors import UnsupportedTrainingError
from tda_lightning.gradients.blocks import Block
from tda_lightning.gradients.composite import Rows, first_examples
from tda_lightning.gradients.forms import Gradient, Outer
from tda_lightning.gradients.observe import Observer, blocks_of, gradients_of
from tda_lightning.tasks.batches import num_examples
from tda_lightning.tasks.noise import example_noise
from tda_lightning.tasks.observed import LossObserver, sampled_output_gradients
from tda_lightning.trajectory import BlockStatistics

FISHERS = ("true", "empirical")
# What one step adds to a covariance: rows (examples x positions), and multiplications. It is one
# step's share of a mean; the pictures of a batch have far more pixels than that needs.
_ROWS = 4096
_WORK = 1 << 30
_FEWEST = 4  # examples, however many rows they have
_NORMS = 8  # examples whose gradients are formed for the trace
_SEED = 0


@dataclass(frozen=True)
class OnlineCurvature:
    """Settings of the statistics gathered in training."""

    every: int
    fisher: str
    device: str | None
    dtype: torch.dtype
    dense_side: int | None

    def facts(self) -> dict[str, Any]:
        """What is recorded of them."""
        return {
            "every": self.every,
            "fisher": f"{self.fisher} (in training)",
            "seed": _SEED,
            "dtype": str(self.dtype).removeprefix("torch."),
            "dense_side": self.dense_side,
        }


def online_curvature(
    curvature: str | None,
    every: int,
    fisher: str,
    device: str | None,
    dtype: str,
    dense_side: int | None,
) -> OnlineCurvature | None:
    """The settings, checked; None for no statistics."""
    for name, value, known in (
        ("curvature", curvature, (None, "online")),
        ("fisher", fisher, FISHERS),
        ("curvature_dtype", dtype, ("float32", "float64")),
    ):
        if value not in known:
            choices = ", ".join(map(repr, known))
            raise ValueError(f"{name} must be one of {choices}, got {value!r}.")
    if curvature is None:
        return None
    check_dense_side(dense_side)
    return OnlineCurvature(every, fisher, device, getattr(torch, dtype), dense_side)


def require_uncompiled(module: nn.Module) -> None:
    """Check that the layers' calls can be watched.

    Raises:
        UnsupportedTrainingError: some of the module is compiled.
    """
    for name, part in module.named_modules():
        if hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None:
            raise UnsupportedTrainingError(
                f"curvature='online' watches the layers' calls, which torch.compile hides in "
                f"{name or 'the module'}. Record with curvature=None and fit curvature afterwards, "
                "or train without torch.compile."
            )


@dataclass
class CurvatureGatherer:
    """Sums the statistics of the steps since the last :meth:`take`.

    Attributes:
        settings: what to gather.
        next_step: the number, from 1, of the optimizer step under way.
        indices: example indices of the batch under way; None when they are not known.
    """

    settings: OnlineCurvature
    next_step: Callable[[], int]
    indices: Callable[[], Any]
    sums: dict[str, BlockStatistics] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._names: dict[int, str] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._blocks: list[Block] = []
        self._checked = False
        self._pending: dict[str, BlockStatistics] = {}  # of the step under way
        self._waiting: tuple[Observer, int] | None = None  # for training's own backward pass
        self._undo: Callable[[], None] | None = None

    def begin(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Gather for these parameters from now on."""
        self._parameters = dict(trained)
        self._names = {id(parameter): name for name, parameter in trained.items()}
        self._blocks, self._checked = [], False
        self.sums, self._pending = {}, {}

    def install(self, trainer: Trainer) -> None:
        """Watch the training steps of ``trainer``."""
        strategy, training_step = trainer.strategy, trainer.strategy.training_step
        self._trainer = trainer

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self._wanted():
                return training_step(*args, **kwargs)
            losses = LossObserver() if self.settings.fisher == "true" else None
            observer = Observer(self._names, listen=losses is None)
            with losses or nullcontext(), observer:
                output = training_step(*args, **kwargs)
            self._observed(output, args[0] if args else kwargs.get("batch"), observer, losses)
            return output

        strategy.training_step = watched  # type: ignore[method-assign]
        self._undo = lambda: vars(strategy).pop("training_step", None)

    def uninstall(self) -> None:
        """Put the strategy back as it was."""
        if self._undo is not None:
            self._undo()
            self._undo = None
        self._waiting = None

    def _wanted(self) -> bool:
        return bool(self._names) and self.next_step() % self.settings.every == 0

    def _observed(
        self, output: Any, batch: Any, observer: Observer, losses: LossObserver | None
    ) -> None:
        total = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(total, Tensor) or not total.requires_grad:
            return  # the module skips this batch
        indices = self.indices()
        size = num_examples(batch) if indices is None else len(indices)
        if losses is None:
            self._waiting = (observer, size)
            return
        device = total.device
        examples = torch.arange(size) if indices is None else torch.as_tensor(indices)
        # Another draw of labels at every step.
        outputs: list[Tensor] = []
        gradients: list[Tensor] = []
        if losses.losses:
            with example_noise(_SEED + self.next_step(), examples.to(device)):
                outputs, gradients = sampled_output_gradients(total, losses.losses, size)
        if not outputs:
            raise UnsupportedTrainingError(
                "training_step calls none of cross_entropy, nll_loss, mse_loss and "
                "binary_cross_entropy_with_logits of torch.nn.functional, so labels cannot be "
                "sampled for the true Fisher. Record with fisher='empirical', or with "
                "curvature=None and fit curvature afterwards."
            )
        parameters = list(self._parameters.values()) if not self._checked else []
        own = observer.backward(outputs, gradients, parameters)
        self._add(observer, size, dict(zip(self._parameters, own, strict=False)))

    def after_backward(self) -> None:
        """Training's own backward pass is done: take what the empirical Fisher waits for."""
        if self._waiting is None:
            return
        (observer, size), self._waiting = self._waiting, None
        # Lightning divides the loss by the accumulation, and a scaler multiplies it.
        factor = float(self._trainer.accumulate_grad_batches * size)
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            factor /= scaler.get_scale()
        self._add(observer, size, {}, factor)

    def _add(
        self, observer: Observer, size: int, own: Mapping[str, Tensor | None], factor: float = 1.0
    ) -> None:
        uses = observer.uses()
        if not uses:
            raise unseen(next(iter(self._parameters)))
        for use in uses:
            if factor != 1 and use.gradient is not None:
                use.gradient = use.gradient * factor
        if not self._blocks:
            shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
            self._blocks = blocks_of(shapes, uses)
        found = gradients_of(self._blocks, uses, size)
        if own:
            require_complete(self._blocks, found, own, observer.eps**0.5)
        self._checked = True
        added = {block.name: self._statistics(block, found[block.name]) for block in self._blocks}
        # Half precision overflows now and then; training skips such a step, and so do we.
        whole = all(bool(torch.isfinite(s.trace).all()) for s in added.values())
        if not whole:
            rank_zero_warn(
                f"Curvature statistics of step {self.next_step()} are not finite and are left out."
            )
        for name, statistics in added.items():
            if not whole:
                statistics = _nothing(statistics)
            _accumulate(self._pending, name, statistics)

    def end_step(self, taken: bool) -> None:
        """The optimizer has made its step, or skipped it: then its batches belong to no step."""
        for name, statistics in self._pending.items():
            _accumulate(self.sums, name, statistics if taken else _nothing(statistics))
        self._pending = {}

    def _statistics(self, block: Block, gradient: Gradient) -> BlockStatistics:
        if not isinstance(gradient, Rows):  # few rows are touched, however many there are
            gradient = first_examples(gradient, _affordable(gradient))
        left, right, count = gradient.covariances(side_forms(gradient, self.settings.dense_side))
        few = first_examples(gradient, _NORMS)
        trace = few.weighted_squares(None, None, None).mean() * gradient.batch
        examples = left.new_tensor([gradient.batch])
        sums = (left, right, count, trace.reshape(1), examples)
        device, dtype = self.settings.device, self.settings.dtype
        placed = (value.to(device or value.device, dtype) for value in sums)
        return BlockStatistics(block.parameters, block.shape, *placed)

    def take(self) -> dict[str, BlockStatistics]:
        """The sums of all processes, which begin anew; every process must come here."""
        sums, self.sums = self._of_all(), {}
        return sums

    def _of_all(self) -> dict[str, BlockStatistics]:
        totals = summed(
            {
                f"{kind}:{name}": getattr(block, kind)
                for name, block in self.sums.items()
                for kind in block.SUMS
            }
        )
        return {
            name: BlockStatistics(
                block.parameters,
                block.shape,
                **{kind: totals[f"{kind}:{name}"] for kind in block.SUMS},
            )
            for name, block in self.sums.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The sums of all processes, in plain containers; every process must come here."""
        blocks = {
            name: {
                "parameters": list(block.parameters),
                "shape": list(block.shape),
                **{kind: getattr(block, kind).clone() for kind in block.SUMS},
            }
            for name, block in self._of_all().items()
        }
        return {"sums": blocks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`: the first process has the sums of all."""
        self.sums = {}
        for name, about in state["sums"].items():
            # Lightning loads its checkpoints onto the host.
            device = self.settings.device or self._parameters[about["parameters"][0]].device
            tensors = {kind: about[kind].to(device) for kind in BlockStatistics.SUMS}
            shape = tuple(about["shape"])
            block = BlockStatistics(tuple(about["parameters"]), shape, **tensors)
            self.sums[name] = block if self._trainer.is_global_zero else _nothing(block)


def _affordable(gradient: Gradient) -> int:
    """Examples that the covariances of one step are taken over."""
    _, groups, height, width = gradient.shape
    if isinstance(gradient, Outer):
        rows, work = gradient.positions, gradient.positions * (height**2 + width**2)
    else:
        rows, work = height, height * width * (height + width)
    return max(_FEWEST, min(_ROWS // rows, _WORK // (groups * work)))


def _accumulate(sums: dict[str, BlockStatistics], name: str, added: BlockStatistics) -> None:
    sums[name] = sums[name] + added if name in sums else added


def _nothing(statistics: BlockStatistics) -> BlockStatistics:
    zeros = {name: torch.zeros_like(getattr(statistics, name)) for name in statistics.SUMS}
    return BlockStatistics(statistics.parameters, statistics.shape, **zeros)


def require_complete(
    blocks: list[Block],
    found: Mapping[str, Gradient],
    own: Mapping[str, Tensor | None],
    allowed: float,
) -> None:
    """Check that the examples' gradients sum to autograd's, parameter by parameter.

    Raises:
        UnsupportedTrainingError: some use of a parameter has not been seen.
    """
    for block in blocks:
        gradient = found[block.name]
        total = block.tensors(gradient.mean() * gradient.batch)
        spread = gradient.weighted_squares(None, None, None).sum() * gradient.batch
        for name in block.parameters:
            plain = own[name]
            expected = torch.zeros_like(total[name]) if plain is None else plain
            difference = (total[name] - expected).norm()
            if difference > allowed * torch.maximum(expected.norm(), spread.sqrt()):
                raise unseen(name)


def unseen(name: str) -> UnsupportedTrainingError:
    return UnsupportedTrainingError(
        f"Parameter {name} is used in training_step in a way that curvature='online' cannot see "
        "(inside compiled or checkpointed code, or by an operation other than a linear, "
        "convolution, embedding, norm, attention or recurrent layer). Record with curvature=None "
        "and fit curvature afterwards."
    )
