"""The notebooks of docs/: their cells run, their outputs are kept, and what they load exists."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))
MOST_BYTES = 100_000

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    """(source, outputs) of the notebook's code cells."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [("".join(c["source"]), c["outputs"]) for c in cells if c["cell_type"] == "code"]


def test_there_are_four():
    assert {path.stem for path in NOTEBOOKS} >= {"images", "text", "fine_tuning", "wrong_labels"}


@notebooks
def test_the_cells_are_code_and_what_they_import_is_there(path):
    for source, _ in code_cells(path):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                # Of packages outside the library only some are installed everywhere.
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), source
            elif isinstance(node, ast.Import) and node.names[0].name.split(".")[0] != "matplotlib":
                assert importlib.util.find_spec(node.names[0].name)


@notebooks
def test_outputs_are_kept_small_and_free_of_errors(path):
    assert path.stat().st_size < MOST_BYTES
    outputs = [output for _, found in code_cells(path) for output in found]
    assert outputs, "run docs/_site/run_notebooks.py"
    assert all(output["output_type"] != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)


def printed(outputs):
    return "".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream")


@notebooks
def test_the_cells_run_and_print_what_is_kept(path, tmp_path, monkeypatch, capsys):
    """In this process, which has loaded torch and Lightning already."""
    if path.stem == "images":
        pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    names = {}
    capsys.readouterr()
    for source, outputs in code_cells(path):
        exec(compile(source, path.name, "exec"), names)
        said, kept = capsys.readouterr().out.split(), printed(outputs).split()
        # Numbers differ a little between processors, words do not.
        assert len(said) == len(kept), source
        assert [w for w in said if w.isalpha()] == [w for w in kept if w.isalpha()], source
    wrong = names.get("is_wrong")
    if wrong is not None:  # of 80 wrong labels
        assert wrong[names["order"][:120]].sum() > 70


@pytest.mark.slow
@notebooks
def test_the_notebooks_run_in_a_kernel(path, tmp_path):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    import sys

    sys.path.insert(0, str(path.parents[1] / "_site"))
    try:
        from run_notebooks import executed
    finally:
        sys.path.pop(0)
    cells = [cell for cell in executed(path, str(tmp_path)).cells if cell.cell_type == "code"]
    assert [bool(cell.outputs) for cell in cells] == [bool(found) for _, found in code_cells(path)]
