"""Sounds as text: small WAV files inside data URIs."""

from __future__ import annotations

import base64
import struct

import numpy as np
from torch import Tensor

_RATE = 8000  # samples per second: enough for speech
_SECONDS = 4.0


def sound(samples: Tensor | np.ndarray, rate: int) -> str:
    """A WAV data URI of ``samples``: one channel, 16 bits, the first four seconds.

    Args:
        samples: as in :class:`~tda_lightning.records.rendered.Rendered`.
        rate: samples per second; of more than 8000, neighbours are averaged.
    """
    wave = samples.detach().cpu().numpy() if isinstance(samples, Tensor) else np.asarray(samples)
    if rate <= 0:
        raise ValueError(f"A sound's rate must be positive samples per second, got {rate}.")
    if wave.ndim == 2:  # [channel, sample] or [sample, channel]
        wave = wave.mean(axis=int(np.argmin(wave.shape)))
    if wave.ndim != 1 or not wave.size:
        raise ValueError(
            f"A sound must have the shape [sample] or [channel, sample], got {list(wave.shape)}."
        )
    if np.issubdtype(wave.dtype, np.integer):
        wave = wave / float(np.iinfo(wave.dtype).max)
    wave = np.nan_to_num(wave.astype(np.float64))[: int(rate * _SECONDS)]
    step = max(1, rate // _RATE)
    wave = wave[: len(wave) // step * step or len(wave)]
    if step > 1 and len(wave) >= step:
        wave = wave.reshape(-1, step).mean(axis=1)
    loudest = float(np.abs(wave).max())
    if loudest > 1:
        wave = wave / loudest
    encoded = base64.b64encode(_wav((wave * 32767).round().astype("<i2"), rate // step))
    return f"data:audio/wav;base64,{encoded.decode('ascii')}"


def _wav(samples: np.ndarray, rate: int) -> bytes:
    """Samples [sample] as a RIFF WAVE file of 16-bit PCM in one channel."""
    data = samples.tobytes()
    form = struct.pack("<HHIIHH", 1, 1, rate, 2 * rate, 2, 16)
    chunks = b"WAVE" + b"fmt " + struct.pack("<I", len(form)) + form
    chunks += b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks
