"""Watch a forward pass of training itself, without touching a bit of it.

The calls are those that :class:`~tda_lightning.gradients.capture.Capture` knows, but here each one
is made exactly as the user's code makes it; what it was given and the edge of the graph at which
its output's gradient will arrive are noted afterwards. A backward pass to those edges (an extra
one, or training's own) then gives the same factors as the engine's.

Fused layers (attention, recurrent cells) hide their inner activations. They are replayed alone,
afterwards, on the inputs they were given and from the random state they began with, and the
gradient of their outputs is carried through the replay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tda_lightning.gradients import native
from tda_lightning.gradients.assemble import assemble, plan_blocks
from tda_lightning.gradients.blocks import Block
from tda_lightning.gradients.capture import Capture, Ref, Use
from tda_lightning.gradients.forms import Gradient
from tda_lightning.gradients.layout import candidates
from tda_lightning.records.errors import EngineError


@dataclass
class _Fused:
    """A fused call to be replayed: its arguments, and its outputs' edges with their gradients."""

    func: Callable[..., Any]
    args: Any
    kwargs: Any
    edges: dict[int, GradientEdge]  # by position among the outputs
    gradients: dict[int, Tensor]
    random: tuple[Tensor, list[Tensor]]  # states before the call: CPU, CUDA devices


