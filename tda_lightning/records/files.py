"""The functions that load and save records, which the store provides.

``Scores.load`` belongs on the record, but the store stands above the records, and nothing here
may import it. So ``tda_lightning/__init__.py`` sets :data:`import_store`, and a
:class:`StoreFunction` looks its function up there when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Generic, ParamSpec, TypeVar, cast

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

import_store: Callable[[], ModuleType]


class StoreFunction(Generic[Parameters, Result]):
    """The function ``name`` of the store, imported when it is first called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        store = import_store()  # noqa: F821 (only annotated here)
        return cast("Callable[Parameters, Result]", getattr(store, self.name))(*args, **kwargs)
