"""Pictures as text: small PNG files inside data URIs."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def picture(image: Tensor | np.ndarray, largest_side: int) -> tuple[str, int, int]:
    """A PNG data URI of ``image``, and its width and height.

    Args:
        image: as in :class:`~tda_lightning.records.rendered.Rendered`.
        largest_side: larger pictures are reduced to this many pixels.
    """
    pixels = _reduce(_to_bytes(_channels_last(image)), largest_side)
    height, width = pixels.shape[:2]
    encoded = base64.b64encode(_png(pixels)).decode("ascii")
    return f"data:image/png;base64,{encoded}", width, height


def _channels_last(image: Tensor | np.ndarray) -> np.ndarray:
    """[height, width, 1 or 3]."""
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
        raise ValueError(
            "An image must have the shape [height, width], [height, width, 3] or [3, height, "
            f"width], got {list(array.shape)}."
        )
    return array[:, :, :3]


def _to_bytes(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    values = np.nan_to_num(array.astype(np.float64))
    low, high = values.min(), values.max()
    if low < 0 or high > 1:
        values = (values - low) / max(high - low, 1e-12)
    return (values * 255).round().astype(np.uint8)


def _reduce(pixels: np.ndarray, largest_side: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    scale = largest_side / max(height, width)
    if scale >= 1:
        return pixels
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    stacked = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
    small = functional.adaptive_avg_pool2d(stacked, size)[0].permute(1, 2, 0)
    return small.round().to(torch.uint8).numpy()


def _png(pixels: np.ndarray) -> bytes:
    """Grey or colour pixels as a PNG file (W3C, PNG specification, third edition, section 11)."""
    height, width, channels = pixels.shape
    colour_type = 0 if channels == 1 else 2
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    # Each line begins with its filter: 0, none.
    lines = np.zeros((height, 1 + width * channels), np.uint8)
    lines[:, 1:] = pixels.reshape(height, -1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
