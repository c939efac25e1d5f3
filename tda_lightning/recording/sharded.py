"""Whole tensors of a module whose parameters are spread over processes.

Two layouts, both of plain torch. ``FullyShardedDataParallel(use_orig_params=True)`` leaves in each
process a flat piece of every parameter, possibly empty; the pieces in order of rank make the
whole, and gradients and optimizer state are cut in the same places. ``fully_shard`` makes
parameters, gradients and state DTensors, which can be asked for the whole. With replicas of shards
(``HYBRID_SHARD``) the first ranks hold the first replica.

Tensors are gathered one at a time, in the first process's CPU memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.trajectory import Checkpoint
from tda_lightning.runtime.compiled import plain_parameters
from tda_lightning.runtime.processes import from_all, meeting_device, rank_and_world


def require_whole(shards: Shards | None, what: str) -> None:
    """Check that every process holds the whole parameters, which ``what`` needs.

    Raises:
        UnsupportedTrainingError: they are spread over processes.
    """
    if shards is not None:
        raise UnsupportedTrainingError(
            f"The strategy spreads the parameters over processes, and {what} can then not be "
            "recorded. Do without it, or train with strategy='ddp'."
        )


@dataclass(frozen=True)
class Shards:
    """How the parameters of a module are spread over processes, by their plain names."""

    shapes: Mapping[str, torch.Size]  # of the whole parameters
    sizes: Mapping[str, tuple[int, ...]]  # elements in every process, by rank

    @staticmethod
    def of(module: nn.Module) -> Shards | None:
        """How ``module``, wrapped for training, is spread; None when it is whole everywhere.

        Every process must come here.

        Raises:
            UnsupportedTrainingError: FSDP has joined parameters into ones without a name.
        """
        parameters = plain_parameters(module)
        flat = _units(module)
        if not flat and not any(_is_distributed(p) for p in parameters.values()):
            return None
        if any(name.endswith("_flat_param") for name in parameters):
            raise UnsupportedTrainingError(
                "FullyShardedDataParallel(use_orig_params=False) joins parameters into flat ones, "
                "expected the module's own. Use use_orig_params=True, which is Lightning's default."
            )
        shapes = {name: p.shape for name, p in parameters.items()} | _whole_shapes(flat, parameters)
        everywhere = from_all({name: _piece(p).numel() for name, p in parameters.items()})
        sizes = {name: tuple(each[name] for each in everywhere) for name in parameters}
        return Shards(shapes, sizes)

    def gradient_norm(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """This process's share of the gradient's norm: the squares of all shares sum to its
        square, whatever is replicated. float32 or better, []."""
        total = torch.zeros((), device=next(iter(parameters.values())).device)
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                replicas = sum(self.sizes[name]) / self.shapes[name].numel()
                piece = _piece(parameter.grad.detach())
                wide = torch.promote_types(piece.dtype, torch.float32)
                norm = torch.linalg.vector_norm(piece, dtype=wide).to(total.device)
                total = total + norm.square() / replicas
        return total.sqrt()

    def checkpoint(self, pieces: Checkpoint) -> Checkpoint:
        """In the first process ``pieces`` made whole; elsewhere something that is not written.

        Every process must come here.
        """
        states = pieces.optimizer
        return replace(
            pieces,
            parameters=self._whole_of(pieces.parameters),
            buffers=self._whole_of(pieces.buffers),
            optimizer=None if states is None else self._whole_states(states),
        )

    def _whole_of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: self._whole(name, tensor, tensor.dtype)
            if name in self.sizes or _is_distributed(tensor)
            else tensor  # a buffer, which every process has
            for name, tensor in tensors.items()
        }

    def _whole_states(
        self, states: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """Optimizer states by parameter. A process whose piece is empty has none."""
        own = {
            name: {k: (v.dtype, _scalar(v), _piece(v).numel()) for k, v in state.items()}
            for name, state in states.items()
        }
        everywhere = from_all(own)
        whole: dict[str, dict[str, Tensor]] = {}
        for name, state in states.items():
            kinds: dict[str, tuple[torch.dtype, Tensor | None]] = {}
            for rank, (each, expected) in enumerate(zip(everywhere, self.sizes[name], strict=True)):
                for key, (dtype, scalar, size) in each[name].items():
                    kinds.setdefault(key, (dtype, scalar))
                    if scalar is None and size != expected:
                        raise UnsupportedTrainingError(
                            f"The optimizer keeps {key!r} of {name} in {size} elements, expected "
                            f"one number or as many as the parameter has in process {rank}, "
                            f"{expected}: it cannot be gathered. Pass save_optimizer=False."
                        )
            whole[name] = {}
            for key, (dtype, scalar) in sorted(kinds.items()):
                if scalar is None:
                    scalar = self._whole(name, state.get(key, torch.zeros(0)), dtype)
                whole[name][key] = scalar
        return whole

    def _whole(self, name: str, tensor: Any, dtype: torch.dtype) -> Tensor:
        """The whole of what is cut like parameter ``name``; an empty tensor but in the first."""
        if _is_distributed(tensor):
            full: Tensor = tensor.detach().full_tensor()
            return full.cpu() if _is_first() else full.new_empty(0)
        sizes, shape = self.sizes[name], self.shapes[name]
        if sizes[0] == shape.numel():
            return tensor.detach().reshape(shape) if _is_first() else tensor.new_empty(0)
        # Collectives want equal sizes: every piece is filled up to the longest.
        mine = torch.zeros(max(sizes), dtype=dtype, device=meeting_device())
        mine[: tensor.numel()] = tensor.detach().reshape(-1)
        parts = [torch.empty_like(mine) for _ in sizes] if _is_first() else None
        dist.gather(mine, parts, dst=0)
        if parts is None:
            return mine.new_empty(0)
        pieces = [part[:size].cpu() for part, size in zip(parts, sizes, strict=True)]
        return torch.cat(pieces)[: shape.numel()].reshape(shape)


def _units(module: nn.Module) -> list[Any]:
    """The FullyShardedDataParallel modules in ``module``, itself included."""
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel

    return [part for part in module.modules() if isinstance(part, FullyShardedDataParallel)]


def _whole_shapes(units: list[Any], parameters: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Shapes of what FSDP has cut, made whole one unit at a time to spare memory."""
    names = {id(p): name for name, p in parameters.items()}
    shapes = {}
    for unit in units:
        inner = {id(p) for other in _units(unit) if other is not unit for p in other.parameters()}
        with unit.summon_full_params(unit, recurse=False, writeback=False):
            for parameter in unit.parameters():
                if id(parameter) not in inner:
                    shapes[names[id(parameter)]] = parameter.shape
    return shapes


def _is_distributed(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, wherever this torch keeps the class


def _piece(tensor: Any) -> Tensor:
    return tensor.to_local() if _is_distributed(tensor) else tensor


def _scalar(value: Any) -> Tensor | None:
    """A state that is one number, such as Adam's step: the same in every process."""
    if value.dim():
        return None
    whole: Tensor = value.full_tensor() if _is_distributed(value) else value
    return whole.detach().cpu()


def _is_first() -> bool:
    return rank_and_world()[0] == 0
