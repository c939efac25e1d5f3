"""Rows of numbers as few bytes: int4, int8 or float16, with a scale for each row."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tda_lightning.store.index_files import DTYPES, columns_of, scale_dtype

_LARGEST = {"int4": 7, "int8": 127, "float16": 1}
# Of int4 the largest numbers are cut where that makes the others precise: so many roots of a row's
# mean square are tried. Of normal numbers 2.5 is best.
_CUTS = (1.8, 2.2, 2.6, 3.2, 4.0, 5.0, 7.0)
_TRIED, _RUNS = 256, 32  # numbers of a row that cuts are tried on, at most, and their runs
_NEAR = 256  # rows that are rounded together


def largest_code(dtype: str) -> float | None:
    """No code of a row is larger than that; None: of this type they are numbers of any size."""
    return _LARGEST.get(dtype)


def width_of(bytes_per_example: int, dtype: str) -> int:
    """How many numbers a row of so many bytes holds, beside its scale.

    Raises:
        ValueError: none.

    Example:
        >>> width_of(1024, "int8"), width_of(1024, "int4")
        (1020, 2040)
    """
    room = bytes_per_example - np.dtype(scale_dtype(dtype)).itemsize
    width = room // np.dtype(DTYPES[dtype]).itemsize * (2 if dtype == "int4" else 1)
    if width < 1:
        raise ValueError(
            f"bytes_per_example={bytes_per_example} leaves no room for a number in {dtype} beside "
            "its row's scale: expected at least 16."
        )
    return width


def bytes_of(width: int, dtype: str) -> int:
    """Bytes of a row of so many numbers, with its scale."""
    numbers = columns_of(width, dtype) * np.dtype(DTYPES[dtype]).itemsize
    return numbers + np.dtype(scale_dtype(dtype)).itemsize


def rounded(rows: Tensor, dtype: str) -> tuple[NDArray[np.generic], NDArray[np.floating]]:
    """Rows [row, width] as (codes of ``dtype`` [row, column], scales [row]): a row is about scale
    times its codes."""
    values = rows.detach().cpu()
    if dtype in ("float32", "float64"):
        return values.numpy().astype(dtype), np.ones(len(values), scale_dtype(dtype))
    # Few at a time: they are gone through several times, and stay in the processor's cache.
    parts = [_rounded(part, dtype) for part in values.split(_NEAR)]
    return torch.cat([own[0] for own in parts]).numpy(), torch.cat(
        [own[1] for own in parts]
    ).numpy()


def _rounded(values: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    limits = _int4_limits(values) if dtype == "int4" else _largest_of(values)
    scales = (limits / _LARGEST[dtype]).float()  # of float64 it may be zero only then
    scales = torch.where(scales > 0, scales, 1.0)
    quotients = values / scales[:, None]
    if dtype == "float16":
        return quotients.half(), scales
    integers = quotients.round_().clamp_(-_LARGEST[dtype], _LARGEST[dtype]).to(torch.int8)
    return _packed(integers) if dtype == "int4" else integers, scales


def _largest_of(values: Tensor) -> Tensor:
    """The largest number of each row, whatever its sign."""
    return torch.maximum(values.amax(1), -values.amin(1))


def numbers_of(codes: NDArray[np.generic], dtype: str, width: int) -> Tensor:
    """Codes as numbers that can be multiplied, [row, width]: float32, or float64 for those in
    float64."""
    out = torch.empty(len(codes), codes_width(width, dtype), dtype=number_dtype(dtype))
    return widened(codes, dtype, width, out)


def widened(codes: NDArray[np.generic], dtype: str, width: int, out: Tensor) -> Tensor:
    """:func:`numbers_of` in the memory of ``out`` [at least as many rows, codes_width]: memory that
    is taken anew costs more than the numbers."""
    tensor, numbers = torch.from_numpy(codes), out[: len(codes)]
    if dtype == "int4":
        half = codes.shape[1]
        numbers[:, half:].copy_(upper := tensor >> 4)
        numbers[:, :half].copy_(
            torch.bitwise_left_shift(tensor, 4, out=upper).bitwise_right_shift_(4)
        )
    else:
        numbers.copy_(tensor)
    return numbers[:, :width]


def codes_width(width: int, dtype: str) -> int:
    """Numbers that the codes of a row of so many hold: one more where they lie in pairs."""
    return width + width % 2 if dtype == "int4" else width


def number_dtype(dtype: str) -> torch.dtype:
    """Of codes that were made numbers."""
    return torch.float64 if dtype == "float64" else torch.float32


def _packed(integers: Tensor) -> Tensor:
    """Two numbers a byte: those of the first half in the lower bits, those of the second in the
    upper ones, so that both halves are unpacked in one piece."""
    half = columns_of(integers.shape[1], "int4")
    lower, upper = integers[:, :half] & 15, integers[:, half:] << 4
    return lower | torch.nn.functional.pad(upper, (0, half - upper.shape[1]))


def _int4_limits(values: Tensor) -> Tensor:
    """Where each row's numbers are cut, so that what rounding and cutting lose together is
    least."""
    rows, width = values, values.shape[1]
    if width > _TRIED:
        values = values.index_select(1, _drawn(width))
    limits, largest, size = _best_cuts(values), _largest_of(rows), rows.norm(dim=1)
    # Where few numbers are not zero, all of these cuts are too low, and the sample may miss them.
    if len(peaked := (largest * width**0.5 > _CUTS[-1] * size).nonzero()[:, 0]):
        tried = torch.stack([limits[peaked], largest[peaked]])
        lost = torch.stack([_lost(rows.index_select(0, peaked), own) for own in tried])
        limits[peaked] = tried.gather(0, lost.argmin(0)[None])[0]
    return limits


@lru_cache(64)
def _drawn(width: int) -> Tensor:
    """The numbers that cuts are tried on: short runs all over a row, of whose stretches each holds
    numbers of another size. Drawn: those at equal distances could be of one kind."""
    length, generator = _TRIED // _RUNS, torch.Generator().manual_seed(0)
    room = width / _RUNS - length
    starts = torch.arange(_RUNS) * width / _RUNS + torch.rand(_RUNS, generator=generator) * room
    return (starts.long()[:, None] + torch.arange(length)).flatten()


def _lost(values: Tensor, limits: Tensor) -> Tensor:
    """What rounding and cutting lose together of each row."""
    steps = (limits / _LARGEST["int4"])[:, None]
    steps = torch.where(steps > 0, steps, 1.0)
    codes = (values / steps).round_().clamp_(-_LARGEST["int4"], _LARGEST["int4"])
    return (codes * steps - values).square().sum(1)


def _best_cuts(values: Tensor) -> Tensor:
    size = values.square().mean(1, keepdim=True).sqrt()
    relative = values.abs().div_(torch.where(size > 0, size, 1.0))
    kept, lost = torch.empty_like(relative), []
    for cut in _CUTS:
        step = cut / _LARGEST["int4"]
        torch.mul(relative, 1 / step, out=kept).round_().clamp_(max=_LARGEST["int4"])
        lost.append(torch.sub(relative, kept, alpha=step, out=kept).norm(dim=1))
    best = torch.stack(lost).argmin(0)
    return size[:, 0] * torch.tensor(_CUTS).to(size)[best]
