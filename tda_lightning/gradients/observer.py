"""Watch a forward pass of training itself, without touching a bit of it.

Fused layers (attention, recurrent cells) must not be taken apart here: another order of operations
rounds otherwise. They are called as they are, and replayed alone afterwards, on the inputs they
were given and from the random state they began with; the gradient of their outputs is carried
through the replay.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from tda_lightning.gradients.blocks import Block
from tda_lightning.gradients.capture import Capture
from tda_lightning.gradients.forms import Gradient
from tda_lightning.gradients.layout import Layout, candidates, owners
from tda_lightning.gradients.shared_outputs import SharedOutput
from tda_lightning.gradients.uses import Use, WatchedOutput, assemble

_MANY = 16  # examples: batch norm couples fewer by about their own size


@dataclass
class _FusedCall:
    """A fused call to be replayed, and its watched outputs by position."""

    func: Callable[..., object]
    args: tuple[object, ...]
    kwargs: dict[str, object]
    random: tuple[Tensor, list[Tensor]]  # states before the call: CPU, CUDA devices
    outputs: dict[int, WatchedOutput] = field(default_factory=dict)


class Observer(Capture):
    """Notes every use of the trained parameters in a training step.

    Args:
        trained: names of the trained parameters by ``id``.
        listen: also note the gradients of training's own backward pass.

    Attributes:
        couples: whether a batch norm makes the examples' gradients depend on one another.
        eps: of the coarsest output gradient so far.
    """

    def __init__(self, trained: Mapping[int, str], listen: bool = False) -> None:
        super().__init__(trained)
        self.listen = listen
        self._fused: list[_FusedCall] = []
        self.couples = False
        self._broadcast: dict[Use, list[Use]] = {}  # where their outputs are broadcast to

    def __torch_function__(  # type: ignore[override]
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if func is F.batch_norm and not self.couples:
            given = inspect.signature(F.batch_norm).bind(*args, **(kwargs or {})).arguments
            self.couples = bool(given.get("training"))
        return super().__torch_function__(func, types, args, kwargs)

    def broadcast(self, shared: SharedOutput, output: Tensor) -> None:
        """Watch the result as well: which of the two counts is known when gradients have
        arrived."""
        expanded = shared.for_each_example(output)
        if expanded is not None:
            self._broadcast.setdefault(shared.use, []).append(expanded)
            self.watch(expanded, output)

    @property
    def uses(self) -> list[Use]:
        others = {use for own in self._broadcast.values() for use in own}
        return [use for use in super().uses if use not in others]

    def with_own_biases(
        self, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        return args, kwargs  # another shape might be computed in another way

    def watch(self, watched: WatchedOutput, output: Tensor) -> None:
        super().watch(watched, output)
        if self.listen:
            output.register_hook(watched.arrive)

    def fused(
        self, func: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        leaves = pytree.tree_leaves((args, kwargs))
        if not torch.is_grad_enabled() or not any(id(leaf) in self.trained for leaf in leaves):
            return func(*args, **kwargs)
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        random = (torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else [])
        output = func(*args, **kwargs)
        call = _FusedCall(func, *self._detached(args, kwargs), random)
        for position, tensor in enumerate(pytree.tree_leaves(output)):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                call.outputs[position] = WatchedOutput()
                self.watch(call.outputs[position], tensor)
        self._fused.append(call)
        return output

    def _detached(
        self, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """The arguments without history, parameters as they are; a tensor given twice stays one."""
        known: dict[int, Tensor] = {}

        def detach(leaf: Tensor) -> Tensor:
            if id(leaf) in self.trained:
                return leaf
            return known.setdefault(id(leaf), leaf.detach())

        return pytree.tree_map_only(Tensor, detach, (args, kwargs))  # type: ignore[no-any-return]

    def reached(self) -> list[Use]:
        """Every use that a gradient has reached, those inside fused layers too, in float32 or
        wider."""
        uses = [
            own
            for use in self.uses
            if use.gradient is not None
            for own in self._for_each_example(use)
        ]
        for call in self._fused:
            uses += _replayed(call, self.trained)
        for use in uses:
            assert use.gradient is not None
            self.eps = max(self.eps, torch.finfo(use.gradient.dtype).eps)
            use.widen()
        return uses

    def _for_each_example(self, use: Use) -> Sequence[Use]:
        """The use with the gradients of the examples that its output was broadcast to, as often as
        it was; itself where it was not, or not only there."""
        own = [other for other in self._broadcast.get(use, ()) if other.gradient is not None]
        if not own or use.gradient is None:
            return [use]
        shape = use.gradient.shape
        summed = torch.stack([o.gradient.sum_to_size(shape) for o in own if o.gradient is not None])
        allowed = torch.finfo(summed.dtype).eps ** 0.5
        if (summed.sum(0) - use.gradient).norm() > allowed * use.gradient.norm():
            return [use]
        return own


def _replayed(call: _FusedCall, trained: Mapping[int, str]) -> list[Use]:
    gradients = {p: out.gradient for p, out in call.outputs.items() if out.gradient is not None}
    if not gradients:
        return []
    capture = Capture(trained)
    cpu, cuda = call.random
    with torch.random.fork_rng(range(len(cuda))), torch.enable_grad():
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        leaves = pytree.tree_leaves(capture.fused(call.func, call.args, call.kwargs))
    outputs = [leaves[position] for position in gradients]
    capture.backward(
        outputs, [g.to(o.dtype) for o, g in zip(outputs, gradients.values(), strict=True)]
    )
    return [use for use in capture.uses if use.gradient is not None]


Layouts = dict[tuple[object, ...], Layout | None]


def numbered_keys(uses: Sequence[Use]) -> list[tuple[object, ...]]:
    """A key for each use of a step that is the same in other steps."""
    counts: Counter[tuple[object, ...]] = Counter()
    keys = []
    for use in uses:
        keys.append((*use.key, counts[use.key]))
        counts[use.key] += 1
    return keys


def observed_layouts(
    uses: Sequence[Use], weighted: Sequence[Tensor | None], weights: Tensor, coupled: bool
) -> Layouts:
    """Where the examples are in the outputs of a training batch; None where they share rows.

    Gradients of weighted losses are those of the losses times the weight of the row's example, if
    the row is one example's; nearly so where batch norm couples the examples. Of the layouts that
    the shape allows, the nearest is taken, if any is near.

    Args:
        uses: with the gradients of the losses.
        weighted: of the losses times ``weights`` [batch].
        coupled: by batch norm, so that a row is only nearly its example's.
    """
    found: Layouts = {}
    batch = len(weights)
    for key, use, other in zip(numbered_keys(uses), uses, weighted, strict=True):
        layouts = _first_first(candidates(use.output_shape, batch, use.channel_axes))
        if use.gradient is None or other is None or not bool(use.gradient.any()) or batch == 1:
            if layouts:
                found[key] = layouts[0]
            continue
        plain, scaled = use.rows(use.gradient.double()), use.rows(other.double())
        off = []
        for layout in layouts:
            owner = owners(layout, use.output_shape, batch, use.channel_axes).to(weights.device)
            expected = plain * weights.double()[owner][:, None]
            off.append(float((scaled - expected).norm() / expected.norm()))
        # Rows that are shared are off by about their own size, whatever they are taken for.
        # In a small batch norm's batch, so are those that are one example's: nothing is told then,
        # and the shape decides.
        limit = 0.05 if not coupled else 0.9 if batch >= _MANY else math.inf
        near = [layout for layout, error in zip(layouts, off, strict=True) if error < limit]
        least = min(off, default=0.0)
        found[key] = (
            next(
                (
                    layout
                    for layout, e in zip(layouts, off, strict=True)
                    if e <= 1.01 * least + 1e-6
                ),
                None,
            )
            if near
            else None
        )
    return found


def training_gradients(
    blocks: Sequence[Block], uses: Sequence[Use], batch: int, known: Mapping[Any, Layout | None]
) -> dict[str, Gradient]:
    """Per-example gradients of blocks from uses in a training batch, by name; without those of
    which some output has no rows of single examples.

    Args:
        known: where the examples are, as it was observed. For any other use, the first axis of the
            batch's size that is no channel axis is taken.
    """
    left_out: set[str] = set()
    for key, use in zip(numbered_keys(uses), uses, strict=True):
        layouts = _first_first(candidates(use.output_shape, batch, use.channel_axes))
        use.layout = layouts[0] if layouts else None
        if key in known:
            use.layout = known[key] if known[key] in layouts else None
        if use.layout is None:
            left_out.update(ref.name for ref in use.refs)
    kept = [block for block in blocks if left_out.isdisjoint(block.parameters)]
    names = {name for block in kept for name in block.parameters}
    inside = [use for use in uses if all(ref.name in names for ref in use.refs)]
    return assemble(kept, inside, batch, {}) if inside else {}


def _first_first(layouts: list[Layout]) -> list[Layout]:
    return sorted(layouts, key=lambda layout: (layout.order != "whole", layout.axis))
