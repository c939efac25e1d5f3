"""What edits of a graph change in the gradient of a replayed step, as the adjoints meet it.

The subgraphs of ``session/edited_graphs.py`` would draw other dropout than the run did. So each
edit is looked at in the whole graph, with the draws of its step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tda_lightning.edits import GraphEditSet
from tda_lightning.records.errors import NonFiniteError
from tda_lightning.replay.run import Draws, Replay
from tda_lightning.runtime.graph_caches import without_caches
from tda_lightning.runtime.random_states import unchanged_randomness
from tda_lightning.tasks import AttributionTask, NodeBatch, restarted_by, seeded_examples


def edit_products(
    edits: GraphEditSet,
    replay: Replay,
    task: AttributionTask,
    batch: NodeBatch,
    examples: Tensor,
    draws: Draws | None,
    u: Mapping[str, Tensor],
) -> Tensor:
    """<gradient of the summed losses before each edit minus after it, u>, [query, edit], with the
    share of an example in the batch's loss.

    Args:
        u: [query, *shape] by parameter.
    """
    parameters = [replay.module.get_parameter(name) for name in u]
    rows = torch.cat([directions.flatten(1) for directions in u.values()], 1)

    def gradient(graph: object, kept: Tensor) -> Tensor:
        again = None if draws is None else draws.forward.restore
        if again is not None:
            again()
        changed = NodeBatch(graph, batch.nodes[kept], batch.mask)
        noise = seeded_examples(0, examples[kept], own_noise=False)
        with torch.enable_grad(), noise, restarted_by(again):
            total = task.train_loss(replay.module, changed).sum()
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        return torch.cat(
            [
                (torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g).flatten()
                for p, g in zip(parameters, found, strict=True)
            ]
        )

    every = torch.ones(len(examples), dtype=torch.bool, device=batch.nodes.device)
    columns = []
    with unchanged_randomness(), without_caches(replay.module):
        before = gradient(batch.graph, every)
        for column, edit in enumerate(edits.edits):
            removed = edit.removed().to(batch.nodes.device)
            left = ~torch.isin(batch.nodes, removed)
            after = torch.zeros_like(before)
            if bool(left.any()):
                after = gradient(edit.applied(batch.graph), left)
            if not bool(after.isfinite().all()):
                raise NonFiniteError(
                    f"Edit {column}, {type(edit).__name__} {edit.record()}, makes a training loss "
                    "that is not finite: probably of an isolated node, which a layer without "
                    "self-loops cannot have."
                )
            columns.append(rows @ (before - after).to(rows))
    return torch.stack(columns, 1) * task.share(len(examples))
