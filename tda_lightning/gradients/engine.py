"""Exact per-example gradients of any module, block by block, in factored form.

:meth:`GradientEngine.each_gradient` is the whole way from a batch's losses to its gradients:

1. ``capture.py`` watches the forward pass and notes every use of a trained parameter.
2. ``example_axes.py`` finds out which axis of each layer's output holds the examples.
3. A backward pass brings the gradient of each layer's output.
4. ``uses.py`` makes the per-example gradients from inputs and output gradients, in the forms of
   ``forms.py``. Parameters without a native form go through ``functional.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tda_lightning.gradients.blocks import Block
from tda_lightning.gradients.capture import Capture
from tda_lightning.gradients.example_axes import ExampleAxes
from tda_lightning.gradients.forms import Gradient
from tda_lightning.gradients.functional import (
    Loss,
    functional_gradients,
    parameters_frozen,
    plain_recurrence,
)
from tda_lightning.gradients.uses import assemble, plan_blocks
from tda_lightning.records.errors import EngineError, NonFiniteError
from tda_lightning.runtime.module_state import doubled, in_double
from tda_lightning.tasks.batches import Batch

Losses = Callable[[nn.Module, Batch, Tensor], Iterable[Tensor]]


@dataclass(frozen=True)
class ExampleGradients:
    """Losses [batch] and the per-example gradient of every block by its name."""

    losses: Tensor
    blocks: dict[str, Gradient]


class GradientEngine:
    """Per-example gradients of a loss with respect to the trained parameters.

    The first batch decides how each parameter is differentiated, and checks it: which axis of
    every layer's output holds the examples is observed, the sum over the examples must equal plain
    autograd's gradient for every parameter, and the batch in reverse must give the same gradients
    in reverse. A parameter that fails is differentiated through ``torch.func`` instead; if that
    does not agree either, an error names it.

    Args:
        module: in eval mode; its weights may be exchanged between calls.
        parameters: names of the trained parameters, as ``module.named_parameters()`` has them.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[str]):
        self.module = module
        self.names = tuple(parameters)
        self._shapes = {name: tuple(module.get_parameter(name).shape) for name in self.names}
        self._axes = ExampleAxes()
        self._generic: list[str] = []
        self._blocks: list[Block] = []

    @property
    def blocks(self) -> list[Block]:
        """The parameter blocks; known after :meth:`discover`."""
        if not self._blocks:
            raise RuntimeError("Call discover() with a first batch before asking for the blocks.")
        return self._blocks

    @property
    def generic(self) -> list[str]:
        """Names of the parameters that are differentiated through ``torch.func``."""
        return list(self._generic)

    def gradients(self, loss: Loss, batch: Batch, examples: Tensor) -> ExampleGradients:
        """Per-example gradients of ``loss`` for every block.

        Args:
            loss: maps (module, batch, examples) to the losses [batch].
            batch: a batch of any structure.
            examples: indices of its examples in the data set, int64 [batch].
        """
        return next(self.each_gradient(lambda *a: [loss(*a)], batch, examples))

    def each_gradient(
        self, losses: Losses, batch: Batch, examples: Tensor
    ) -> Iterator[ExampleGradients]:
        """Per-example gradients of several losses that share one forward pass.

        Raises:
            EngineError: a parameter is used as the first batch did not show.
            NonFiniteError: a loss is not finite.
        """
        blocks, count = self.blocks, len(examples)
        capture, values = self._watched(losses, batch, examples)
        for number, loss in enumerate(values):
            if capture.generic:
                raise EngineError(
                    f"Parameter {min(capture.generic)} is used in this batch in a way that the "
                    "first batch did not show. Give a first batch that uses every layer as the "
                    "others do, or leave the layer out (task.layers)."
                )
            if number == 0 and (mixed := self._axes.locate(capture, loss, count)):
                raise EngineError(
                    f"Parameter {min(mixed)}: its layer's output in this batch of {count} "
                    "examples is not laid out by example as in the first batch, so single "
                    "examples cannot be told apart. Leave the layer out (task.layers), or let it "
                    "see every example of a batch."
                )
            generic = functional_gradients(
                self.module, self._generic, _nth(losses, number), batch, examples
            )
            with torch.enable_grad():
                capture.backward([loss.sum()])
            yield ExampleGradients(loss.detach(), assemble(blocks, capture.uses, count, generic))

    def _watched(
        self, losses: Losses, batch: Batch, examples: Tensor
    ) -> tuple[Capture, Iterator[Tensor]]:
        """Run the losses under a fresh capture, which fills when the first loss is drawn."""
        native = [name for name in self.names if name not in self._generic]
        capture = Capture({id(self.module.get_parameter(name)): name for name in native})

        def run() -> Iterator[Tensor]:
            produced = None
            while True:
                with torch.enable_grad(), parameters_frozen(self.module, native), capture:
                    if produced is None:
                        produced = iter(losses(self.module, batch, examples))
                    loss = next(produced, None)
                if loss is None:
                    return
                _check_losses(loss, examples)
                yield loss

        return capture, run()

    def plain_gradient(self, loss: Loss, batch: Batch, examples: Tensor) -> dict[str, Tensor]:
        """Gradient of the summed losses by plain autograd."""
        frozen = parameters_frozen(self.module, self.names)
        with frozen, plain_recurrence(self.module), torch.enable_grad():
            total = loss(self.module, batch, examples).sum()
            if not total.requires_grad:
                raise EngineError(
                    "The loss depends on no trained parameter. Check that the task's loss calls "
                    "the module that was trained."
                )
            parameters = [self.module.get_parameter(name) for name in self.names]
            gradients = torch.autograd.grad(total, parameters, materialize_grads=True)
        return dict(zip(self.names, gradients, strict=True))

    def discover(
        self, loss: Loss, batch: Batch, examples: Tensor, one_by_one: bool = False
    ) -> dict[str, float]:
        """Plan the blocks from a batch and check them against plain autograd.

        Args:
            loss: maps (module, batch, examples) to the losses [batch].
            batch: training examples.
            examples: their indices in the data set, int64 [batch].
            one_by_one: differentiate every example alone; the losses of a batch have no graph that
                could be split by example.

        Returns:
            Relative error of the sum over the examples, by parameter.

        Raises:
            EngineError: a parameter's gradient cannot be split by example.
        """
        self._generic = []
        plain = self.plain_gradient(loss, batch, examples)
        capture, values = self._watched(lambda *a: [loss(*a)], batch, examples)
        losses = next(values)
        apart = set(self.names) if one_by_one else self._axes.locate(capture, losses, len(examples))
        self._plan(capture, capture.generic | apart)
        errors = self._errors(loss, batch, examples, plain)
        if self._wrong(errors):
            errors = self._errors_in_double(loss, batch, examples) or errors
        if wrong := self._wrong(errors):
            self._plan(capture, {*self._generic, *wrong})
            errors = self._errors(loss, batch, examples, plain)
        for name in self._wrong(errors):
            what = "sum to the gradient of the batch"
            if errors[name].sum <= self._tolerance():
                what = "stay the same when the batch is reversed"
            raise EngineError(
                f"Parameter {name}: the per-example gradients do not {what} (relative "
                f"difference {errors[name].largest:.1e}). Examples of a batch influence one "
                "another (batch statistics, a contrastive loss), so there is no gradient of a "
                "single example. Restrict attribution to other layers (task.layers) or write a "
                "task whose losses are separate."
            )
        return {name: error.sum for name, error in errors.items()}

    def _plan(self, capture: Capture, generic: set[str]) -> None:
        self._generic = [name for name in self.names if name in generic]
        self._blocks = plan_blocks(self._shapes, capture.uses, generic)

    def _errors(
        self, loss: Loss, batch: Batch, examples: Tensor, plain: dict[str, Tensor]
    ) -> dict[str, _Error]:
        """Errors by parameter, of the batch and of the batch in reverse."""
        gradients = self.gradients(loss, batch, examples).blocks
        turned = _reversed(batch, len(examples))
        again = None if turned is None else self.gradients(loss, turned, examples.flip(0)).blocks
        errors = {}
        for block in self.blocks:
            gradient = gradients[block.name]
            total = block.tensors(gradient.mean() * gradient.batch)
            squares = gradient.weighted_squares(None, None, None)
            largest = squares.max()
            order = 0.0
            if again is not None and largest > 0:
                others = again[block.name].weighted_squares(None, None, None).flip(0)
                order = float((squares - others).abs().max() / largest)
            # Sums of gradients that cancel are compared with the size of what cancels.
            spread = (squares.sum() * gradient.batch).sqrt()
            for name in block.parameters:
                difference = (total[name] - plain[name]).norm()
                scale = torch.maximum(plain[name].norm(), spread)
                errors[name] = _Error(float(difference / scale) if scale > 0 else 0.0, order)
        return errors

    def _errors_in_double(
        self, loss: Loss, batch: Batch, examples: Tensor
    ) -> dict[str, _Error] | None:
        """The same in float64, None where the module or its loss insists on its own precision.

        Near a kink (a ReLU, a maximum) the rounding of float32 decides which way a gradient goes,
        and another order of the batch may round otherwise. That is no error of ours.
        """
        if next(self.module.parameters()).dtype == torch.float64:
            return None
        precise = doubled(batch)
        try:
            with in_double(self.module):
                plain = self.plain_gradient(loss, precise, examples)
                return self._errors(loss, precise, examples, plain)
        except (RuntimeError, TypeError, ValueError):
            return None

    def _wrong(self, errors: dict[str, _Error]) -> list[str]:
        return [name for name, error in errors.items() if error.largest > self._tolerance()]

    def _tolerance(self) -> float:
        """Far above rounding, far below what a lost or doubled term makes."""
        dtype = next(self.module.parameters()).dtype
        return float(torch.finfo(dtype).eps ** 0.5)


