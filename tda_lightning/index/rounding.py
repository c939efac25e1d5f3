"""Rows of numbers as few bytes: int4, int8 or float16, with a scale for each row."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tda_lightning.store.index_files import DTYPES, columns_of, scale_dtype

_LARGEST = {"int4": 7, "int8": 127, "float16": 1}
# Of int4 the largest numbers are cut where that makes the others precise: so many roots of a row's
# mean square are tried. Of normal numbers 2.5 is best.
_CUTS = (1.8, 2.2, 2.6, 3.2, 4.0, 5.0, 7.0)
_INT4_OFFSET = 8


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
    values = rows.detach().cpu().double().numpy()
    if dtype in ("float32", "float64"):
        return values.astype(dtype), np.ones(len(values), scale_dtype(dtype))
    limits = _int4_limits(values) if dtype == "int4" else np.abs(values).max(1, initial=0.0)
    scales = limits / _LARGEST[dtype]
    scales = np.where(scales > 0, scales, 1.0).astype(scale_dtype(dtype))
    quotients = values / scales[:, None]
    if dtype == "float16":
        return quotients.astype(np.float16), scales
    integers = np.rint(quotients).clip(-_LARGEST[dtype], _LARGEST[dtype]).astype(np.int8)
    return (_packed(integers) if dtype == "int4" else integers), scales


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
        numbers[:, ::2].copy_(tensor & 15)
        numbers[:, 1::2].copy_(tensor >> 4)
        numbers -= _INT4_OFFSET
    else:
        numbers.copy_(tensor)
    return numbers[:, :width]


def codes_width(width: int, dtype: str) -> int:
    """Numbers that the codes of a row of so many hold: one more where they lie in pairs."""
    return width + width % 2 if dtype == "int4" else width


def number_dtype(dtype: str) -> torch.dtype:
    """Of codes that were made numbers."""
    return torch.float64 if dtype == "float64" else torch.float32


def _packed(integers: NDArray[np.int8]) -> NDArray[np.uint8]:
    shifted = (integers + _INT4_OFFSET).astype(np.uint8)
    if shifted.shape[1] % 2:
        shifted = np.pad(shifted, ((0, 0), (0, 1)), constant_values=_INT4_OFFSET)
    return (shifted[:, ::2] | shifted[:, 1::2] << 4).astype(np.uint8)


def _int4_limits(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where each row's numbers are cut, so that what rounding and cutting lose together is
    least."""
    size = np.sqrt(np.square(values).mean(1))
    best, least = np.zeros(len(values)), np.full(len(values), np.inf)
    for cut in _CUTS:
        step = np.where(size > 0, cut * size / _LARGEST["int4"], 1.0)
        kept = np.rint(values / step[:, None]).clip(-_LARGEST["int4"], _LARGEST["int4"])
        lost = np.square(kept * step[:, None] - values).sum(1)
        better = lost < least
        best, least = np.where(better, cut * size, best), np.where(better, lost, least)
    return best
