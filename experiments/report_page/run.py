"""How fast a large report opens and answers, in a headless browser.

    python -m experiments.report_page.run [--examples 60000] [--queries 100] [--rounds 5]

Pictures of 8 x 8 pixels, ten classes. Times are by the clock: close other programs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from tda_lightning.records.scores import Scores
from tda_lightning.report import write_report
from tests.report.browser import opened

KEYS = "class 3"  # typed into the search of queries, letter by letter


def example_page(folder: Path, examples: int, queries: int) -> Path:
    """The report of random scores over random pictures."""
    torch.manual_seed(0)
    pictures, labels = torch.rand(examples, 1, 8, 8), torch.arange(examples) % 10
    values = 1e-3 * torch.randn(queries, examples)
    named = [f"class {n % 10}" for n in range(queries)]
    provenance = {"predictions": named, "measurements": torch.rand(queries).tolist()}
    scores = Scores(values, self_influence=torch.rand(examples), provenance=provenance)
    train = TensorDataset(pictures, labels)
    query = TensorDataset(pictures[:queries], labels[:queries])
    return write_report(scores, folder / "report.html", train=train, query=query)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=60_000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, opened() as browser:
        began = time.perf_counter()
        path = example_page(Path(folder), options.examples, options.queries)
        written = time.perf_counter() - began
        opening, typing = [], []
        for _ in range(options.rounds):
            page = browser.new_page()
            began = time.perf_counter()
            page.goto(path.as_uri(), wait_until="load")
            # Two frames later what the script made has been drawn.
            drawn = "new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))"
            page.evaluate(drawn)
            opening.append(time.perf_counter() - began)
            page.locator("input[type=search]").first.focus()
            for key in KEYS:
                began = time.perf_counter()
                page.keyboard.press(key if key != " " else "Space")
                page.evaluate(drawn)
                typing.append(time.perf_counter() - began)
            page.close()
        print(
            json.dumps(
                {
                    "examples": options.examples,
                    "queries": options.queries,
                    "mebibytes": round(path.stat().st_size / 2**20, 2),
                    "written_seconds": round(written, 2),
                    "opens_seconds": round(statistics.median(opening), 3),
                    "opens_slowest": round(max(opening), 3),
                    "key_milliseconds": round(1e3 * statistics.median(typing), 1),
                    "key_slowest": round(1e3 * max(typing), 1),
                }
            )
        )


if __name__ == "__main__":
    main()
