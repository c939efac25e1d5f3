"""Find out where the examples of a batch are in every layer's output.

Guessing from shapes goes wrong as soon as two sizes agree, so the layout is observed: the gradient
of one example's loss is non-zero only where that example is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tda_lightning.gradients.capture import Capture
from tda_lightning.gradients.layout import Layout, candidates, consistent


class ExampleAxes:
    """Sets the layout of every use of a batch, and remembers the layouts that are certain."""

    def __init__(self) -> None:
        self._certain: dict[tuple[object, ...], set[Layout]] = {}

    def locate(self, capture: Capture, losses: Tensor, batch: int) -> set[str]:
        """Set the layout of every use.

        Args:
            capture: of the forward pass that gave the losses.
            losses: [batch], with their graph.
            batch: number of examples.

        Returns:
            Names of the parameters whose uses have no layout.
        """
        uses = capture.uses
        open_choices: dict[int, list[Layout]] = {}
        for position, use in enumerate(uses):
            layouts = candidates(use.output_shape, batch, use.channel_axes)
            certain = self._certain.get(use.key, set()) if batch > 1 else set()
            remembered = [layout for layout in layouts if layout in certain]
            if len(remembered) == 1:
                use.layout = remembered[0]
            else:
                open_choices[position] = layouts
        if batch > 1 and open_choices:
            _strike_out(capture, open_choices, losses, batch)
        without: set[str] = set()
        for position, layouts in open_choices.items():
            use = uses[position]
            if not layouts:
                without.update(ref.name for ref in use.refs)
                continue
            # Where several are left, all give the same gradients for this batch.
            use.layout = layouts[0]
            if batch > 1 and len(layouts) == 1:
                self._certain.setdefault(use.key, set()).add(layouts[0])
        return without


def _strike_out(
    capture: Capture, choices: dict[int, list[Layout]], losses: Tensor, batch: int
) -> None:
    """Remove the layouts that single examples' gradients contradict.

    Two examples with a gradient decide, unless they leave a choice.
    """
    uses = capture.uses
    with torch.enable_grad():
        capture.backward([losses.sum()])
    probes = {position: 0 for position in choices if _is_nonzero(uses[position].gradient)}
    for example in (batch - 1, *range(batch - 1)):
        undecided = [p for p, count in probes.items() if count < 2 or len(choices[p]) > 1]
        if not undecided:
            return
        with torch.enable_grad():
            capture.backward([losses[example]])
        for position in undecided:
            gradient = uses[position].gradient
            if gradient is not None and _is_nonzero(gradient):
                probes[position] += 1
                choices[position] = [
                    layout
                    for layout in choices[position]
                    if consistent(layout, gradient, example, batch)
                ]


def _is_nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())
