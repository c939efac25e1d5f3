"""Packages that an export needs and the library does not."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def needed(package: str, extra: str, why: str) -> Any:
    """The module ``package``, imported now: exporting is the only thing that waits for it.

    Raises:
        ImportError: it is not installed; says how to install it.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{why} needs {package.partition('.')[0]}, which is not installed or does not load "
            f"({error}). Install it: pip install 'tda-lightning[{extra}]'."
        ) from error
