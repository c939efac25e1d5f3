"""Which parameters losses depend on in other ways than by the calls that were noted.

A penalty on the weights uses a layer's weight once more, and belongs to no example: the graph of
the losses does not lead through it, and the layer keeps its fast form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tda_lightning.gradients.uses import Use


def used_otherwise(
    names: Iterable[str], losses: Tensor, parameters: Mapping[int, str], uses: Iterable[Use]
) -> set[str]:
    """Those of ``names`` that the graph of the losses uses more often than ``uses`` say.

    Args:
        names: parameters that were used in some way without a native form.
        losses: [batch], with their graph.
        parameters: names by ``id``.
        uses: whose gradients of the losses have arrived.
    """
    candidates = set(names)
    if not candidates or losses.grad_fn is None:
        return candidates
    edges: Counter[str] = Counter()
    pending, seen = [losses.grad_fn], {losses.grad_fn}
    while pending:
        node = pending.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return candidates  # what is inside it is hidden
        for following, _ in node.next_functions:
            if following is None:
                continue
            leaf = getattr(following, "variable", None)
            if leaf is not None:
                edges[parameters.get(id(leaf), "")] += 1
            elif following not in seen:
                seen.add(following)
                pending.append(following)
    noted = Counter(ref.name for use in uses if use.gradient is not None for ref in use.refs)
    return {name for name in candidates if edges[name] > noted[name]}
