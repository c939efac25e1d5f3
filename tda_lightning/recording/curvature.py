"""Curvature statistics from the forward and backward passes that training runs anyway.

At every k-th optimizer step the training step is watched: what each layer was given, and the
standard losses. Labels sampled from the model then take one more backward pass through the graph
that is already there, to the layers' outputs and no further (the empirical Fisher waits for
training's own backward pass). Inputs and output gradients are summed into Kronecker factors.

Lightning has no hook around the training step alone; ``Strategy.training_step`` is the last public
point through which it goes. It is wrapped while a fit lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from tda_lightning.curvature import check_dense_side, side_forms
from tda_lightning.gradients.blocks import Block
from tda_lightning.gradients.composite import Rows, first_examples
from tda_lightning.gradients.forms import Gradient, Outer
from tda_lightning.gradients.observer import Observer, training_gradients
from tda_lightning.gradients.uses import plan_blocks
from tda_lightning.recording.complete import require_complete, unseen
from tda_lightning.recording.wrapping import Wrapped
from tda_lightning.records.curvature_statistics import BlockStatistics
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.runtime.module_state import restored
from tda_lightning.runtime.processes import summed
from tda_lightning.runtime.random_states import unchanged_randomness
from tda_lightning.tasks.batches import num_examples
from tda_lightning.tasks.example_seeds import seeded_examples
from tda_lightning.tasks.gauss_newton import sampled_output_gradients
from tda_lightning.tasks.loss_calls import LossObserver, ObservedLoss

FISHERS = ("true", "empirical")
# What one step adds to a covariance: rows (examples x positions), and multiplications. It is one
# step's share of a mean; the pictures of a batch have far more pixels than that needs. Eight times
# as many changed no LDS of digits by more than 0.006.
_ROWS = 512
_WORK = 1 << 29
_FEWEST = 2  # examples, however many rows they have
_NORMS = 8  # examples whose gradients are formed for the trace
_EVERY = 64
_SEED = 0


@dataclass(frozen=True)
class OnlineCurvature:
    """Settings of the statistics gathered in training."""

    every: int | None
    fisher: str
    device: str | None
    dtype: torch.dtype
    dense_side: int | None

    def watching(self, checkpoints: Collection[int]) -> OnlineCurvature:
        """With the number of steps, where none was given: 64, or fewer so that three watched steps
        fall between any two of the planned ``checkpoints``."""
        if self.every is not None:
            return self
        steps = sorted({0, *checkpoints})
        gaps = [after - before for before, after in zip(steps, steps[1:], strict=False)]
        return replace(self, every=max(1, min([_EVERY, *(gap // 3 for gap in gaps)])))

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
    every: int | None,
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
    try:
        torch.device(device or "cpu")
    except RuntimeError as error:
        raise ValueError(
            f"curvature_device must name a device such as 'cpu' or 'cuda:0', or be None for where "
            f"the model is; got {device!r}."
        ) from error
    return OnlineCurvature(every, fisher, device, getattr(torch, dtype), dense_side)


def require_uncompiled(module: nn.Module) -> None:
    """Check that the layers' calls can be watched.

    Raises:
        UnsupportedTrainingError: some of the module is compiled.
    """
    for name, part in module.named_modules():
        compiled = ("_compiled_call_impl", "_compiler_ctx")  # the latter is Lightning's
        if hasattr(part, "_orig_mod") or any(getattr(part, n, None) is not None for n in compiled):
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
        self._batch: dict[str, BlockStatistics] = {}  # of a batch before its backward pass
        self._pending: dict[str, BlockStatistics] = {}  # of the step under way
        self._waiting: tuple[Observer, int] | None = None  # for training's own backward pass
        self._watch: Wrapped | None = None

    def begin(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Gather for these parameters from now on."""
        self._parameters = dict(trained)
        self._names = {id(parameter): name for name, parameter in trained.items()}
        self._blocks, self._checked = [], False
        self.sums, self._pending, self._batch = {}, {}, {}

    def install(self, trainer: Trainer) -> None:
        """Watch the training steps of ``trainer``."""
        self._trainer = trainer

        def wrap(training_step: Callable[..., Any]) -> Callable[..., Any]:
            def watched(*args: Any, **kwargs: Any) -> Any:
                if not self._wanted():
                    return training_step(*args, **kwargs)
                empirical = self.settings.fisher == "empirical"
                losses = None if empirical and self._checked else LossObserver()
                observer = Observer(self._names, listen=empirical)
                with losses or nullcontext(), observer:
                    output = training_step(*args, **kwargs)
                self._observed(output, args[0] if args else kwargs.get("batch"), observer, losses)
                return output

            return watched

        self._watch = Wrapped(trainer.strategy, "training_step", wrap)

    def uninstall(self) -> None:
        """Put the strategy back as it was."""
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        self._waiting = None

    def _wanted(self) -> bool:
        every = self.settings.every
        return bool(self._names) and every is not None and self.next_step() % every == 0

    def _observed(
        self, output: Any, batch: Any, observer: Observer, losses: LossObserver | None
    ) -> None:
        total = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(total, Tensor) or not total.requires_grad:
            return  # the module skips this batch
        indices = self.indices()
        size = num_examples(batch) if indices is None else len(indices)
        if self.settings.fisher == "empirical":
            if losses is not None:
                self._check(total, losses.losses, observer, size)
            self._waiting = (observer, size)
            return
        assert losses is not None
        device = total.device
        examples = torch.arange(size) if indices is None else torch.as_tensor(indices)
        # Another draw of labels at every step.
        outputs: list[Tensor] = []
        gradients: list[Tensor] = []
        if losses.losses:
            with seeded_examples(_SEED + self.next_step(), examples.to(device)):
                outputs, gradients = sampled_output_gradients(total, losses.losses, size)
        if not outputs:
            raise UnsupportedTrainingError(
                "training_step calls none of cross_entropy, nll_loss, mse_loss and "
                "binary_cross_entropy_with_logits of torch.nn.functional, so labels cannot be "
                "sampled for the true Fisher. Record with fisher='empirical', or with "
                "curvature=None and fit curvature afterwards."
            )
        parameters = list(self._parameters.values()) if not self._checked else []
        own = self._backward(observer, outputs, gradients, parameters)
        self._add(observer, size, dict(zip(self._parameters, own, strict=False)))

    def _backward(self, observer: Observer, *args: Any) -> list[Tensor | None]:
        try:
            # The pass changes neither by itself, but gradient checkpointing runs a part of the
            # forward pass again in it: batch norm counts its batch once more, and dropout draws.
            with restored(self._trainer.lightning_module, "buffers"), unchanged_randomness():
                return observer.backward(*args)
        except RuntimeError as error:
            if "checkpoint" not in str(error):
                raise
            raise UnsupportedTrainingError(
                "curvature='online' needs a backward pass to the layers' outputs, which "
                "torch.utils.checkpoint forbids with use_reentrant=True. Pass use_reentrant=False, "
                "or record with curvature=None and fit curvature afterwards."
            ) from error

    def _check(
        self, total: Tensor, losses: list[ObservedLoss], observer: Observer, size: int
    ) -> None:
        """Check once that every use is seen, by a backward pass from the arguments of the losses:
        in training's own the gradients of a penalty on the weights arrive too."""
        arguments = [loss.given[name] for loss in losses for name in loss.arguments]
        if not arguments:
            return
        found = torch.autograd.grad(total.sum(), arguments, retain_graph=True, allow_unused=True)
        reached = [(a, g) for a, g in zip(arguments, found, strict=True) if g is not None]
        if not reached:
            return
        outputs, gradients = zip(*reached, strict=True)
        own = self._backward(observer, outputs, gradients, list(self._parameters.values()))
        self._gradients(observer, size, dict(zip(self._parameters, own, strict=True)))
        observer.forget()

    def after_backward(self) -> None:
        """Training's own backward pass is done: the batch belongs to the step under way."""
        if self._waiting is not None:
            self._after_waiting(*self._waiting)
            self._waiting = None
        for name, statistics in self._batch.items():
            _accumulate(self._pending, name, statistics)
        self._batch = {}

    def before_zero_grad(self) -> None:
        """Gradients are thrown away, and the batches that they came from with them."""
        self._pending = {}

    def _after_waiting(self, observer: Observer, size: int) -> None:
        if not self._checked:
            self._require_seen(observer)
        # Lightning divides the loss by the accumulation, and a scaler multiplies it.
        factor = float(self._trainer.accumulate_grad_batches * size)
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            factor /= scaler.get_scale()
        self._add(observer, size, {}, factor)

    def _require_seen(self, observer: Observer) -> None:
        """Check that each parameter that has got a gradient was seen in some use."""
        seen = {ref.name for use in observer.reached() for ref in use.refs}
        for name, parameter in self._parameters.items():
            if name not in seen and parameter.grad is not None and len(parameter.grad.nonzero()):
                raise unseen(name)

    def _gradients(
        self, observer: Observer, size: int, own: Mapping[str, Tensor | None], factor: float = 1.0
    ) -> dict[str, Gradient]:
        """Of each block, the examples' gradients times ``factor``; ``own`` to compare with."""
        uses = observer.reached()
        if not uses:
            raise unseen(next(iter(self._parameters)))
        for use in uses:
            if factor != 1 and use.gradient is not None:
                use.gradient = use.gradient * factor
        if not self._blocks:
            shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
            self._blocks = plan_blocks(shapes, uses)
        found = training_gradients(self._blocks, uses, size)
        if own:
            require_complete(self._blocks, found, own, observer.eps**0.5)
        return found

    def _add(
        self, observer: Observer, size: int, own: Mapping[str, Tensor | None], factor: float = 1.0
    ) -> None:
        found = self._gradients(observer, size, own, factor)
        added = {block.name: self._statistics(block, found[block.name]) for block in self._blocks}
        # Half precision overflows now and then; training skips such a step, and so do we.
        whole = all(bool(torch.isfinite(s.trace).all()) for s in added.values())
        if not whole:
            rank_zero_warn(
                f"Curvature statistics of step {self.next_step()} are not finite and are left out."
            )
        self._checked = self._checked or whole  # what overflows shows nothing
        self._batch = {n: s if whole else _nothing(s) for n, s in added.items()}

    def end_step(self, taken: bool) -> None:
        """The optimizer has made its step, or skipped it: then its batches belong to no step."""
        for name, statistics in self._pending.items():
            _accumulate(self.sums, name, statistics if taken else _nothing(statistics))
        self._pending, self._batch = {}, {}

    def _statistics(self, block: Block, gradient: Gradient) -> BlockStatistics:
        if not isinstance(gradient, Rows):  # few rows are touched, however many there are
            gradient = first_examples(gradient, _affordable(gradient))
        left, right, count = gradient.covariances(side_forms(gradient, self.settings.dense_side))
        few = first_examples(gradient, _NORMS)
        trace = few.weighted_squares(None, None, None).mean() * gradient.batch
        examples = left.new_tensor([gradient.batch])
        samples = left.new_tensor(_samples(gradient))
        sums = (left, right, count, trace.reshape(1), examples, samples)
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
        # Lightning loads checkpoints to the CPU.
        device = self.settings.device or self._trainer.strategy.root_device
        for name, about in state["sums"].items():
            tensors = {n: about[n].to(device, self.settings.dtype) for n in BlockStatistics.SUMS}
            shape = tuple(about["shape"])
            block = BlockStatistics(tuple(about["parameters"]), shape, **tensors)
            self.sums[name] = block if self._trainer.is_global_zero else _nothing(block)


def _samples(gradient: Gradient) -> tuple[float, float]:
    """Vectors that the covariances of the two sides are sums over."""
    if isinstance(gradient, Outer):
        return (float(gradient.batch * gradient.positions),) * 2
    if isinstance(gradient, Rows):
        return (float(len(gradient.index)),) * 2
    return float(gradient.batch * gradient.shape[3]), float(gradient.batch * gradient.shape[2])


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
