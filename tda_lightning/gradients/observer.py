"""Watch a forward pass of training itself, without touching a bit of it.

Fused layers (attention, recurrent cells) must not be taken apart here: another order of operations
rounds otherwise. They are called as they are, and replayed alone afterwards, on the inputs they
were given and from the random state they began with; the gradient of their outputs is carried
through the replay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tda_lightning.gradients.blocks import Block
from tda_lightning.gradients.capture import Capture
from tda_lightning.gradients.forms import Gradient
from tda_lightning.gradients.layout import candidates
from tda_lightning.gradients.uses import Use, WatchedOutput, assemble
from tda_lightning.records.errors import EngineError


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
        eps: of the coarsest output gradient so far.
    """

    def __init__(self, trained: Mapping[int, str], listen: bool = False) -> None:
        super().__init__(trained)
        self.listen = listen
        self.eps = 0.0
        self._fused: list[_FusedCall] = []

    def watch(self, watched: WatchedOutput, output: Tensor) -> None:
        super().watch(watched, output)
        if self.listen:
            output.register_hook(partial(setattr, watched, "gradient"))

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
        uses = [use for use in self.uses if use.gradient is not None]
        for call in self._fused:
            uses += _replayed(call, self.trained)
        for use in uses:
            assert use.gradient is not None
            self.eps = max(self.eps, torch.finfo(use.gradient.dtype).eps)
            use.widen()
        return uses


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


def training_gradients(
    blocks: Sequence[Block], uses: Sequence[Use], batch: int
) -> dict[str, Gradient]:
    """Per-example gradients of every block from uses in a training batch.

    Training's own batch cannot be taken apart to observe which axis holds the examples (batch
    norm couples them), so the first axis of the batch's size that is no channel axis is taken.
    """
    for use in uses:
        layouts = candidates(use.output_shape, batch, use.channel_axes)
        if not layouts:
            raise EngineError(
                f"Parameter {use.refs[0].name}: its layer's output {tuple(use.output_shape)} has "
                f"no axis for the {batch} examples of the batch, so no curvature statistics of "
                "single examples can be taken. Record with curvature=None and fit curvature "
                "afterwards."
            )
        use.layout = min(layouts, key=lambda layout: (layout.order != "whole", layout.axis))
    return assemble(blocks, uses, batch, {})