class Observer(TorchFunctionMode):
    """Notes every use of the trained parameters while active.

    Args:
        trained: names of the trained parameters by ``id``.
        listen: also keep the gradients of training's own backward pass.
    """

    def __init__(self, trained: Mapping[int, str], listen: bool = False) -> None:
        super().__init__()
        self.trained = dict(trained)
        self.listen = listen
        self.eps = 0.0  # of the coarsest output gradient
        self.dummy = torch.zeros(())  # handlers take a mode that has one for a recording one
        self._capture = Capture(self.trained)
        self._seen: list[tuple[Use, GradientEdge]] = []
        self._fused: list[_Fused] = []

    def __torch_function__(  # type: ignore[override]
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = native.HANDLERS.get(func)
        if handler is None or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func in native.FUSED:
            return self._note_fused(func, args, kwargs)
        output = func(*args, **kwargs)

        def known(*_: Any, **__: Any) -> Any:
            return output

        known.__name__ = func.__name__
        with torch.no_grad():
            handler(self, known, *args, **kwargs)
        return output

    # What the handlers ask of a mode.

    def ref(self, tensor: Tensor | None) -> Ref | None:
        return self._capture.ref(tensor)

    def constant(self, tensor: Any) -> Any:
        return tensor

    def mark_generic(self, values: Any) -> None:
        """Uses without a native form show in :meth:`gradients_of`, by what is missing."""

    def record(
        self,
        kind: str,
        output: Tensor,
        weight: Ref | None,
        bias: Ref | None,
        saved: Any,
        channel_axes: tuple[int, ...],
    ) -> Tensor:
        if (weight is not None or bias is not None) and output.requires_grad:
            use = Use(kind, weight, bias, saved, channel_axes, output.shape)
            # The edge stays this call's own, whatever is done to the output in place.
            self._seen.append((use, get_gradient_edge(output)))
            if self.listen:
                output.register_hook(lambda gradient: setattr(use, "gradient", gradient))
        return output

    def _note_fused(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        if not any(isinstance(leaf, Tensor) and id(leaf) in self.trained for leaf in leaves):
            return func(*args, **kwargs)
        started = torch.cuda.is_available() and torch.cuda.is_initialized()
        cuda = torch.cuda.get_rng_state_all() if started else []
        random = (torch.get_rng_state(), cuda)
        output = func(*args, **kwargs)
        fused = _Fused(func, *self._detached(args, kwargs), {}, {}, random)
        for position, tensor in enumerate(pytree.tree_leaves(output)):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                fused.edges[position] = get_gradient_edge(tensor)
                if self.listen:
                    self._keep(fused, position, tensor)
        if fused.edges:
            self._fused.append(fused)
        return output

    def _keep(self, fused: _Fused, position: int, tensor: Tensor) -> None:
        tensor.register_hook(lambda gradient: fused.gradients.__setitem__(position, gradient))

    def _detached(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments without history, parameters as they are; equal ones stay the same one."""
        known: dict[int, Tensor] = {}

        def detach(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or id(leaf) in self.trained:
                return leaf
            return known.setdefault(id(leaf), leaf.detach())

        return pytree.tree_map(detach, (args, kwargs))  # type: ignore[no-any-return]

    # Afterwards.

    def backward(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Carry ``gradients`` of ``outputs`` to every use noted; training's graph is kept.

        Returns:
            The gradient of each of ``parameters``: empty to spare their cost.
        """
        edges: list[Tensor | GradientEdge] = [edge for _, edge in self._seen]
        places = [(fused, position) for fused in self._fused for position in fused.edges]
        edges += [fused.edges[position] for fused, position in places]
        inputs: Any = [*edges, *parameters]  # edges and tensors together, which the types deny
        found = torch.autograd.grad(
            list(outputs),
            inputs,
            list(gradients),
            retain_graph=True,
            allow_unused=True,
        )
        for (use, _), gradient in zip(self._seen, found, strict=False):
            use.gradient = gradient
        for (fused, position), gradient in zip(places, found[len(self._seen) :], strict=False):
            fused.gradients[position] = gradient
        return list(found[len(edges) :])

    def forget(self) -> None:
        """Forget the gradients that have arrived; another backward pass brings others."""
        for use, _ in self._seen:
            use.gradient = None
        for fused in self._fused:
            fused.gradients.clear()

    def uses(self) -> list[Use]:
        """Every use that a gradient has reached, those inside fused layers too, in float32 or
        wider."""
        uses = [use for use, _ in self._seen if use.gradient is not None]
        for fused in self._fused:
            uses += _replayed(fused, self.trained)
        for use in uses:
            assert use.gradient is not None
            self.eps = max(self.eps, torch.finfo(use.gradient.dtype).eps)
            use.gradient = _wide(use.gradient)
            use.saved = pytree.tree_map(_wide, use.saved)
        return uses


def _replayed(fused: _Fused, trained: dict[int, str]) -> list[Use]:
    reached = {p: g for p, g in fused.gradients.items() if g is not None}
    if not reached:
        return []
    device = next(iter(reached.values())).device
    mode = Capture(trained, torch.zeros((), device=device, requires_grad=True))
    cpu, cuda = fused.random
    with torch.random.fork_rng(range(len(cuda))), torch.enable_grad():
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        with mode:
            output = native.FUSED[fused.func](mode, fused.func, *fused.args, **fused.kwargs)
    leaves = pytree.tree_leaves(output)
    assert mode.dummy is not None
    torch.autograd.grad(
        [leaves[position] for position in reached],
        mode.dummy,
        [gradient.to(leaves[position].dtype) for position, gradient in reached.items()],
        allow_unused=True,
    )
    return [use for use in mode.uses if use.gradient is not None]


def _wide(value: Any) -> Any:
    """Half precision as float32: sums of squares leave its range."""
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value


def blocks_of(shapes: dict[str, tuple[int, ...]], uses: Sequence[Use]) -> list[Block]:
    """The blocks that the engine makes of parameters used like this."""
    return plan_blocks(shapes, uses)


def gradients_of(blocks: Sequence[Block], uses: Sequence[Use], batch: int) -> dict[str, Gradient]:
    """Per-example gradients of every block.

    Training's own batch cannot be taken apart to observe which axis holds the examples (batch
    norm couples them), so the first axis of the batch's size that is no channel axis is taken.
    """
    for use in uses:
        layouts = candidates(use.output_shape, batch, use.channel_axes)
        if not layouts:
            name = next(ref.name for ref in (use.weight, use.bias) if ref is not None)
            raise EngineError(
                f"Parameter {name}: its layer's output {tuple(use.output_shape)} has no axis for "
                f"the {batch} examples of the batch, so no curvature statistics of single examples "
                "can be taken. Record with curvature=None and fit curvature afterwards."
            )
        use.layout = min(layouts, key=lambda layout: (layout.order != "whole", layout.axis))
    return assemble(blocks, uses, batch, {})
