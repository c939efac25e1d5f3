"""The reference has every public name, and docs/troubleshooting.md every error with its cause."""

import ast
import re
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def public_modules():
    """The modules as the site's own code finds them, which reads and imports nothing."""
    sys.path.insert(0, str(ROOT / "docs" / "_site"))
    try:
        return import_module("reference").modules(ROOT)
    finally:
        sys.path.pop(0)


def test_every_public_name_is_in_the_reference():
    pages = {module.name: module for module in public_modules()}
    for path in (ROOT / "tda_lightning").rglob("__init__.py"):
        name = ".".join(path.parent.relative_to(ROOT).parts)
        public = getattr(import_module(name), "__all__", [])
        if public:
            shown = re.findall(r"^::: ([\w.]+)$", pages[name].markdown(), re.MULTILINE)
            assert shown == [f"{name}.{each}" for each in public]
    errors = pages["tda_lightning.records.errors"]
    assert "TrajectoryFormatError" in errors.names


def test_names_in_the_reference_exist():
    for module in public_modules():
        missing = [n for n in module.names if not hasattr(import_module(module.name), n)]
        assert not missing, module.name


def errors():
    """(class, message) of the errors that the package raises and defines."""
    raised, defined = set(), set()
    for path in (ROOT / "tda_lightning").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                raised.add(ast.unparse(node.exc.func).split(".")[-1])
            bases = [ast.unparse(base) for base in getattr(node, "bases", [])]
            if isinstance(node, ast.ClassDef) and any(base.endswith("Error") for base in bases):
                defined.add(node.name)
    return raised, defined


# Raised for other code than a caller's: exit statuses, Hydra's own errors, what a test proves.
NOT_SEEN = {"SystemExit", "CompactHydraException", "AssertionError", "TrajectoryError", "Pass"}


def test_every_error_has_its_cause():
    raised, defined = errors()
    known = set(re.findall(r"`(\w+)`", TROUBLE))
    classes = {name for name in raised if name[0].isupper()} | defined
    missing = {name for name in classes - NOT_SEEN if name not in known}
    assert not missing, "docs/troubleshooting.md says nothing of the causes of these"
