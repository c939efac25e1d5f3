"""Exact per-example gradients of any module, block by block, in factored form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tda_lightning.gradients.assemble import assemble, plan_blocks
from tda_lightning.gradients.blocks import Block
from tda_lightning.gradients.capture import Capture, Use
from tda_lightning.gradients.forms import Gradient
from tda_lightning.gradients.functional import (
    Loss,
    doubled,
    functional_gradients,
    in_double,
    parameters_frozen,
    plain_recurrence,
)
from tda_lightning.gradients.layout import Layout, candidates, consistent
from tda_lightning.records.errors import EngineError, NonFiniteError

Losses = Callable[[nn.Module, Any, Tensor], Iterable[Tensor]]


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
        named = dict(module.named_parameters())
        self.names = tuple(name for name in parameters)
        self._trained = {id(named[name]): name for name in self.names}
        self._shapes = {name: tuple(named[name].shape) for name in self.names}
        self._layouts: dict[tuple[str, str, str, int], set[Layout]] = {}
        self._separable = True
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

    def discover(
        self, loss: Loss, batch: Any, examples: Tensor, separable: bool = True
    ) -> dict[str, float]:
        """Plan the blocks from a batch and check them against plain autograd.

        Args:
            loss: maps (module, batch, examples) to the losses [batch].
            batch: training examples.
            examples: their indices in the data set, int64 [batch].
            separable: False when ``loss`` repeats the mean loss because single losses are not
                known; the batch axes are then taken from the shapes alone.

        Returns:
            Relative error of the sum over the examples, by parameter.

        Raises:
            EngineError: a parameter's gradient cannot be split by example.
        """
        self._separable = separable
        plain = self.plain_gradient(loss, batch, examples)
        uses, mode, losses = self._forward(lambda *a: [loss(*a)], batch, examples)
        broken = self._resolve(uses, next(losses), len(examples))
        self._plan(uses, mode.generic | broken)
        sums, errors = self._first_errors(loss, batch, examples, plain)
        wrong = {name for name, error in errors.items() if error > self._tolerance()}
        if wrong and (exact := self._errors_in_double(loss, batch, examples)) is not None:
            sums, errors = exact
            wrong = {name for name, error in errors.items() if error > self._tolerance()}
        if wrong:
            self._plan(uses, {*self._generic, *wrong})
            sums, errors = self._first_errors(loss, batch, examples, plain)
        for name, error in errors.items():
            if error > self._tolerance():
                what = "sum to the gradient of the batch"
                if sums[name] <= self._tolerance():
                    what = "stay the same when the batch is reversed"
                raise EngineError(
                    f"Parameter {name}: the per-example gradients do not {what} (relative "
                    f"difference {error:.1e}). Examples of a batch influence one another (batch "
                    "statistics, a contrastive loss), so there is no gradient of a single "
                    "example. Restrict attribution to other layers (task.layers) or write a task "
                    "whose losses are separate."
                )
        return sums

    def _plan(self, uses: list[Use], generic: set[str]) -> None:
        self._generic = [name for name in self.names if name in generic]
        self._blocks = plan_blocks(self._shapes, self._native(uses))

    def gradients(self, loss: Loss, batch: Any, examples: Tensor) -> ExampleGradients:
        """Per-example gradients of ``loss`` for every block."""
        return next(self.each_gradient(lambda *a: [loss(*a)], batch, examples))

    def each_gradient(
        self, losses: Losses, batch: Any, examples: Tensor
    ) -> Iterator[ExampleGradients]:
        """Per-example gradients of several losses that share one forward pass."""
        blocks, count = self.blocks, len(examples)
        uses, mode, values = self._forward(losses, batch, examples)
        for number, loss in enumerate(values):
            if new := mode.generic - set(self._generic):
                raise EngineError(
                    f"Parameter {sorted(new)[0]} is used in this batch in a way that the first "
                    "batch did not show. Give a first batch that uses every layer as the others "
                    "do, or leave the layer out (task.layers)."
                )
            if number == 0 and (broken := self._resolve(uses, loss, count) - set(self._generic)):
                raise EngineError(
                    f"Parameter {sorted(broken)[0]}: its layer's output in this batch of {count} "
                    "examples is not laid out by example as in the first batch, so single "
                    "examples cannot be told apart. Leave the layer out (task.layers), or let it "
                    "see every example of a batch."
                )
            generic = functional_gradients(
                self.module, self._generic, self._nth(losses, number), batch, examples
            )
            self._backward(loss, uses, retain=True)
            found = assemble(blocks, self._native(uses), count, generic)
            yield ExampleGradients(loss.detach(), found)

    def _forward(
        self, losses: Losses, batch: Any, examples: Tensor
    ) -> tuple[list[Use], Capture, Iterator[Tensor]]:
        """Run the losses under a fresh capture; uses fill when the first loss is drawn."""
        parameter = next(self.module.parameters())
        self._dummy = torch.zeros((), device=parameter.device, requires_grad=True)
        mode = Capture(self._trained, self._dummy)
        count = len(examples)

        def run() -> Iterator[Tensor]:
            with torch.enable_grad(), parameters_frozen(self.module), mode:
                produced = iter(losses(self.module, batch, examples))
            while True:
                with torch.enable_grad(), parameters_frozen(self.module), mode:
                    loss = next(produced, None)
                if loss is None:
                    return
                _check_losses(loss, count, examples)
                yield loss

        return mode.uses, mode, run()

    def _backward(self, loss: Tensor, uses: list[Use], retain: bool) -> None:
        for use in uses:
            use.gradient = None
        if loss.requires_grad:
            with torch.enable_grad():
                total = loss.sum()
            torch.autograd.grad(total, self._dummy, retain_graph=retain, allow_unused=True)

    def _resolve(self, uses: list[Use], loss: Tensor, count: int) -> set[str]:
        """Find the layout of every use; names of the parameters of uses that have none."""
        choices: dict[int, list[Layout]] = {}
        for position, use in enumerate(uses):
            admissible = candidates(use.output_shape, count, use.channel_axes)
            seen = self._layouts.get(use.key, set()) if count > 1 else set()
            known = [layout for layout in admissible if layout in seen]
            if len(known) == 1:
                use.layout = known[0]
            else:
                choices[position] = admissible
        if count > 1 and self._separable and choices:
            self._observe(uses, choices, loss, count)
        broken: set[str] = set()
        for position, layouts in choices.items():
            use = uses[position]
            if layouts:
                # Where several are left, all give the same gradients for this batch.
                use.layout = layouts[0]
                if count > 1 and (len(layouts) == 1 or not self._separable):
                    self._layouts.setdefault(use.key, set()).add(layouts[0])
            else:
                broken |= {ref.name for ref in (use.weight, use.bias) if ref is not None}
        return broken

    def _observe(
        self, uses: list[Use], choices: dict[int, list[Layout]], loss: Tensor, count: int
    ) -> None:
        """Strike out the layouts that single examples' gradients contradict.

        Two examples with a gradient decide, unless they leave a choice.
        """
        self._backward(loss, uses, retain=True)
        probed = {p: 0 for p in choices if _is_nonzero(uses[p].gradient)}
        for example in (count - 1, *range(count - 1)):
            undecided = [p for p, n in probed.items() if n < 2 or len(choices[p]) > 1]
            if not undecided:
                return
            self._backward(loss[example], uses, retain=True)
            for position in undecided:
                gradient = uses[position].gradient
                if gradient is None or not _is_nonzero(gradient):
                    continue
                probed[position] += 1
                choices[position] = [
                    layout
                    for layout in choices[position]
                    if consistent(layout, gradient, example, count)
                ]

    def _native(self, uses: list[Use]) -> list[Use]:
        """Uses of parameters that are not differentiated through torch.func."""
        generic = set(self._generic)
        kept = []
        for use in uses:
            weight = use.weight if use.weight and use.weight.name not in generic else None
            bias = use.bias if use.bias and use.bias.name not in generic else None
            if weight is not None or bias is not None:
                kept.append(
                    Use(
                        use.kind,
                        weight,
                        bias,
                        use.saved,
                        use.channel_axes,
                        use.output_shape,
                        use.gradient,
                        use.layout,
                    )
                )
        return kept

    def _nth(self, losses: Losses, number: int) -> Loss:
        def nth(module: nn.Module, batch: Any, examples: Tensor) -> Tensor:
            for position, loss in enumerate(losses(module, batch, examples)):
                if position == number:
                    return loss
            raise AssertionError("a loss disappeared between two evaluations")

        return nth

    def plain_gradient(self, loss: Loss, batch: Any, examples: Tensor) -> dict[str, Tensor]:
        """Gradient of the summed losses by plain autograd."""
        with parameters_frozen(self.module), plain_recurrence(self.module), torch.enable_grad():
            parameters = [self.module.get_parameter(name) for name in self.names]
            for parameter in parameters:
                parameter.requires_grad_(True)
            total = loss(self.module, batch, examples).sum()
            if not total.requires_grad:
                raise EngineError(
                    "The loss depends on no trained parameter. Check that the task's loss calls "
                    "the module that was trained."
                )
            gradients = torch.autograd.grad(total, parameters, materialize_grads=True)
        return dict(zip(self.names, gradients, strict=True))

    def _first_errors(
        self, loss: Loss, batch: Any, examples: Tensor, plain: dict[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """By parameter: |sum of per-example gradients - batch gradient| relative to the examples'
        norms; and the larger of that and the relative change of any norm when the batch is
        reversed."""
        found = self.gradients(loss, batch, examples).blocks
        turned = _reversed(batch, len(examples))
        again = None if turned is None else self.gradients(loss, turned, examples.flip(0)).blocks
        sums, worst = {}, {}
        for block in self.blocks:
            gradient = found[block.name]
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
                sums[name] = float(difference / scale) if scale > 0 else 0.0
                worst[name] = max(sums[name], order)
        return sums, worst

    def _errors_in_double(
        self, loss: Loss, batch: Any, examples: Tensor
    ) -> tuple[dict[str, float], dict[str, float]] | None:
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
                return self._first_errors(loss, precise, examples, plain)
        except (RuntimeError, TypeError, ValueError):
            return None

    def _tolerance(self) -> float:
        """Far above rounding, far below what a lost or doubled term makes."""
        dtype = next(self.module.parameters()).dtype
        return float(torch.finfo(dtype).eps ** 0.5)


def _check_losses(losses: Tensor, count: int, examples: Tensor) -> None:
    if losses.shape != (count,):
        raise ValueError(
            f"The task returned losses of shape {tuple(losses.shape)} for {count} examples: "
            "expected one loss per example, [batch]. Do not average over the batch."
        )
    bad = ~losses.detach().isfinite()
    if bad.any():
        position = int(bad.nonzero()[0])
        raise NonFiniteError(
            f"The loss of example {int(examples[position])} is {float(losses[position].detach())}. "
            "Attribution needs finite losses: look at this example, or use an earlier checkpoint."
        )


def _is_nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def _reversed(batch: Any, count: int) -> Any:
    """The batch with its examples in reverse; None where it is not all tensors, example first."""
    leaves, structure = pytree.tree_flatten(batch)
    if not all(isinstance(leaf, Tensor) and leaf.shape[:1] == (count,) for leaf in leaves):
        return None
    return pytree.tree_unflatten([leaf.flip(0) for leaf in leaves], structure)
