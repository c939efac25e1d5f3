"""A sentence of the report, and the numbers that one may be made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeGuard


@dataclass(frozen=True)
class Statement:
    """A sentence under a heading; ``kind`` is a class of the style sheet, or nothing."""

    heading: str
    text: str
    kind: str = ""


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value from a file is a number of things."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number, negative only as a float: JSON keeps them apart."""
    return is_count(value) or (isinstance(value, float) and math.isfinite(value))
