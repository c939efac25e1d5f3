"""experiments/benchmark/run.py without its measurements."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.benchmark import run


def row(seconds: float) -> dict[str, float]:
    return {"seconds": seconds, "cpu_seconds": 2 * seconds, "bytes": 1e6, "load": 1.0}


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are kept one by one; a library that is not installed is left out."""
    asked: list[str] = []

    def measured(arguments: Any, work: str, job: str, count: int, library: str) -> Any:
        asked.append(library)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return None if library == "kronfluence" else row(3.0)

    (tmp_path / "recorded-0.1").touch()
    results = tmp_path / "rows.json"
    command = ["run", "--folder", str(tmp_path), "--scale", "0.1", "--repeats", "1"]
    command += ["--results", str(results), "--only", "mlp ekfac"]
    monkeypatch.setattr(run, "measured", measured)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(KeyboardInterrupt):
        run.main()
    assert json.loads(results.read_text())["rows"][f"mlp ekfac {run.OURS}"] == [row(3.0)]
    asked.append("again")
    run.main()
    assert asked == [run.OURS, "floor", "again", "floor", "kronfluence"]
    monkeypatch.setattr(sys, "argv", [*command, "--threads", "1"])
    with pytest.raises(SystemExit, match="choose another file with --results"):
        run.main()


def test_tables_are_written_between_their_marks() -> None:
    rows = {
        f"mlp source {run.OURS}": [row(3.0)],
        f"mlp source blocks {run.OURS}": [row(2.0)],
        "mlp ekfac kronfluence": [],
    }
    about = {"scale": 0.5, "threads": 1, "torch": "2.13.0", "cores": 2}
    text = run.written(
        f"before\n{run.MARKS[0]}\nold\n{run.MARKS[1]}\nafter\n", {"about": about, "rows": rows}
    )
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| mlp | SOURCE: default / blocks alone | 1.50 | 1.50 | <= 1.5 |" in text


def test_every_job_has_its_function_and_every_ratio_its_rows() -> None:
    from experiments.benchmark.libraries import JOBS

    names = {f"{work} {job} {own}" for work, job, _, libraries in run.ROWS for own in libraries}
    assert all((job, own) in JOBS for _, job, _, libraries in run.ROWS for own in libraries)
    assert all({above, below} <= names for _, above, below, _, _ in run.RATIOS)
    assert all(job in run.TITLES for _, job, _, _ in run.ROWS)
