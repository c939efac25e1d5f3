"""Find out where the examples of a batch are in every layer's output.

Guessing from shapes goes wrong as soon as two sizes agree, or the model sorts its examples, so the
layout is observed. Row k of a layer's output belongs to example n if its gradient is that of n's
loss alone: with the losses weighted by r_n it is then r_n times the gradient of their sum. One
more backward pass, with irregular weights, tells the example of every row, and the rows that
several examples share.

What was observed is remembered by the shape of the output, and serves other batches as long as
nothing in the forward pass may move examples (``moving.py``); otherwise every batch is observed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tda_lightning.gradients.capture import Capture
from tda_lightning.gradients.layout import Layout, RowOwners, candidates, owners
from tda_lightning.gradients.uses import Use
from tda_lightning.runtime.irregular_weights import irregular_weights


class ExampleAxes:
    """Sets the layout of every use of a batch, and remembers those that shapes decide."""

    def __init__(self) -> None:
        self._certain: dict[tuple[object, ...], set[Layout]] = {}
        self._shapes: dict[tuple[object, ...], Layout] = {}

    def locate(self, capture: Capture, losses: Tensor) -> set[str]:
        """Set the layout of every use, and bring the gradients of the losses' sum to them.

        Args:
            capture: of the forward pass that gave the losses.
            losses: [batch], with their graph.

        Returns:
            Names of the parameters whose uses have rows that several examples share.
        """
        batch = len(losses)
        unknown = []
        for use in capture.uses:
            use.layout = self._remembered(use, batch, capture.moves)
            if use.layout is None:
                unknown.append(use)
        weights = irregular_weights(batch, losses)
        weighted: list[Tensor | None] = [None] * len(unknown)
        observing = batch > 1 and len(unknown) > 0
        if observing:
            with torch.enable_grad():
                capture.backward([(losses * weights).sum()])
            weighted = [use.gradient for use in unknown]
        with torch.enable_grad():
            capture.backward([losses.sum()])
        arrived = [use.gradient for use in capture.uses if use.gradient is not None]
        eps = max([capture.eps, *(torch.finfo(gradient.dtype).eps for gradient in arrived)])
        shared: set[str] = set()
        for use, other in zip(unknown, weighted, strict=True):
            layouts = candidates(use.output_shape, batch, use.channel_axes)
            if observing and not (use.gradient is None and other is None):
                use.layout = self._observed(use, other, weights, layouts, capture.moves, eps)
            elif layouts:
                use.layout = layouts[0]
            elif batch == 1 or use.gradient is None:
                use.layout = RowOwners(weights.new_zeros(_num_rows(use), dtype=torch.int64))
            if use.layout is None:
                shared.update(ref.name for ref in use.refs)
        return shared

    def _remembered(self, use: Use, batch: int, moves: bool) -> Layout | None:
        if moves or batch == 1:
            return None
        exact = self._shapes.get((use.key, use.output_shape, batch))
        if exact is not None:
            return exact
        layouts = candidates(use.output_shape, batch, use.channel_axes)
        certain = self._certain.get(use.key, ())
        return layouts[0] if len(layouts) == 1 and layouts[0] in certain else None

    def _observed(
        self,
        use: Use,
        weighted: Tensor | None,
        weights: Tensor,
        layouts: list[Layout],
        moves: bool,
        eps: float,
    ) -> Layout | RowOwners | None:
        """The layout that the gradients show; None where examples share rows."""
        zeros = weights.new_zeros(()).expand(use.output_shape)
        plain = use.rows(zeros if use.gradient is None else use.gradient)
        other = use.rows(zeros if weighted is None else weighted)
        observation = _Observation(plain, other, weights, eps)
        consistent = [
            layout
            for layout in layouts
            if observation.fits(
                owners(layout, use.output_shape, len(weights), use.channel_axes).to(weights.device)
            )
        ]
        if not consistent:
            owner = observation.owner()
            return None if owner is None else RowOwners(_completed(owner, use, layouts, weights))
        chosen = consistent[0]  # where several are left, all give the same gradients here
        if len(consistent) == 1 and not moves and observation.speaks:
            self._shapes[(use.key, use.output_shape, len(weights))] = chosen
            if len(layouts) == 1 or not self._certain.get(use.key):
                self._certain.setdefault(use.key, set()).add(chosen)
        return chosen


class _Observation:
    """Gradients of one layer's rows, of the sum and of the weighted sum of the losses.

    Args:
        plain, weighted: [rows, width].
        weights: [batch].
        eps: of the coarsest precision behind the gradients.
    """

    def __init__(self, plain: Tensor, weighted: Tensor, weights: Tensor, eps: float):
        if torch.finfo(plain.dtype).bits < 32:
            plain, weighted = plain.float(), weighted.float()
        eps = max(eps, torch.finfo(weights.dtype).eps)
        largest = torch.cat([plain.flatten(), weighted.flatten()]).abs().amax() if len(plain) else 0
        self.speaks = bool(largest)
        self.plain, self.weighted = plain / largest, weighted / largest
        self.weights = weights.to(plain)
        # What is left is rounding: of the row itself, and of what cancelled in it.
        self.size = torch.maximum(self.plain.norm(dim=1), self.weighted.norm(dim=1))
        self.close = eps**0.5 * self.size
        self.little = max(8 * eps, 1e-3 * eps**0.5)

    def fits(self, owner: Tensor) -> bool:
        """Whether every row is that of its ``owner``."""
        if not self.speaks:
            return True
        rest = (self.weighted - self.weights[owner][:, None] * self.plain).norm(dim=1)
        return bool((rest <= self.close + self.little).all())

    def owner(self) -> Tensor | None:
        """The example of each row, -1 for a row without a gradient; None where rows are shared."""
        if not self.speaks:
            return torch.full((len(self.plain),), -1, device=self.weights.device)
        squares = self.plain.square().sum(1)
        ratio = (self.plain * self.weighted).sum(1) / squares.clamp(
            min=torch.finfo(squares.dtype).tiny
        )
        ordered, order = self.weights.sort()
        place = torch.searchsorted((ordered[1:] + ordered[:-1]) / 2, ratio.contiguous())
        rest = (self.weighted - ordered[place][:, None] * self.plain).norm(dim=1)
        known = (rest <= self.close) & (rest <= 0.2 / len(ordered) * self.size) & (self.size > 0)
        if bool((~known & (self.size > self.little)).any()):
            return None
        return torch.where(known, order[place], -1)


def _completed(owner: Tensor, use: Use, layouts: list[Layout], weights: Tensor) -> Tensor:
    """``owner`` with an example for the rows without a gradient too: their inputs count in
    covariances, if for no example's gradient.

    Where the examples are only in another order along some axis, a row is that of its place. Else
    it is counted with the row before it.
    """
    batch, known = len(weights), owner >= 0
    if bool(known.all()) or not bool(known.any()):
        return owner
    for layout in layouts:
        places = owners(layout, use.output_shape, batch, use.channel_axes).to(owner)
        at = torch.full((batch,), -1, device=owner.device)
        at[places[known]] = owner[known]
        found = at[at >= 0]
        if bool((at[places[known]] == owner[known]).all()) and len(found.unique()) == len(found):
            free = torch.ones(batch, dtype=torch.bool, device=owner.device)
            free[found] = False
            at[at < 0] = free.nonzero().squeeze(1)
            return at[places]
    before = torch.where(known, torch.arange(len(owner), device=owner.device), -1)
    before = before.cummax(0).values
    before[before < 0] = int(known.nonzero()[0])
    return owner[before]


def _num_rows(use: Use) -> int:
    axes = {axis % max(1, len(use.output_shape)) for axis in use.channel_axes}
    sizes = [size for axis, size in enumerate(use.output_shape) if axis not in axes]
    return torch.Size(sizes).numel()
