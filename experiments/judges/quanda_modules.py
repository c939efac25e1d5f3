"""quanda's metrics and wrappers without its benchmarks, which import torchvision.

``import quanda`` imports its benchmarks, and they a ResNet of torchvision, whose builds need not
fit the installed torch. Metrics and wrappers need neither, so the package is entered beside its
``__init__``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType


def enter_quanda() -> None:
    """Make ``quanda.metrics``, ``quanda.explainers`` and ``quanda.utils`` importable.

    Raises:
        ImportError: quanda is not installed.
    """
    if "quanda" in sys.modules:
        return
    found = importlib.util.find_spec("quanda")
    if found is None or found.submodule_search_locations is None:
        raise ImportError(
            "quanda is not installed: see experiments/judges/requirements.txt, which goes in with "
            "--no-deps."
        )
    package = ModuleType("quanda")
    package.__path__ = list(found.submodule_search_locations)
    package.__spec__ = found
    sys.modules["quanda"] = package
    for part in ("utils", "explainers", "metrics"):
        setattr(package, part, importlib.import_module(f"quanda.{part}"))
