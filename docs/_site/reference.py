"""The pages of the API: one for each module with ``__all__``, its names in that order."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What most readers look for comes first; every other module follows by its name.
FIRST = ["", "estimators", "tasks", "measurements", "edits", "solvers", "ensembles", "evaluation"]
# Modules whose names others offer too: each is shown where a script would import it from.
ERRORS = "tda_lightning.records.errors"


@dataclass(frozen=True)
class Module:
    """A public module: its dotted name, the first line of its docstring, its public names."""

    name: str
    about: str
    names: tuple[str, ...]

    @property
    def page(self) -> str:
        """Its page in the site."""
        return f"api/{self.name}.md"

    def markdown(self) -> str:
        """The page's text, for mkdocstrings."""
        entries = "\n\n".join(f"::: {self.name}.{name}" for name in self.names)
        return f"# `{self.name}`\n\n{self.about}\n\n{entries}\n"


def modules(root: Path) -> list[Module]:
    """All public modules of the package under ``root``."""
    found = list(_modules(root))

    def place(module: Module) -> tuple[int, str]:
        short = module.name.removeprefix("tda_lightning").removeprefix(".")
        return (FIRST.index(short) if short in FIRST else len(FIRST), module.name)

    return sorted(found, key=place)


def _modules(root: Path) -> Iterator[Module]:
    for path in (root / "tda_lightning").rglob("*.py"):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        about = (ast.get_docstring(tree) or "").partition("\n\n")[0].replace("``", "`")
        names = _all_of(tree)
        if name == ERRORS:
            names = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
        if names:
            yield Module(name, about, tuple(names))


def _all_of(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []
