"""The frozen base under an adapter: a trajectory names it by digests and does not hold it.

What no optimizer trains is the same in every checkpoint, and of a fine-tuned model it is nearly
everything. Whoever attributes has the base anyway, and is told if it is another one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.trajectory import Checkpoint
from tda_lightning.runtime.compiled import plain_parameters
from tda_lightning.runtime.digests import digest

# Buffers of these types hold the weights of quantised layers.
_QUANTISED = {torch.int8, torch.uint8} | {
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
}


def frozen_names(module: nn.Module, trained: Collection[str]) -> set[str]:
    """Names of the parameters that stay as they are: not trained, and not rewritten by a layer's
    own forward pass, as ``max_norm`` rewrites a table."""
    rewritten = {
        id(parameter)
        for part in module.modules()
        if getattr(part, "max_norm", None) is not None
        for parameter in part.parameters(recurse=False)
    }
    return {
        name
        for name, parameter in plain_parameters(module).items()
        if name not in trained and id(parameter) not in rewritten
    }


def base_digests(initial: Checkpoint, frozen: Collection[str]) -> dict[str, str]:
    """Digests of the base by name; empty where what is frozen is smaller than what is trained, and
    is recorded.

    Args:
        initial: the checkpoint of the initial weights, with all tensors of the module.
        frozen: names of the parameters that are not trained.
    """
    base = base_of(initial.parameters, initial.buffers, frozen)
    return {name: digest(tensor.detach()) for name, tensor in base.items()}


def base_of(
    trained: Mapping[str, Tensor], others: Mapping[str, Tensor], frozen: Collection[str]
) -> dict[str, Tensor]:
    """The base among the tensors that are not trained; nothing where it is smaller than what is
    trained."""
    base = {
        name: tensor
        for name, tensor in others.items()
        if name in frozen or (tensor.dtype in _QUANTISED and tensor.dim() > 0)
    }
    return base if _count(base) > _count(trained) else {}


def without_base(checkpoint: Checkpoint, base: Collection[str]) -> Checkpoint:
    """The checkpoint without the tensors of the base."""
    kept = {name: tensor for name, tensor in checkpoint.buffers.items() if name not in base}
    return replace(checkpoint, buffers=kept)


def require_unquantised(parameters: Mapping[str, Tensor]) -> None:
    """Refuse to record the training of quantised weights.

    Raises:
        UnsupportedTrainingError: a trained parameter is quantised.
    """
    for name, parameter in parameters.items():
        if parameter.dtype in _QUANTISED or getattr(parameter, "quant_state", None) is not None:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UnsupportedTrainingError(
                f"Parameter {name} is quantised ({type(parameter).__name__}, {dtype}) and is "
                "trained; expected trained parameters of 16 bits or more, whose steps have a "
                "derivative. Freeze it (requires_grad_(False)) and train an adapter on top."
            )


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
