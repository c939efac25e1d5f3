"""Which cases of a table make test runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """All cases; those not in ``kept`` are slow tests. Each of them goes through code that a case
    that is kept, or another quick test, goes through as well."""
    cases = list(cases)
    missing = [case for case in kept if case not in cases]
    assert not missing, f"no cases: {missing}"
    return [case if case in kept else as_slow(case) for case in cases]


def as_slow(case: Any) -> Any:
    """A case, or the values of one with several parameters, as a slow test."""
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
