"""How processes that train or score together talk to each other."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")
P = ParamSpec("P")


def is_distributed() -> bool:
    """Whether this process can talk to the others."""
    return dist.is_available() and dist.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """The rank of this process, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


@dataclass(frozen=True)
class Processes:
    """The processes that train together: how many, and which one this is."""

    count: int = 1
    rank: int = 0

    @staticmethod
    def of(trainer: Any) -> Processes:
        """Those of a Lightning trainer."""
        return Processes(trainer.world_size, trainer.global_rank)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def by_first(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``action`` in the first process; its result, or its error, reaches every process.

        Every process must call this. Before the processes can talk, the others get None.
        """
        if self.count == 1:
            return action(*args, **kwargs)
        if not is_distributed():
            return action(*args, **kwargs) if self.is_first else cast(T, None)
        outcome: list[Any] = [None, None]
        caught: Exception | None = None
        if self.is_first:
            try:
                outcome[0] = action(*args, **kwargs)
            except Exception as error:
                caught, outcome[1] = error, _portable(error)
        dist.broadcast_object_list(outcome, src=0)
        if caught is not None:
            raise caught
        if outcome[1] is not None:
            raise outcome[1]
        return cast(T, outcome[0])


def from_all(value: T) -> list[T]:
    """The ``value`` of every process, by rank. Every process must call this."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def summed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over the processes, in every process; the tensors themselves in a single one.

    Every process must call this, with the same names and shapes.

    Raises:
        ValueError: in every process, when names, shapes or types differ.
    """
    if not is_distributed() or dist.get_world_size() == 1:
        return dict(tensors)
    kinds = from_all(sorted((name, tuple(t.shape), str(t.dtype)) for name, t in tensors.items()))
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            odd = sorted({entry[0] for entry in set(kind) ^ set(kinds[0])})
            raise ValueError(
                f"Processes 0 and {rank} hold tensors of other names, shapes or types: "
                f"{', '.join(odd)}. Expected the same in every process to sum them."
            )
    totals = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        total = tensor.detach().to(meeting_device(), copy=True).contiguous()
        dist.all_reduce(total)
        totals[name] = total.to(tensor.device)
    return {name: totals[name] for name in tensors}


def meeting_device() -> torch.device:
    """Where the default process group exchanges tensors."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _portable(error: Exception) -> Exception:
    """The error as other processes can raise it."""
    try:
        return cast(Exception, pickle.loads(pickle.dumps(error)))
    except Exception:
        return RuntimeError(f"{type(error).__name__} in process 0: {error}")
