"""Curvature statistics from the forward and backward passes that training runs anyway.

At every k-th optimizer step the training step is watched: what each layer was given, and the
standard losses. Labels sampled from the model then take one more backward pass through the graph
that is already there, to the layers' outputs and no further (the empirical Fisher waits for
training's own backward pass). Inputs and output gradients are summed into Kronecker factors.

Lightning has no hook around the training step alone; ``Strategy.training_step`` is the last public
point through which it goes. It is replaced while a fit lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from tda_lightning.curvature import check_dense_side, side_forms
from tda_lightning.gradients.blocks import Block
from tda_lightning.gradients.composite import first_examples
from tda_lightning.gradients.forms import Gradient, Outer
from tda_lightning.gradients.observer import Layouts, observed_layouts, training_gradients
from tda_lightning.gradients.observer import Observer as CallObserver
from tda_lightning.gradients.parameter_hooks import kept_entries
from tda_lightning.gradients.rows import Rows
from tda_lightning.gradients.uses import plan_blocks, seen_both_ways
from tda_lightning.recording.example_indices import ExampleIndices
from tda_lightning.recording.observer import Observer
from tda_lightning.recording.resume import RecorderState
from tda_lightning.recording.sharded import require_whole
from tda_lightning.recording.step_table import StepTable
from tda_lightning.recording.trained_parameters import TrainedParameters
from tda_lightning.recording.trainer_hooks import ReplacedMethod
from tda_lightning.records.curvature_statistics import BlockStatistics
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.trajectory import Facts
from tda_lightning.runtime.irregular_weights import irregular_weights
from tda_lightning.runtime.module_state import restored
from tda_lightning.runtime.processes import summed
from tda_lightning.runtime.random_states import unchanged_randomness
from tda_lightning.store.writer import TrajectoryWriter
from tda_lightning.tasks.batches import num_examples
from tda_lightning.tasks.example_seeds import seeded_examples
from tda_lightning.tasks.gauss_newton import (
    beside_standard_losses,
    example_weighted,
    sampled_output_gradients,
)
from tda_lightning.tasks.loss_calls import LossObserver, ObservedLoss

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
        """With ``every`` chosen where it was not given: 64, or fewer so that three watched steps
        fall between any two of the planned ``checkpoints``."""
        if self.every is not None:
            return self
        gaps = (after - before for before, after in pairwise(sorted({0, *checkpoints})))
        return replace(self, every=max(1, min([_EVERY, *(gap // 3 for gap in gaps)])))

    def facts(self) -> dict[str, Any]:
        """What is recorded about them."""
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
        ("fisher", fisher, ("true", "empirical")),
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


class CurvatureStatistics(Observer):
    """Sums the statistics of the steps since the last checkpoint."""

    def __init__(
        self, settings: OnlineCurvature, indices: ExampleIndices, steps: StepTable
    ) -> None:
        self.settings = self._given = settings
        self._indices, self._steps = indices, steps
        self._trainer: Trainer
        self._trained: TrainedParameters
        self._training_step: ReplacedMethod | None = None
        self._start = 0  # step of the last checkpoint
        self._parameters: dict[str, nn.Parameter] = {}
        self._blocks: list[Block] = []
        self._checked = False  # every use of the parameters has been seen
        self._layouts: Layouts = {}  # where the examples are, observed once
        self._located = False
        self._weighed: tuple[list[Tensor | None], Tensor] | None = None
        self._left_out: set[str] = set()  # blocks without gradients of single examples
        self._waiting: tuple[CallObserver, int] | None = None  # for training's own backward pass
        self._batch: dict[str, BlockStatistics] = {}  # of a batch before its backward pass
        self._step: dict[str, BlockStatistics] = {}  # of the step under way
        self._sums: dict[str, BlockStatistics] = {}

    def attach(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._training_step = ReplacedMethod(trainer.strategy, "training_step", self._watched)

    def begin(self, trainer: Trainer, trained: TrainedParameters) -> None:
        require_whole(trained.shards, "curvature='online'")
        self._trained = trained
        self.begin_stage()

    def facts(self) -> dict[str, Any]:
        return {"curvature": self.settings.facts()}

    def resume(self, facts: Facts, state: RecorderState) -> None:
        self._start = state.checkpoints[-1]
        # Lightning loads checkpoints to the CPU.
        device = self.settings.device or self._trainer.strategy.root_device
        for name, saved in state.parts["curvature"]["sums"].items():
            sums = {n: saved[n].to(device, self.settings.dtype) for n in BlockStatistics.SUMS}
            block = BlockStatistics(tuple(saved["parameters"]), tuple(saved["shape"]), **sums)
            # The first process has the sums of all.
            self._sums[name] = block if self._trainer.is_global_zero else _zeros(block)

    def begin_stage(self) -> None:
        self._parameters = self._trained.of_stage()
        self._blocks, self._checked = [], False
        self._layouts, self._left_out, self._weighed = {}, set(), None
        self._located = False
        for name, parameter in self._parameters.items():
            if kept_entries(name, parameter) is not None:
                raise UnsupportedTrainingError(
                    f"A hook holds some entries of {name} fixed, of which curvature='online' "
                    "knows nothing. Record with curvature=None and fit curvature afterwards."
                )
        self._sums, self._step, self._batch = {}, {}, {}

    def plan(self, checkpoints: Collection[int]) -> None:
        """Choose how often to watch, where that was left open."""
        self.settings = self._given.watching(checkpoints)

    def watch_as(self, recorded: Facts) -> None:
        """Watch as often as in a recorded run, where that was left open."""
        before = recorded.settings.get("curvature")
        if self._given.every is None and isinstance(before, Mapping):
            self.settings = replace(self.settings, every=before.get("every"))

    def _watched(self, training_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        every = self.settings.every
        if not self._parameters or every is None or self._next_step % every:
            return training_step(*args, **kwargs)
        empirical = self.settings.fisher == "empirical"
        known = self._checked and self._located
        losses = None if empirical and known else LossObserver()
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        calls = CallObserver(names, listen=empirical)
        with losses or nullcontext(), calls:
            output = training_step(*args, **kwargs)
        total = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(total, Tensor) or not total.requires_grad:
            return output  # the module skips this batch
        indices = self._indices.batch
        batch = args[0] if args else kwargs.get("batch")
        size = num_examples(batch) if indices is None else len(indices)
        if empirical:
            if losses is not None:
                self._check(total, losses.losses, calls, size)
            self._waiting = (calls, size)
        elif losses is not None:
            examples = torch.arange(size) if indices is None else torch.as_tensor(indices)
            self._sample(total, losses.losses, calls, examples)
        return output

    @property
    def _next_step(self) -> int:
        """The optimizer step under way, counted from 1."""
        return self._steps.num_steps + 1

    def _sample(
        self, total: Tensor, losses: list[ObservedLoss], calls: CallObserver, examples: Tensor
    ) -> None:
        """Add the statistics of labels that are sampled from the model."""
        outputs: list[Tensor] = []
        gradients: list[Tensor] = []
        if losses:
            # Labels are drawn anew at every step.
            seed, placed = _SEED + self._next_step, examples.to(total.device)
            with seeded_examples(seed, placed, own_noise=False):
                outputs, gradients = sampled_output_gradients(total, losses, len(examples))
        if not outputs:
            raise UnsupportedTrainingError(
                "training_step calls none of cross_entropy, nll_loss, mse_loss and "
                "binary_cross_entropy_with_logits of torch.nn.functional, so labels cannot be "
                "sampled for the true Fisher. Record with fisher='empirical', or with "
                "curvature=None and fit curvature afterwards."
            )
        parameters = list(self._parameters.values()) if not self._checked else []
        if not self._checked and (rest := beside_standard_losses(total, losses)) is not None:
            rank_zero_warn(
                f"In the loss of training_step, {rest}. The statistics that curvature='online' "
                "gathers are those of its standard losses at constant weights. That is all there "
                "is beside a penalty on the weights. Otherwise record with fisher='empirical', or "
                "with curvature=None and fit curvature afterwards."
            )
        if not self._located:
            self._weigh(calls, outputs, gradients, len(examples))
        own = self._backward(calls, outputs, gradients, parameters)
        self._add(calls, len(examples), dict(zip(self._parameters, own, strict=False)))

    def _backward(self, calls: CallObserver, *args: Any) -> list[Tensor | None]:
        try:
            # The pass changes neither by itself, but gradient checkpointing runs a part of the
            # forward pass again in it: batch norm counts its batch once more, and dropout draws.
            with restored(self._trainer.lightning_module, "buffers"), unchanged_randomness():
                return calls.backward(*args)
        except RuntimeError as error:
            if "checkpoint" not in str(error):
                raise
            raise UnsupportedTrainingError(
                "curvature='online' needs a backward pass to the layers' outputs, which "
                "torch.utils.checkpoint forbids with use_reentrant=True. Pass use_reentrant=False, "
                "or record with curvature=None and fit curvature afterwards."
            ) from error

    def _check(
        self, total: Tensor, losses: list[ObservedLoss], calls: CallObserver, size: int
    ) -> None:
        """Check once that every use is seen, by a backward pass from the arguments of the losses:
        in training's own the gradients of a penalty on the weights arrive too."""
        arguments = [loss.given[name] for loss in losses for name in loss.arguments]
        if not arguments:
            return
        slopes = torch.autograd.grad(total.sum(), arguments, retain_graph=True, allow_unused=True)
        reached = [(a, g) for a, g in zip(arguments, slopes, strict=True) if g is not None]
        if not reached:
            return
        outputs, gradients = zip(*reached, strict=True)
        if not self._located:
            self._weigh(calls, outputs, gradients, size)
        own = self._backward(calls, outputs, gradients, list(self._parameters.values()))
        self._gradients(calls, size, dict(zip(self._parameters, own, strict=True)))
        calls.forget()

    def _weigh(
        self, calls: CallObserver, outputs: Any, gradients: Sequence[Tensor], size: int
    ) -> None:
        """Before the first gradients: those of weighted examples, which show afterwards where the
        examples are in every layer's output."""
        if size == 1:
            return  # shows nothing
        self._located = True
        weights = irregular_weights(size, gradients[0])
        weighted = example_weighted(gradients, weights)
        if weighted is not None:
            self._backward(calls, outputs, weighted)
            self._weighed = ([use.gradient for use in calls.reached()], weights)

    def end_backward(self) -> None:
        if self._waiting is not None:
            (calls, size), self._waiting = self._waiting, None
            if not self._checked:
                self._require_seen(calls)
            # Lightning divides the loss by the accumulation, and a scaler multiplies it.
            factor = float(self._trainer.accumulate_grad_batches * size)
            scaler = getattr(self._trainer.precision_plugin, "scaler", None)
            self._add(calls, size, {}, factor if scaler is None else factor / scaler.get_scale())
        _add_to(self._step, self._batch)
        self._batch = {}

    def end_step(self, taken: bool) -> None:
        if taken:
            _add_to(self._sums, self._step)
            self._step = {}
        else:
            self.drop()

    def drop(self) -> None:
        # The blocks are known now, though no example of theirs counts.
        _add_to(self._sums, {name: _zeros(block) for name, block in self._step.items()})
        self._step = {}

    def _require_seen(self, calls: CallObserver) -> None:
        """Check that each parameter that has got a gradient was seen in some use."""
        seen = {ref.name for use in calls.reached() for ref in use.refs}
        for name, parameter in self._parameters.items():
            if name not in seen and parameter.grad is not None and len(parameter.grad.nonzero()):
                raise _unseen(name)

    def _gradients(
        self, calls: CallObserver, size: int, own: Mapping[str, Tensor | None], factor: float = 1.0
    ) -> dict[str, Gradient]:
        """Of each block, the examples' gradients times ``factor``; ``own`` to compare with."""
        uses = calls.reached()
        if not uses:
            raise _unseen(next(iter(self._parameters)))
        for use in uses:
            if factor != 1 and use.gradient is not None:
                use.gradient = use.gradient * factor
        newly = self._weighed is not None
        if self._weighed is not None:
            (others, weights), self._weighed = self._weighed, None
            if len(others) == len(uses):
                self._layouts = observed_layouts(uses, others, weights, calls.couples)
        if not self._blocks:
            if both := seen_both_ways(uses):
                raise _unseen(min(both))
            shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
            self._blocks = plan_blocks(shapes, uses)
        gradients = training_gradients(self._blocks, uses, size, self._layouts)
        if own:
            _require_complete(self._blocks, gradients, own, calls.eps**0.5)
        if newly or not self._checked:
            self._say_left_out({b.name for b in self._blocks} - set(gradients))
        return gradients

    def _say_left_out(self, names: set[str]) -> None:
        if names - self._left_out:
            rank_zero_warn(
                f"No curvature statistics of {', '.join(sorted(names))} are gathered: the examples "
                "of a batch share their layers' outputs. Attribution fits the curvature of these "
                "afterwards."
            )
        self._left_out |= names
        for name in names:  # of batches of one, where every row is that of the example
            self._sums.pop(name, None)
            self._step.pop(name, None)

    def _add(
        self, calls: CallObserver, size: int, own: Mapping[str, Tensor | None], factor: float = 1.0
    ) -> None:
        gradients = self._gradients(calls, size, own, factor)
        like = next(iter(self._parameters.values()))
        batch = {
            b.name: self._statistics(b, gradients[b.name])
            if b.name in gradients and b.name not in self._left_out
            else self._nothing(b, like)
            for b in self._blocks
            if b.name in gradients or b.name in self._left_out
        }
        # Half precision overflows now and then; training skips such a step, and so do we.
        finite = all(bool(torch.isfinite(block.trace).all()) for block in batch.values())
        if not finite:
            rank_zero_warn(
                f"Curvature statistics of step {self._next_step} are not finite and are left out."
            )
        self._checked = self._checked or finite  # what overflows shows nothing
        self._batch = {n: block if finite else _zeros(block) for n, block in batch.items()}

    def _statistics(self, block: Block, gradient: Gradient) -> BlockStatistics:
        if not isinstance(gradient, Rows):  # few rows are touched, however many there are
            gradient = first_examples(gradient, _affordable(gradient))
        left, right, count = gradient.covariances(side_forms(gradient, self.settings.dense_side))
        few = first_examples(gradient, _NORMS)
        trace = few.weighted_squares(None, None, None).mean() * gradient.batch
        numbers = (left.new_tensor([gradient.batch]), left.new_tensor(_samples(gradient)))
        sums = (left, right, count, trace.reshape(1), *numbers)
        device, dtype = self.settings.device, self.settings.dtype
        placed = (value.to(device or value.device, dtype) for value in sums)
        return BlockStatistics(block.parameters, block.shape, *placed)

    def _nothing(self, block: Block, like: Tensor) -> BlockStatistics:
        """Statistics of no example."""
        groups, rows, columns = block.shape
        sizes = ((groups, rows), (groups, columns), (groups,), (1,), (1,), (2,))
        device, dtype = self.settings.device or like.device, self.settings.dtype
        zeros = (torch.zeros(size, device=device, dtype=dtype) for size in sizes)
        return BlockStatistics(block.parameters, block.shape, *zeros)

    def write(self, writer: TrajectoryWriter, step: int, last: bool) -> None:
        if step > self._start:
            writer.write_statistics(self._start, step, self._sums_of_all())
            self._start, self._sums = step, {}

    def _sums_of_all(self) -> dict[str, BlockStatistics]:
        """The sums over all processes; every process must call it."""
        totals = summed(
            {
                f"{kind}:{name}": getattr(block, kind)
                for name, block in self._sums.items()
                for kind in block.SUMS
            }
        )
        return {
            name: _with_sums(block, {kind: totals[f"{kind}:{name}"] for kind in block.SUMS})
            for name, block in self._sums.items()
        }

    def state(self) -> dict[str, Any]:
        sums = {
            name: {
                "parameters": list(block.parameters),
                "shape": list(block.shape),
                **{kind: getattr(block, kind).clone() for kind in block.SUMS},
            }
            for name, block in self._sums_of_all().items()
        }
        return {"parts": {"curvature": {"sums": sums}}}

    def detach(self) -> None:
        if self._training_step is not None:
            self._training_step.remove()
        self._training_step, self._waiting = None, None


