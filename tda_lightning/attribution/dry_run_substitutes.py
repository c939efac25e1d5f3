"""What takes the place of costly or lasting things during a dry run."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tda_lightning.curvature.orthonormal import orthonormal
from tda_lightning.records.errors import NonFiniteError
from tda_lightning.records.score_sinks import MemorySink
from tda_lightning.runtime import clock
from tda_lightning.runtime.memory import PeakMemory

# A decomposition up to this size is done as it is; a larger one is timed once, on a smaller matrix
# where it is larger still.
_SMALL_SIDE, _TIMED_SIDE = 128, 1024
_SMALL_TALL, _TIMED_TALL = 1 << 18, 1 << 23
_SAMPLE_BYTES = 1 << 25  # of curvature written to see how fast the disk is


class Decompositions(TorchFunctionMode):
    """Answers ``torch.linalg.eigh`` and ``qr`` of large matrices, and ``orthonormal``, by stand-ins
    of the right shape.

    Each size is timed once. Eigenvectors of a width beyond 1024 are timed at 1024 and take
    width^3 as long; QR of a tall matrix takes as long as it has rows. What the true call would
    have taken longer than the stand-in gathers in ``owed``.

    The matrix that is timed is random: that of a few batches has a low rank, and LAPACK's divide
    and conquer is a third faster on such a one.
    """

    def __init__(self, memory: PeakMemory) -> None:
        super().__init__()
        self.owed = 0.0
        self._memory = memory
        self._known: dict[tuple[object, ...], float] = {}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if func is torch.linalg.eigh and args[0].shape[-1] > _SMALL_SIDE:
            return self._instead(self._eigh, args[0])
        if func is torch.linalg.qr and args[0].numel() > _SMALL_TALL and not kwargs:
            return self._instead(self._qr, args[0])
        if func is orthonormal and args[0].numel() > _SMALL_TALL:
            return self._instead(self._orthonormal, args[0])
        return func(*args, **(kwargs or {}))

    def _instead(
        self, stand_in: Callable[[Tensor], tuple[float, object]], matrix: Tensor
    ) -> object:
        began = clock.now()
        seconds, answer = stand_in(matrix)
        self.owed += seconds - (clock.now() - began)
        return answer

    def _eigh(self, matrix: Tensor) -> tuple[float, object]:
        width = matrix.shape[-1]
        groups = matrix.numel() // width**2
        side = min(width, _TIMED_SIDE)
        once = self._seconds(torch.linalg.eigh, matrix, side, side, symmetric=True)
        self._memory.also(3 * width**2 * matrix.element_size())  # LAPACK's work space
        axes = torch.eye(width, dtype=matrix.dtype, device=matrix.device)
        vectors = axes.expand_as(matrix).contiguous()
        values = matrix.diagonal(dim1=-2, dim2=-1).clone()
        answer = torch.return_types.linalg_eigh((values, vectors))  # type: ignore[attr-defined]
        return groups * once * (width / side) ** 3, answer

    def _qr(self, matrix: Tensor) -> tuple[float, object]:
        rows, columns = matrix.shape[-2:]
        groups = matrix.numel() // (rows * columns)
        timed = min(rows, max(columns, _TIMED_TALL // columns))
        once = self._seconds(torch.linalg.qr, matrix, timed, columns, symmetric=False)
        self._memory.also(matrix.numel() * matrix.element_size())
        thin = min(rows, columns)
        norms = matrix.norm(dim=-2, keepdim=True).clamp(min=1e-30)
        upper = matrix.new_zeros(*matrix.shape[:-2], thin, columns)
        factors = ((matrix / norms)[..., :thin], upper)
        answer = torch.return_types.linalg_qr(factors)  # type: ignore[attr-defined]
        return groups * once * rows / timed, answer

    def _orthonormal(self, rows: Tensor) -> tuple[float, object]:
        count, columns = rows.shape
        timed = min(columns, max(count, _TIMED_TALL // count))
        once = self._seconds(orthonormal, rows, count, timed, symmetric=False)
        norms = rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
        answer = rows / norms, rows.new_zeros(count, dtype=torch.float64)
        return once * columns / timed, answer

    def _seconds(
        self,
        function: Callable[[Tensor], object],
        like: Tensor,
        rows: int,
        columns: int,
        *,
        symmetric: bool,
    ) -> float:
        """Time of ``function`` on a random matrix [rows, columns] of the type of ``like``."""
        key = (function, rows, columns, like.dtype, like.device)
        if key not in self._known:
            own = torch.Generator(like.device).manual_seed(0)
            place = {"dtype": like.dtype, "device": like.device}
            matrix = torch.randn(rows, columns, generator=own, **place)  # type: ignore[call-overload]
            if symmetric:
                matrix = matrix + matrix.mT
            synchronize(like.device)
            began = clock.now()
            function(matrix)
            synchronize(like.device)
            self._known[key] = clock.now() - began
        return self._known[key]


class ReadOnlyCache(MutableMapping[str, Mapping[str, Tensor]]):
    """What the trajectory keeps of a kind, to read from; it stays as it is."""

    def __init__(self, real: MutableMapping[str, Mapping[str, Tensor]]) -> None:
        self._real = real

    def __getitem__(self, key: str) -> Mapping[str, Tensor]:
        return self._real[key]

    def __setitem__(self, key: str, value: Mapping[str, Tensor]) -> None:
        """Not kept."""

    def __delitem__(self, key: str) -> None:
        """Not deleted."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._real)

    def __len__(self) -> int:
        return len(self._real)