@dataclass(frozen=True)
class _Error:
    """Of one parameter.

    Attributes:
        sum: |sum of per-example gradients - batch gradient|, relative to the examples' norms.
        order: largest relative change of a norm when the batch is reversed.
    """

    sum: float
    order: float

    @property
    def largest(self) -> float:
        return max(self.sum, self.order)


def _nth(losses: Losses, number: int) -> Loss:
    """The loss at place ``number`` alone."""

    def nth(module: nn.Module, batch: Batch, examples: Tensor) -> Tensor:
        for position, loss in enumerate(losses(module, batch, examples)):
            if position == number:
                return loss
        raise AssertionError("a loss disappeared between two evaluations")

    return nth


def _check_losses(losses: Tensor, examples: Tensor) -> None:
    if losses.shape != examples.shape:
        raise ValueError(
            f"The task returned losses of shape {tuple(losses.shape)} for {len(examples)} "
            "examples: expected one loss per example, [batch]. Do not average over the batch."
        )
    bad = ~losses.detach().isfinite()
    if bad.any():
        position = int(bad.nonzero()[0])
        raise NonFiniteError(
            f"The loss of example {int(examples[position])} is {float(losses[position].detach())}. "
            "Attribution needs finite losses: look at this example, or use an earlier checkpoint."
        )


def _reversed(batch: Batch, count: int) -> Batch | None:
    """The batch with its examples in reverse; None where it is not all tensors, example first."""
    leaves, structure = pytree.tree_flatten(batch)
    if not all(isinstance(leaf, Tensor) and leaf.shape[:1] == (count,) for leaf in leaves):
        return None
    return pytree.tree_unflatten([leaf.flip(0) for leaf in leaves], structure)
