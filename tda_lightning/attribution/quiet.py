"""Attribution without Lightning's lines on devices and services, which say nothing of it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = ("lightning.pytorch", "lightning.fabric")


@contextmanager
def without_device_lines() -> Iterator[None]:
    """Keep Lightning's information (devices found, tips) back; its warnings stay.

    A user who set another level than INFO has decided on these lines, and keeps that level.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        if logger.getEffectiveLevel() == logging.INFO:
            logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # torch's own, of a class that Lightning uses.
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
