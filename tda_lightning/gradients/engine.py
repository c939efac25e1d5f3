"""Exact per-example gradients of any module, block by block, in factored form.

:meth:`GradientEngine.each_gradient` is the whole way from a batch's losses to its gradients:

1. ``capture.py`` watches the forward pass and notes every use of a trained parameter.
2. A backward pass brings the gradient of each layer's output, and ``example_axes.py`` finds out
   which rows of it belong to which example.
3. ``uses.py`` makes the per-example gradients from inputs and output gradients, in the forms of
   ``forms.py``. Parameters without a native form go through ``functional.py``.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor, nn

from tda_lightning.gradients.blocks import Block
from tda_lightning.gradients.capture import Capture
from tda_lightning.gradients.composite import scaled
from tda_lightning.gradients.example_axes import ExampleAxes
from tda_lightning.gradients.forms import Gradient
from tda_lightning.gradients.functional import (
    Loss,
    functional_gradients,
    parameters_frozen,
    plain_recurrence,
)
from tda_lightning.gradients.moving import opaque
from tda_lightning.gradients.parameter_hooks import kept_entries
from tda_lightning.gradients.reached import used_otherwise
from tda_lightning.gradients.refusals import require_fixed_tables, why_apart
from tda_lightning.gradients.rows import Rows, restricted
from tda_lightning.gradients.shared_graph import gradients_of_each
from tda_lightning.gradients.term_products import term_products
from tda_lightning.gradients.uses import Use, assemble, plan_blocks, seen_both_ways
from tda_lightning.records.errors import EngineError, NonFiniteError
from tda_lightning.runtime import conditions
from tda_lightning.runtime.irregular_weights import irregular_weights
from tda_lightning.runtime.module_state import doubled, in_double
from tda_lightning.tasks.batches import Batch
from tda_lightning.tasks.node_batch import NodeBatch

Losses = Callable[[nn.Module, Batch, Tensor], Iterable[Tensor]]


@dataclass(frozen=True)
class ExampleGradients:
    """Losses [batch] and the per-example gradient of every block by its name."""

    losses: Tensor
    blocks: dict[str, Gradient]


class GradientEngine:
    """Per-example gradients of a loss with respect to the trained parameters.

    The first batch decides how each parameter is differentiated, and checks it: which rows of
    every layer's output belong to which example is observed, and the gradients of the examples,
    summed with irregular weights, must be plain autograd's gradient of the weighted losses, for
    every parameter. A parameter that fails is differentiated example by example instead
    (``functional.py``); if that does not agree either, an error names it.

    A later batch in which a parameter is used otherwise, or whose examples cannot be told apart in
    a layer, is differentiated example by example as well, for the parameters concerned.

    Args:
        module: in eval mode; its weights may be exchanged between calls.
        parameters: names of the trained parameters, as ``module.named_parameters()`` has them.

    Attributes:
        notes: what a reader of the scores should know about these gradients.
        widest: scalars that an example has in the largest output of a layer.
        held: scalars that an example's factored gradients hold in memory.
        rows_each: of blocks whose rows are looked up, how many of them an example of the first
            batch touched, by name.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[str]):
        self.module = module
        self.names = tuple(n for n in parameters if module.get_parameter(n).numel())
        require_fixed_tables(module, self.names)
        for name in self.names:
            if module.get_parameter(name).is_complex():
                raise EngineError(
                    f"Parameter {name} is complex, and gradients are kept as real numbers. Hold "
                    "its real and imaginary parts in a real parameter and use "
                    "torch.view_as_complex, or restrict attribution to other layers (task.layers)."
                )
        self._shapes = {name: tuple(module.get_parameter(name).shape) for name in self.names}
        self._axes = ExampleAxes()
        self._generic: list[str] = []
        self._blocks: list[Block] = []
        kept = {n: kept_entries(n, module.get_parameter(n)) for n in self.names}
        self._kept = {name: mask for name, mask in kept.items() if mask is not None}
        self._eps = 0.0  # of the coarsest precision in the last batch
        self.notes: list[str] = []
        self.widest = self.held = 1
        self.rows_each: dict[str, int] = {}
        self._restriction: Mapping[str, Tensor] = {}

    @property
    def blocks(self) -> list[Block]:
        """The parameter blocks; known after :meth:`discover`."""
        if not self._blocks:
            raise RuntimeError("Call discover() with a first batch before asking for the blocks.")
        rows = self._restriction
        return [b.restricted(rows[b.name]) if b.name in rows else b for b in self._blocks]

    def restricted(self, rows: Mapping[str, Tensor]) -> GradientEngine:
        """The same engine with some rows alone, ascending, of blocks whose rows are looked up."""
        engine = copy.copy(self)
        engine._restriction = rows
        return engine

    def with_heights(self, heights: Mapping[str, int]) -> GradientEngine:
        """The same engine for embeddings of other heights, by parameter."""
        engine = copy.copy(self)
        shapes = {
            name: (heights[name], *shape[1:]) if name in heights else shape
            for name, shape in self._shapes.items()
        }
        engine._shapes = shapes
        engine._blocks = [
            replace(block, shapes=tuple(shapes[name] for name in block.parameters))
            for block in self._blocks
        ]
        return engine

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
            EngineError: the loss of an example alone is not its loss in the batch.
            NonFiniteError: a loss is not finite.
        """
        if not self._blocks:
            raise RuntimeError("Call discover() with a first batch before asking for gradients.")
        if isinstance(batch, NodeBatch):
            yield from self._of_nodes(losses, batch, examples)
            return
        blocks, count = self._blocks, len(examples)
        capture, values = self._watched(losses, batch, examples)
        for number, loss in enumerate(values):
            shared = self._axes.locate(capture, loss)
            self._eps = capture.eps
            odd, uses = _apart(capture.uses, self._otherwise(capture, loss) | shared)
            if odd:
                self._say_slow(odd)
            generic = functional_gradients(
                self.module,
                [*self._generic, *odd],
                _nth(losses, number),
                batch,
                examples,
                loss,
            )
            for use in uses:
                use.widen()
            gradients = assemble(blocks, uses, count, generic)
            yield ExampleGradients(loss.detach(), self._asked_for(gradients))

    def _of_nodes(
        self, losses: Losses, batch: NodeBatch, examples: Tensor
    ) -> Iterator[ExampleGradients]:
        """The same for nodes of one graph, whose losses share all rows of every layer. A node that
        stands in the batch several times (in several recorded steps) is differentiated once."""
        parameters = {name: self.module.get_parameter(name) for name in self.names}
        each, place = batch.nodes.unique(return_inverse=True)
        first = torch.empty_like(each).scatter_(0, place, torch.arange(len(place)).to(each))
        own, chosen = replace(batch, nodes=each), examples[first]
        with parameters_frozen(self.module, self.names), torch.enable_grad():
            for loss in losses(self.module, own, chosen):
                _check_losses(loss, chosen)
                rows = gradients_of_each(loss, parameters)
                rows = {name: values[place] for name, values in rows.items()}
                gradients = assemble(self._blocks, [], len(examples), rows)
                yield ExampleGradients(loss.detach()[place], self._asked_for(gradients))

    @property
    def masked(self) -> list[str]:
        """Names of the parameters of which hooks leave some entries as they are."""
        return list(self._kept)

    def _asked_for(self, gradients: dict[str, Gradient]) -> dict[str, Gradient]:
        """What hooks leave of the gradients, in the rows that are asked for."""
        gradients = self._hooked(gradients)
        chosen = self._restriction.items()
        return gradients | {name: restricted(gradients[name], rows) for name, rows in chosen}

    def _hooked(self, gradients: dict[str, Gradient]) -> dict[str, Gradient]:
        """The gradients that hooks on the parameters leave."""
        for block in self._blocks if self._kept else ():
            if any(name in self._kept for name in block.parameters):
                ones = {n: torch.ones_like(self.module.get_parameter(n)) for n in block.parameters}
                kept = block.matrix({n: self._kept.get(n, one) for n, one in ones.items()})
                gradients[block.name] = scaled(gradients[block.name], kept)
        return gradients

    def _say_slow(self, names: Sequence[str]) -> None:
        text = (
            f"In some batches the examples share what goes through the layers of "
            f"{', '.join(names)}, or these parameters are used as in no earlier batch: their "
            "gradients are then computed example by example, which is exact and slow."
        )
        if text not in self.notes:
            self.notes.append(text)
            warnings.warn(text, stacklevel=4)

    def _watched(
        self, losses: Losses, batch: Batch, examples: Tensor
    ) -> tuple[Capture, Iterator[Tensor]]:
        """Run the losses under a fresh capture, which fills when the first loss is drawn."""
        native = [name for name in self.names if name not in self._generic]
        trained = {id(self.module.get_parameter(name)): name for name in native}
        capture = Capture(trained, len(examples))
        capture.moves = opaque(batch, len(examples)) or _hides_calls(self.module)

        def run() -> Iterator[Tensor]:
            produced = None
            while True:
                with torch.enable_grad(), parameters_frozen(self.module, self.names), capture:
                    if produced is None:
                        produced = iter(losses(self.module, batch, examples))
                    loss = next(produced, None)
                if loss is None:
                    return
                _check_losses(loss, examples)
                yield loss

        return capture, run()

    def plain_gradient(
        self, loss: Loss, batch: Batch, examples: Tensor, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Gradient of the summed losses, times ``weights`` [batch], by plain autograd."""
        frozen = parameters_frozen(self.module, self.names)
        with frozen, plain_recurrence(self.module), torch.enable_grad():
            losses = loss(self.module, batch, examples)
            total = losses.sum() if weights is None else (losses * weights.to(losses)).sum()
            if not total.requires_grad:
                raise EngineError(
                    "The loss depends on no trained parameter. Check that the task's loss calls "
                    "the module that was trained."
                )
            parameters = [self.module.get_parameter(name) for name in self.names]
            found = torch.autograd.grad(total, parameters, materialize_grads=True)
        gradients = [g.to_dense() if g.is_sparse else g for g in found]
        return dict(zip(self.names, gradients, strict=True))

    def term_products(
        self, terms: Loss, batch: Batch, examples: Tensor, directions: Mapping[str, Tensor]
    ) -> Tensor:
        """Inner products of the gradients of single terms of losses with ``directions``:
        [direction, batch, position] (``term_products.py``).

        Args:
            terms: maps (module, batch, examples) to the terms [batch, position].
            directions: [direction, *shape] by parameter.
        """
        held = {
            name: direction * self._kept[name] if name in self._kept else direction
            for name, direction in directions.items()
        }
        return term_products(self.module, lambda: terms(self.module, batch, examples), held)

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
            Relative error of the weighted sum over the examples, by parameter.

        Raises:
            EngineError: a parameter's gradient cannot be split by example.
        """
        self._generic = []
        self.notes.clear()
        dtype = next(self.module.parameters()).dtype
        if torch.finfo(dtype).bits < 32:
            self.notes.append(
                f"The module is in {str(dtype).removeprefix('torch.')}, and gradients carry its "
                "rounding. Give the module in float32 for scores without it."
            )
        capture, values = self._watched(lambda *a: [loss(*a)], batch, examples)
        losses = next(values)
        sizes = [use.output_shape.numel() // len(examples) for use in capture.uses]
        self.held = sum(sizes) + sum(use.input_scalars for use in capture.uses) // len(examples)
        if isinstance(batch, NodeBatch):  # all nodes run for any
            self._blocks = plan_blocks(self._shapes, capture.uses, seen_both_ways(capture.uses))
            return self._checked(loss, batch, examples, self._errors(loss, batch, examples))
        self.widest = max([1, *sizes])
        odd = list(self.names)
        if not one_by_one:
            shared = self._axes.locate(capture, losses)
            odd, _ = _apart(capture.uses, self._otherwise(capture, losses) | shared)
        seen = {ref.name for use in capture.uses for ref in use.refs}
        if unseen := set(self.names) - seen - set(odd):
            plain = self.plain_gradient(loss, batch, examples)
            odd += [name for name in unseen if bool(plain[name].any())]
        self._plan(capture, odd)
        errors = self._errors(loss, batch, examples)
        if wrong := self._wrong(errors):
            self._plan(capture, [*self._generic, *wrong])
            errors = self._errors(loss, batch, examples)
        return self._checked(loss, batch, examples, errors)

    def _checked(
        self, loss: Loss, batch: Batch, examples: Tensor, errors: dict[str, float]
    ) -> dict[str, float]:
        """The errors, if none is too large."""
        self.held += sum(math.prod(self._shapes[name]) for name in self._generic)
        if wrong := self._wrong(errors):
            name = wrong[0]
            raise EngineError(
                f"Parameter {name}: the gradients of single examples do not make up the gradient "
                f"of their batch (relative difference {errors[name]:.1e}). "
                + why_apart(
                    self.module,
                    loss,
                    batch,
                    examples,
                    lambda weights: self.plain_gradient(loss, batch, examples, weights),
                )
            )
        return errors

    def _otherwise(self, capture: Capture, losses: Tensor) -> set[str]:
        others = used_otherwise(capture.generic, losses, capture.trained, capture.uses)
        return others | capture.twice

    def _plan(self, capture: Capture, generic: Collection[str]) -> None:
        generic = {*generic, *seen_both_ways(capture.uses)}
        self._generic = [name for name in self.names if name in generic]
        self._blocks = plan_blocks(self._shapes, capture.uses, generic)

    def _errors(self, loss: Loss, batch: Batch, examples: Tensor) -> dict[str, float]:
        """Error of the weighted sum of the examples' gradients, by parameter; in float64 where
        float32 does not suffice."""
        errors = self._errors_as_is(loss, batch, examples)
        if self._wrong(errors):
            errors = self._errors_in_double(loss, batch, examples) or errors
        return errors

    def _errors_as_is(self, loss: Loss, batch: Batch, examples: Tensor) -> dict[str, float]:
        gradients = self.gradients(loss, batch, examples)
        self.rows_each = {
            name: -(-len(gradient.index) // gradient.batch)
            for name, gradient in gradients.blocks.items()
            if isinstance(gradient, Rows)
        }
        # Others than those that the layouts were observed with.
        weights = irregular_weights(len(examples), gradients.losses, seed=1)
        plain = self.plain_gradient(loss, batch, examples, weights)
        differences, scales = {}, {}
        for block in self.blocks:
            gradient = gradients.blocks[block.name]
            squares = gradient.weighted_squares(None, None, None)
            factors = weights.to(squares)
            total = block.tensors(gradient.weighted_sums(factors[None])[0])
            # Sums of gradients that cancel are compared with the size of what cancels.
            spread = ((squares * factors.square()).sum() * gradient.batch).sqrt()
            for name in block.parameters:
                if not bool(plain[name].isfinite().all()):
                    plain[name] = total[name]  # nothing to compare: who uses it names the example
                differences[name] = float((total[name] - plain[name]).nan_to_num().norm())
                scales[name] = float(torch.maximum(plain[name].norm(), spread))
        # A parameter that changes no loss (a shift before LayerNorm) has rounding for a gradient.
        rounding = 1e-12 * max(filter(math.isfinite, scales.values()), default=0.0)
        return {
            name: 0.0 if difference <= rounding else difference / scales[name]
            for name, difference in differences.items()
        }

    def _errors_in_double(
        self, loss: Loss, batch: Batch, examples: Tensor
    ) -> dict[str, float] | None:
        """The same in float64, None where the module or its loss insists on its own precision.

        Near a kink (a ReLU, a maximum) the rounding of float32 decides which way a gradient goes,
        and one example alone may round otherwise. That is no error of ours.
        """
        if next(self.module.parameters()).dtype == torch.float64:
            return None
        try:
            with in_double(self.module):
                return self._errors_as_is(loss, doubled(batch), examples)
        except (RuntimeError, TypeError, ValueError):
            return None

    def _wrong(self, errors: dict[str, float]) -> list[str]:
        # Far above rounding, far below what a lost or doubled term makes.
        eps = torch.finfo(next(self.module.parameters()).dtype).eps
        tolerance = max(eps**0.5, 16 * self._eps)
        return [name for name, error in errors.items() if not error <= tolerance]


def _apart(uses: Sequence[Use], names: Collection[str]) -> tuple[list[str], list[Use]]:
    """The parameters to differentiate example by example, ``names`` and those that share uses
    with them, and the uses of the others."""
    odd, left = set(names), list(uses)
    while touched := [use for use in left if any(ref.name in odd for ref in use.refs)]:
        odd.update(ref.name for use in touched for ref in use.refs)
        left = [use for use in left if use not in touched]
    return sorted(odd), left


def _hides_calls(module: nn.Module) -> bool:
    """Whether some of the module runs outside of Python, where its calls are not seen."""
    return any(isinstance(part, torch.jit.ScriptModule) for part in module.modules())


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
    values = losses.detach()
    finite = values.isfinite()

    def error() -> NoReturn:
        position = int((~finite).nonzero()[0])
        raise NonFiniteError(
            f"The loss of example {int(examples[position])} is {float(values[position])}. "
            "Attribution needs finite losses: look at this example, or use an earlier checkpoint."
        )

    conditions.require(finite.all(), error)