def _samples(gradient: Gradient) -> tuple[float, float]:
    """Vectors that the covariances of the two sides are sums over."""
    if isinstance(gradient, Outer):
        return (float(gradient.samples().sum()) / gradient.shape[1],) * 2
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


def _add_to(sums: dict[str, BlockStatistics], added: Mapping[str, BlockStatistics]) -> None:
    for name, block in added.items():
        sums[name] = sums[name] + block if name in sums else block


def _zeros(block: BlockStatistics) -> BlockStatistics:
    return _with_sums(block, {k: torch.zeros_like(getattr(block, k)) for k in block.SUMS})


def _with_sums(block: BlockStatistics, sums: Mapping[str, Any]) -> BlockStatistics:
    return replace(block, **sums)


def _require_complete(
    blocks: list[Block],
    gradients: Mapping[str, Gradient],
    own: Mapping[str, Tensor | None],
    allowed: float,
) -> None:
    """Check that the examples' gradients sum to autograd's, parameter by parameter.

    Raises:
        UnsupportedTrainingError: some use of a parameter has not been seen.
    """
    for block in blocks:
        if block.name not in gradients:
            continue  # left out
        gradient = gradients[block.name]
        total = block.tensors(gradient.mean() * gradient.batch)
        # A few examples tell how large what cancels in the sum is.
        few = first_examples(gradient, _NORMS)
        spread = few.weighted_squares(None, None, None).mean() * gradient.batch**2
        for name in block.parameters:
            plain = own[name]
            expected = torch.zeros_like(total[name]) if plain is None else plain
            difference = (total[name] - expected).norm()
            if difference > allowed * torch.maximum(expected.norm(), spread.sqrt()):
                raise _unseen(name)


def _unseen(name: str) -> UnsupportedTrainingError:
    """Some use of parameter ``name`` has not been seen."""
    return UnsupportedTrainingError(
        f"Parameter {name} is used in training_step in a way that curvature='online' cannot see "
        "(inside compiled or checkpointed code, or by an operation other than a linear, "
        "convolution, embedding, norm, attention or recurrent layer). Record with curvature=None "
        "and fit curvature afterwards."
    )
