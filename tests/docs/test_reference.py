"""docs/api has every public name, and docs/troubleshooting.md every error with its cause."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
API = sorted((ROOT / "docs" / "api").glob("*.md"))
DOCUMENTED = [
    name
    for page in API
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]
TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
# Folders whose names no caller needs: theirs are shown by the page of the package.
PUBLIC = [
    ".".join(path.parent.relative_to(ROOT).parts)
    for path in sorted((ROOT / "tda_lightning").rglob("__init__.py"))
    if "\n__all__ = " in path.read_text(encoding="utf-8")
]


def value(name):
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module):
    names = [f"{module}.{name}" for name in import_module(module).__all__]
    # What several modules offer is shown once.
    objects = [value(name) for name in DOCUMENTED]
    missing = [
        name
        for name in names
        if name not in DOCUMENTED and not any(value(name) is found for found in objects)
    ]
    assert not missing, f"add ::: lines for these to a page of docs/api: {missing}"


def test_the_reference_has_no_other_names():
    assert len(DOCUMENTED) == len(set(DOCUMENTED))
    public = {f"{module}.{name}" for module in PUBLIC for name in import_module(module).__all__}
    other = [n for n in DOCUMENTED if n not in public and ".records.errors." not in n]
    assert not other, f"these are not public (any more): {other}"


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


def nav_pages(entry):
    if isinstance(entry, str):
        return [entry]
    entries = entry if isinstance(entry, list) else entry.values()
    return [page for inner in entries for page in nav_pages(inner)]


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        """Leaves out what only mkdocs knows."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    listed = set(nav_pages(config["nav"]))
    docs = ROOT / "docs"
    pages = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    pages |= {f"notebooks/{path.stem}.md" for path in docs.glob("notebooks/*.ipynb")}
    studies = ROOT.glob("experiments/*/README.md")
    pages |= {path.relative_to(ROOT).as_posix() for path in studies}
    assert not pages - listed, "add a line for each of these to nav in mkdocs.yml"
