"""Rows of numbers as few bytes: int8 or float16, with a scale for each row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tda_lightning.store.index_files import scale_dtype

_LARGEST = 127


def width_of(bytes_per_example: int, dtype: str) -> int:
    """How many numbers a row of so many bytes holds, beside its scale.

    Raises:
        ValueError: none.
    """
    width = (bytes_per_example - np.dtype(scale_dtype(dtype)).itemsize) // np.dtype(dtype).itemsize
    if width < 1:
        raise ValueError(
            f"bytes_per_example={bytes_per_example} leaves no room for a number in {dtype} beside "
            "its row's scale: expected at least 16."
        )
    return width


def bytes_of(width: int, dtype: str) -> int:
    """Bytes of a row of so many numbers, with its scale."""
    return width * np.dtype(dtype).itemsize + np.dtype(scale_dtype(dtype)).itemsize


def rounded(rows: Tensor, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows [row, width] as (codes of ``dtype``, scales [row]): a row is about scale * codes."""
    values = rows.detach().cpu().double().numpy()
    if dtype in ("float32", "float64"):
        return values.astype(dtype), np.ones(len(values), scale_dtype(dtype))
    largest = np.abs(values).max(1, initial=0.0)
    scales = largest / (_LARGEST if dtype == "int8" else 1)
    scales = np.where(scales > 0, scales, 1.0).astype(scale_dtype(dtype))
    quotients = values / scales[:, None]
    if dtype == "int8":
        return np.rint(quotients).clip(-_LARGEST, _LARGEST).astype(np.int8), scales
    return quotients.astype(np.float16), scales


def as_tensor(codes: np.ndarray) -> Tensor:
    """Codes as numbers that can be multiplied: float32, or float64 for those in float64."""
    tensor = torch.from_numpy(codes)
    return tensor if tensor.dtype == torch.float64 else tensor.float()
