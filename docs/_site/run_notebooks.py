"""Runs the notebooks of docs/notebooks in place, so that they hold what their code prints.

python docs/_site/run_notebooks.py     # all of them; needs `pip install 'tda-lightning[docs]'`
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def executed(path: Path, folder: str) -> nbformat.NotebookNode:
    """The notebook at ``path`` with the outputs of running it in ``folder``.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}})
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return notebook


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if len(sys.argv) > 1 and path.stem not in sys.argv[1:]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(executed(path, folder), path)
        print(path.name)


if __name__ == "__main__":
    main()
