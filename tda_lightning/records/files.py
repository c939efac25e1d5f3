"""The functions that load, save and export records, which folders above provide.

``Scores.load`` belongs on the record, but the store stands above the records, and nothing here
may import it. So ``tda_lightning/__init__.py`` sets :data:`import_folder`, and a
:class:`StoreFunction` looks its function up there when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Generic, ParamSpec, TypeVar, cast

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

import_folder: Callable[[str], ModuleType]


class StoreFunction(Generic[Parameters, Result]):
    """The function ``name`` of the store, or of another folder, imported when it is called."""

    def __init__(self, name: str, folder: str = "store") -> None:
        self.name, self.folder = name, folder

    def __call__(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        folder = import_folder(self.folder)  # noqa: F821 (only annotated here)
        return cast("Callable[Parameters, Result]", getattr(folder, self.name))(*args, **kwargs)
