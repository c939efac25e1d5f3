"""The estimator that an index was built with, from how the index says it."""

from __future__ import annotations

import ast
from typing import Any

from tda_lightning import estimators, solvers
from tda_lightning.estimators import Estimator


def estimator_of(text: str) -> Estimator:
    """The estimator whose ``repr`` is ``text``. Nothing but this library's estimators and solvers
    with plain settings is made; no other text is run.

    Raises:
        ValueError: it is no such text.

    Example:
        >>> estimator_of("Source(num_segments=2, curvature='kfac')").num_segments
        2
    """
    try:
        made = _made(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise _unknown(text) from error
    if type(made).__name__ not in estimators.__all__:
        raise _unknown(text)
    return made  # type: ignore[no-any-return]


def _made(node: ast.expr) -> Any:
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    if not isinstance(node.func, ast.Name) or node.args:
        raise ValueError("a call with other than named settings")
    name = node.func.id
    places = [place for place in (estimators, solvers) if name in place.__all__]
    settings = {str(own.arg): _made(own.value) for own in node.keywords if own.arg is not None}
    if not places or len(settings) < len(node.keywords):
        raise ValueError(f"no estimator or solver is named {name}")
    return getattr(places[0], name)(**settings)


def _unknown(text: str) -> ValueError:
    return ValueError(
        f"The index was built with {text:.200}, which is no estimator of this library with its "
        "settings. Build it again: tda index FOLDER."
    )
