"""Training examples in the order of their scores for one query."""

from __future__ import annotations

from torch import Tensor


def ranked(
    row: Tensor, candidates: Tensor | None, k: int, descending: bool
) -> tuple[Tensor, Tensor]:
    """The first ``k`` examples by their scores in ``row`` [train], the lower index first among
    equal ones.

    Args:
        candidates: the examples that have a score; None: all.

    Returns:
        Their indices, int64 [k], and scores, [k].

    Raises:
        ValueError: ``k`` is below 1 or larger than the number of examples with a score.
    """
    scored = None if candidates is None else candidates.sort().values
    count = len(row) if scored is None else len(scored)
    if not 1 <= k <= count:
        of = "training examples" if scored is None else "candidates of a query"
        more = "" if scored is None else " The other examples have no score."
        raise ValueError(f"k must be between 1 and the number of {of}, {count}; got {k}.{more}")
    # A stable sort, not topk: ties must not depend on the machine.
    ordered, places = (row if scored is None else row[scored]).sort(
        descending=descending, stable=True
    )
    return (places if scored is None else scored[places])[:k], ordered[:k]
