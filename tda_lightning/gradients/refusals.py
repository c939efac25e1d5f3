"""Say why the gradients of single examples do not make up the gradient of their batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from tda_lightning.gradients.functional import Loss
from tda_lightning.records.errors import EngineError
from tda_lightning.tasks import batches
from tda_lightning.tasks.batches import Batch

_REMEDY = (
    " Restrict attribution to other layers (task.layers) or write a task whose losses are separate."
)


def require_fixed_tables(module: nn.Module, trained: Collection[str]) -> None:
    """Refuse tables whose gradient is no sum over examples, before anything is run.

    Raises:
        EngineError: a trained embedding has ``max_norm`` or ``scale_grad_by_freq``.
    """
    tables = {id(module.get_parameter(name)): name for name in trained}
    for part in module.modules():
        if not isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
            continue
        name = tables.get(id(part.weight))
        if name is not None and (part.max_norm is not None or part.scale_grad_by_freq):
            raise EngineError(
                f"Parameter {name}: an embedding with max_norm or scale_grad_by_freq has no "
                "per-example gradient (the first rewrites the table in the forward pass, the "
                "second depends on the whole batch). Train without it, or freeze the embedding."
            )


def why_apart(
    module: nn.Module,
    loss: Loss,
    batch: Batch,
    examples: Tensor,
    plain: Callable[[Tensor], Mapping[str, Tensor]],
) -> str:
    """What can be seen of the cause, in a few sentences, and what to do.

    Args:
        plain: gradients by parameter of the losses times some weights [batch], by plain autograd.
    """
    with torch.no_grad():
        together = loss(module, batch, examples)
        again = loss(module, batch, examples)
        if not torch.allclose(together, again, equal_nan=True):
            return (
                "The losses of the same batch differ from one evaluation to the next: the loss "
                "draws random numbers, or the module changes as it is run. Draw them from the "
                "examples (tasks.seeded_examples) or switch them off."
            )
        for position in sorted({0, len(examples) - 1}):
            index = int(examples[position])
            try:
                single = batches.take(batch, position, len(examples))
                alone = loss(module, single, examples[position : position + 1])
            except Exception as error:  # whatever it is, it is the answer
                return (
                    f"The loss of example {index} alone cannot be computed ({error}). Either "
                    "examples of a batch influence one another (batch statistics, a contrastive "
                    "loss), or the batch cannot be cut into examples." + _REMEDY
                )
            if not torch.allclose(alone[0], together[position], rtol=1e-3, atol=1e-6):
                return (
                    f"The loss of example {index} is {float(together[position]):.6g} in its batch "
                    f"and {float(alone[0]):.6g} alone. Either examples of a batch influence one "
                    "another (batch statistics, a contrastive loss), or the batch cannot be cut "
                    "into examples." + _REMEDY
                )
    ones = torch.ones_like(together)
    once, small = plain(ones), plain(ones / 16)
    for name, gradient in once.items():
        if not torch.allclose(gradient / 16, small[name], rtol=1e-3, atol=1e-6):
            return (
                f"The losses are separate, but the gradient of {name} is not in proportion to the "
                "loss: something in the backward pass changes it (a hook that clips or normalises "
                "gradients, a custom backward). There is no gradient of a single example then; "
                "remove it, or restrict attribution to other layers (task.layers)."
            )
    return (
        "The losses are separate, so something in the backward pass of a batch depends on its "
        "other examples (scale_grad_by_freq, a hook on gradients, a custom backward), or the "
        "losses depend on one another through a part that does not change their values." + _REMEDY
    )
