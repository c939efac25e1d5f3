"""The module that a member of an ensemble is seen through: with a fixed dropout mask, or adapters.

What it takes is in the trajectory's facts. A trajectory of the run itself needs nothing.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tda_lightning.records.errors import (
    TrajectoryFormatError,
    TrajectoryMismatchError,
    UnsupportedTrainingError,
)
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.digests import digest

# Settings that say how a member is seen.
DROPOUT, ADAPTERS = "dropout_mask", "adapters"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (nn.Linear, *_CONVOLUTIONS)
_DROPOUTS = nn.modules.dropout._DropoutNd
_BY_CHANNEL = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout)


def member_module(module: nn.Module, trajectory: Trajectory) -> nn.Module:
    """The module itself, or a copy of it as the member that ``trajectory`` records is seen.

    Raises:
        TrajectoryMismatchError: the module has not the parts that the member needs.
        TrajectoryFormatError: what the facts say of it is damaged.
        ImportError: it has adapters, and peft is not installed.
    """
    settings = trajectory.facts.settings
    mask: Any = settings.get(DROPOUT)
    adapters: Any = settings.get(ADAPTERS)
    try:
        if mask is not None:
            sites, rate, seed = [str(site) for site in mask["sites"]], mask["rate"], mask["seed"]
            if not (type(seed) is int and 0 < rate < 1):
                raise ValueError(f"rate {rate} and seed {seed}")
        if adapters is not None:
            layers, rank = [str(layer) for layer in adapters["layers"]], adapters["rank"]
            if type(rank) is not int or rank < 1:
                raise ValueError(f"rank {rank}")
    except (LookupError, TypeError, ValueError) as error:
        raise TrajectoryFormatError(
            f"The facts of {trajectory.path or 'the trajectory'} are damaged: expected how a "
            f"member of an ensemble was made, got {str(mask or adapters)[:100]}. Make the ensemble "
            "again."
        ) from error
    if mask is not None:
        return masked(module, sites, rate, seed)
    return module if adapters is None else adapted(module, rank, layers)[0]


def dropout_sites(module: nn.Module) -> list[str]:
    """Where masks are put: behind every dropout module; in a model without any, in front of every
    linear layer and convolution but the first, where the hidden units are read."""
    parts = list(module.named_modules())
    if found := [name for name, part in parts if isinstance(part, _DROPOUTS)]:
        return found
    return [name for name, part in parts if isinstance(part, _LAYERS) or _is_conv1d(part)][1:]


def _is_conv1d(part: nn.Module) -> bool:
    """The linear layer of GPT-2 in transformers, which need not be installed."""
    kind = type(part)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def masked(module: nn.Module, sites: Sequence[str], rate: float, seed: int) -> nn.Module:
    """A copy of the module under one dropout mask.

    The mask is the same for all examples and at all positions: one number for each unit (the last
    axis) or channel, 0 with probability ``rate`` and otherwise 1 / (1 - rate). It is on in eval
    mode, where gradients and measurements are taken, and off in a training that is replayed.

    Args:
        sites: names of the parts of the module that have a mask.
        seed: the mask's own.

    Raises:
        TrajectoryMismatchError: a part is missing.
    """
    root = _copied(module)
    parts = dict(root.named_modules())
    if missing := [name for name in sites if name not in parts]:
        raise TrajectoryMismatchError(
            f"The module has no {', '.join(missing[:5])}, where the ensemble's dropout masks are. "
            "Build the module as it was trained."
        )
    masks = Masks(root, rate, seed)
    for name in sites:
        masks.put(name, parts[name])
    object.__setattr__(root, "_dropout_masks", masks)  # no submodule, and not in state_dict
    return root


def require_masked(module: nn.Module) -> None:
    """Refuse a module whose masks its forward pass does not reach: members would be alike.

    Raises:
        UnsupportedTrainingError: names them.
    """
    masks: Masks | None = module.__dict__.get("_dropout_masks")
    if masks is None:
        return
    if unreached := sorted(masks.sites - masks.drawn.keys()):
        raise UnsupportedTrainingError(
            f"The forward pass does not go through {', '.join(unreached[:5])}, where the ensemble "
            "has dropout masks, so they would drop nothing. Make the ensemble with other layers."
        )


def require_peft() -> None:
    """Raise an ImportError that says what to install, where peft is missing."""
    if find_spec("peft") is None:
        raise ImportError(
            "Low-rank adapters need peft, which is not installed: pip install "
            "'tda-lightning[lora]'."
        )


def adapted(
    module: nn.Module, rank: int, layers: Sequence[str] | None = None
) -> tuple[nn.Module, list[str]]:
    """A copy of the module with low-rank adapters, alone to be trained: a layer of weight W has
    W + B A. And the names of the layers that have them.

    Args:
        rank: of the adapters.
        layers: which layers have them; None: every linear layer and convolution.

    Raises:
        ImportError: peft is not installed.
        TrajectoryMismatchError: a layer is missing, or there is none.
    """
    require_peft()
    import peft

    root = _copied(module)
    # Parts of other classes may never call the layer, but read its weight.
    found = [
        name
        for name, part in root.named_modules()
        if name and (type(part) in _LAYERS or _is_conv1d(part))
    ]
    chosen = found if layers is None else list(layers)
    missing = sorted(set(chosen) - set(found))
    if missing or not chosen:
        raise TrajectoryMismatchError(
            f"The module has no {', '.join(missing[:5]) or 'layer'} to put an adapter into: "
            f"expected linear layers or convolutions, got {', '.join(found[:5]) or 'none'}. Build "
            "the module as it was trained."
        )
    named = "|".join(map(re.escape, chosen))
    # lora_alpha / r is the factor of B A.
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=f"({named})")
    with warnings.catch_warnings():  # peft sees by itself which way round a weight is stored
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        return peft.inject_adapter_in_model(config, root), chosen


class Masks:
    """Fixed dropout masks of one copy of a module, each drawn when its place is first reached."""

    def __init__(self, root: nn.Module, rate: float, seed: int) -> None:
        self.root, self.rate, self.seed = root, rate, seed
        self.sites: set[str] = set()
        self.drawn: dict[str, Tensor] = {}

    def put(self, name: str, part: nn.Module) -> None:
        """Put a mask behind a dropout module, or in front of another layer."""
        self.sites.add(name)
        if isinstance(part, _DROPOUTS):

            def behind(_: nn.Module, given: object, output: Tensor) -> Tensor:
                return self.applied(name, output, _unit_axis(part, output))

            part.register_forward_hook(behind)
            return

        def before(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            inputs, *rest = given
            return (self.applied(name, inputs, _unit_axis(part, inputs)), *rest)

        part.register_forward_pre_hook(before)

    def applied(self, name: str, values: Tensor, axis: int) -> Tensor:
        """``values`` with the mask of a place along ``axis``, in eval mode."""
        if self.root.training:
            return values
        size = values.shape[axis]
        if name not in self.drawn:
            self.drawn[name] = drawn_mask(name, size, self.rate, self.seed)
        shape = [1] * values.dim()
        shape[axis] = size
        return values * self.drawn[name].reshape(shape).to(values)


def drawn_mask(name: str, size: int, rate: float, seed: int) -> Tensor:
    """The mask of a place, float64 [size]: the same on every machine."""
    own = bytes.fromhex(digest([seed, name]))
    # Not by torch: what it draws within a loss is taken for the noise of the examples.
    drawn = np.random.Generator(np.random.PCG64(int.from_bytes(own[:8], "little"))).random(size)
    return torch.from_numpy(drawn >= rate).double() / (1 - rate)


def _unit_axis(part: nn.Module, values: Tensor) -> int:
    """The axis of units or channels. Pictures and the like have channels in front of their
    positions."""
    if isinstance(part, _CONVOLUTIONS):
        return -1 - len(part.kernel_size)  # type: ignore[arg-type]
    if isinstance(part, nn.Linear):
        return -1
    behind = isinstance(part, _BY_CHANNEL) or values.dim() > 3
    return 1 if behind and values.dim() > 1 else -1


def _copied(module: nn.Module) -> nn.Module:
    """A copy with weights of its own. A trainer that the module was fitted by stays behind."""
    left: Mapping[int, Any] = {
        id(value): None
        for name, value in module.__dict__.items()
        if name in ("_trainer", "_fabric") and value is not None
    }
    return copy.deepcopy(module, dict(left))
