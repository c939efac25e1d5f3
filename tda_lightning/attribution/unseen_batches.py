"""Attribution of batches that turn out to be made otherwise than the first ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from tda_lightning.records.errors import UnseenBatchError
from tda_lightning.runtime.processes import rank_and_world
from tda_lightning.tasks import numbered_draw

T = TypeVar("T")
P = ParamSpec("P")
_SURPRISES = 2  # of a task: divisors that differ between batches, and a loss made otherwise


def again_where_unseen(method: Callable[P, T]) -> Callable[P, T]:
    """Begin again where a batch is made otherwise than those that were looked at first. The task
    has noted it, and what it does then holds for all batches."""

    @functools.wraps(method)
    def again(*args: P.args, **kwargs: P.kwargs) -> T:
        for _ in range(_SURPRISES):
            try:
                # A draw that an error broke off earlier numbers none of these.
                with numbered_draw(0):
                    return method(*args, **kwargs)
            except UnseenBatchError:
                if rank_and_world()[1] > 1:  # the other processes do not know of it
                    raise
        with numbered_draw(0):
            return method(*args, **kwargs)

    return again