class MeasuredCache(ReadOnlyCache):
    """Measures what is set, and does not keep it.

    Attributes:
        size: bytes that would be kept.
        owed: seconds that writing them would take; some of them are written to a temporary file.
    """

    def __init__(self, real: MutableMapping[str, Mapping[str, Tensor]], on_disk: bool) -> None:
        super().__init__(real)
        self.size, self.owed, self._on_disk = 0, 0.0, on_disk

    def __setitem__(self, key: str, value: Mapping[str, Tensor]) -> None:
        began = clock.now()
        self.size += sum(tensor.nbytes for tensor in value.values())
        seconds = self._writing(key, value) if self._on_disk else 0.0
        self.owed += seconds - (clock.now() - began)

    def _writing(self, key: str, value: Mapping[str, Tensor]) -> float:
        # Files of the store are written as the real ones are, elsewhere.
        from tda_lightning.store.tensor_cache import TensorCache

        sample, left = {}, _SAMPLE_BYTES
        for name, tensor in value.items():
            sample[name] = tensor[: max(1, left // max(1, tensor[:1].nbytes))]
            left = max(0, left - sample[name].nbytes)
        part = sum(tensor.nbytes for tensor in sample.values())
        whole = sum(tensor.nbytes for tensor in value.values())
        with tempfile.TemporaryDirectory() as folder:
            began = clock.now()
            TensorCache(Path(folder))[key] = sample
            return (clock.now() - began) * whole / max(part, 1)

    def __delitem__(self, key: str) -> None:
        raise KeyError(f"A dry run deletes nothing, asked for {key}.")


class DiscardedScores(MemorySink):
    """Takes blocks of scores as the real sink does, all in the same few columns."""

    def add(
        self, segment: int | None, train_indices: Tensor, values: Tensor, first_query: int = 0
    ) -> None:
        # Curvature of a few batches may make a recursion diverge; the time is the same.
        with contextlib.suppress(NonFiniteError):
            columns = torch.arange(min(len(train_indices), self.values.shape[1]))
            super().add(segment, columns, values[:, : len(columns)], first_query)

    def set_by_token(self, values: Tensor) -> None:
        pass

    def set_self_influence(self, values: Tensor) -> None:
        pass

    def set_direct(self, values: Tensor) -> None:
        pass

    def set_candidates(self, candidates: Tensor) -> None:
        pass


def synchronize(device: torch.device) -> None:
    """Wait for what has been handed to an accelerator: the clock must not run ahead of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
