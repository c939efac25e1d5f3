"""The package's layout: who may import whom, and that every public name says what it is.

The order of the folders is read from ``docs/architecture.md``, so that the page stays true. Imports
are read from the source: those inside functions and under ``TYPE_CHECKING`` count like any other.
"""

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "tda_lightning"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FOLDERS = re.findall(r"^ {2}(\w+)/ ", ARCHITECTURE, flags=re.MULTILINE)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}

# Libraries that are slow to import or belong to one task, and the folders that may import them.
HOMES = {
    "fastapi": {"serve"},
    "h5py": {"store"},
    "hydra": {"cli"},
    "jinja2": {"report"},
    "lightning": {
        *("recording", "attribution", "ensembles", "live", "examples", "cli"),
        "reweighting",
    },
    "omegaconf": {"cli"},
    "pandas": {"exports", "records"},  # in records for typing only
    "peft": {"attribution"},
    "rich": {"runtime", "cli", "report"},
    "scipy": {"evaluation"},
    "uvicorn": {"serve"},
    "xarray": {"exports", "records"},
}


def imports_of(name: str) -> set[str]:
    """Full names of everything that a module imports, submodules named as such."""
    path = MODULES[name]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in MODULES else node.module)
    return found


IMPORTS = {name: imports_of(name) for name in MODULES}


def folder_of(name: str) -> str:
    """The folder that a module is in; '' for the package's own ``__init__``."""
    return [*name.split("."), ""][1]


def cycles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Strongly connected components of more than one node (Tarjan 1972), or with a loop."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    components = []

    def visit(node: str) -> None:
        index[node] = lowest[node] = len(index)
        stack.append(node)
        for target in graph[node]:
            if target not in index:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in stack:
                lowest[node] = min(lowest[node], index[target])
        if lowest[node] == index[node]:
            component = set(stack[stack.index(node) :])
            del stack[stack.index(node) :]
            if len(component) > 1 or node in graph[node]:
                components.append(component)

    for node in graph:
        if node not in index:
            visit(node)
    return components


def test_cycles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"e"}}
    assert sorted(map(sorted, cycles(graph))) == [["b", "c"], ["e"]]


def test_the_page_lists_the_folders():
    folders = {path.name for path in (ROOT / PACKAGE).iterdir() if (path / "__init__.py").exists()}
    assert len(FOLDERS) == len(set(FOLDERS)), "docs/architecture.md lists a folder twice"
    assert folders <= set(FOLDERS), "a folder is missing in docs/architecture.md"


def test_no_module_stands_loose_at_the_top():
    assert [path.name for path in (ROOT / PACKAGE).glob("*.py")] == ["__init__.py"]


def test_imports_point_downwards():
    rank = {folder: position for position, folder in enumerate(["", *FOLDERS])}
    upward = [
        (name, target)
        for name in MODULES
        for target in IMPORTS[name]
        if target.split(".")[0] == PACKAGE and rank[folder_of(target)] < rank[folder_of(name)]
    ]
    assert not upward, "these import from a row above"


def test_nothing_imports_the_examples():
    """A user's models and data take their place."""
    assert FOLDERS[0] == "examples", "the row that no other may import"


def test_no_modules_import_each_other():
    graph = {name: IMPORTS[name] & MODULES.keys() for name in MODULES}
    assert not cycles(graph)


def test_heavy_libraries_are_imported_where_they_belong():
    outside = [
        (name, library)
        for name in MODULES
        for library in {target.split(".")[0] for target in IMPORTS[name]}
        if folder_of(name) not in HOMES.get(library, {folder_of(name)})
    ]
    assert not outside


def undocumented(name: str) -> list[str]:
    """Public functions, classes and methods of a module that no docstring describes.

    A method that overrides a documented one is described by that.
    """
    module = import_module(name)
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    # What is made by a call, such as TypedDict("Damping", ...), cannot have one.
    written = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    missing = []
    for key, value in vars(module).items():
        if key.startswith("_") or key not in written:
            continue
        if inspect.isfunction(value) and not inspect.getdoc(value):
            missing.append(f"{name}.{key}")
        if inspect.isclass(value):
            if not value.__doc__ or value.__doc__.startswith(f"{key}("):  # of @dataclass
                missing.append(f"{name}.{key}")
            missing += [
                f"{name}.{key}.{attribute}"
                for attribute, member in vars(value).items()
                if not attribute.startswith("_")
                and isinstance(member, (property, classmethod, staticmethod))
                | inspect.isfunction(member)
                and not inspect.getdoc(getattr(value, attribute))
            ]
    return missing


@pytest.mark.parametrize("folder", FOLDERS)
def test_public_names_have_docstrings(folder):
    names = [name for name in MODULES if folder_of(name) == folder and "__main__" not in name]
    assert not [missing for name in names for missing in undocumented(name)]


def test_cited_sections_exist():
    """The code cites the methods page by section: ``docs/methods.md, "Units"``."""
    headings = {}
    for page in (ROOT / "docs").glob("*.md"):
        found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        headings[f"docs/{page.name}"] = set(found)
    cited = []
    for folder in (PACKAGE, "tests", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            text = re.sub(r"\s+#?\s*", " ", path.read_text(encoding="utf-8"))
            cited += re.findall(r'(docs/\w+\.md), "([^"]+)"', text)
    assert cited
    missing = [(page, section) for page, section in cited if section not in headings[page]]
    assert not missing


def test_the_walk_through_one_score_names_what_is_there():
    section = ARCHITECTURE.split("## One score, followed")[1].split("\n## ")[0]
    steps = re.findall(r"^\| \d\. .*\| `(\S+)` \| `(\w+)` \|$", section, flags=re.MULTILINE)
    assert len(steps) == 8
    apart = re.findall(r"`(\w+)`\s+in\s+`(\S+\.py)`", section)
    assert len(apart) == 3
    for file, function in [*steps, *[(file, function) for function, file in apart]]:
        tree = ast.parse((ROOT / PACKAGE / file).read_text(encoding="utf-8"))
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert function in names, file
