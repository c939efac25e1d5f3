"""How time and memory grow with training examples and queries, scores streamed to a file.

python -m experiments.benchmark.scale              # each size in a process of its own: minutes
python -m experiments.benchmark.scale --write      # the table of README.md, from results/scale.json

TracIn at one checkpoint of a tiny classifier on random data, so that the scores themselves are most
of the work: processor seconds of one thread, and memory of the process. Sizes that are in
the results are not measured again.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "scale.json"
README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- scale -->", "<!-- end of scale -->"
TRAIN, QUERY = (15_000, 30_000, 60_000), (2_500, 5_000, 10_000)
SIZES = dict.fromkeys(
    [*((count, QUERY[0]) for count in TRAIN), *((TRAIN[0], count) for count in QUERY),
     (TRAIN[-1], QUERY[-1])]
)  # fmt: skip
INPUTS, CLASSES = 16, 4


def main() -> None:
    """Measure what is missing, or write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", nargs=2, type=int, metavar=("TRAIN", "QUERY"), help="this alone")
    parser.add_argument("--write", action="store_true", help="the table into README.md")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(*options.one)))
        return
    if not options.write:
        for train, query in SIZES:
            found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            if f"{train}x{query}" in found:
                continue
            command = [sys.executable, "-m", "experiments.benchmark.scale", "--one"]
            command += [str(train), str(query)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[f"{train}x{query}"] = json.loads(done.stdout.splitlines()[-1])
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
            print(train, query, found[f"{train}x{query}"], flush=True)
    text = README.read_text()
    if BEGIN in text:
        head, tail = text.split(BEGIN)[0], text.split(END)[1]
        README.write_text(f"{head}{BEGIN}\n\n{table()}\n\n{END}{tail}")


def measured(num_train: int, num_query: int) -> dict[str, float]:
    """One attribution; nothing of it is kept."""
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from tda_lightning import AttributionModule, TrajectoryRecorder
    from tda_lightning.estimators import TracIn
    from tda_lightning.tasks import ClassificationTask

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(INPUTS, 16), nn.ReLU(), nn.Linear(16, CLASSES))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.layers(inputs)

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train, query = (
        TensorDataset(torch.randn(count, INPUTS), torch.randint(CLASSES, (count,)))
        for count in (num_train, num_query)
    )
    with tempfile.TemporaryDirectory() as folder:
        module = Classifier()
        trainer = Trainer(
            max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[TrajectoryRecorder(f"{folder}/run", num_checkpoints=1)],
        )  # fmt: skip
        trainer.fit(module, DataLoader(train, num_train // 4))
        began = time.process_time()
        attribution = AttributionModule(module, f"{folder}/run", TracIn(), ClassificationTask())
        with Anonymous() as memory:
            scores = attribution.attribute(
                train, query, 500, self_influence=False, scores_path=f"{folder}/scores.h5"
            )
        seconds = time.process_time() - began
        assert scores.values.shape == (num_query, num_train)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"cpu_seconds": seconds, "anonymous": memory.peak, "resident": peak}


class Anonymous:
    """The most memory that the process held of its own, looked at 20 times a second: pages of the
    file of scores, which the system keeps as long as nobody else wants the room, are not counted.
    """

    peak = 0

    def __enter__(self) -> Anonymous:
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watch.join()

    def _look(self) -> None:
        while not self._ended.wait(0.05):
            lines = Path("/proc/self/status").read_text().splitlines()
            held = next(line for line in lines if line.startswith("RssAnon"))
            self.peak = max(self.peak, int(held.split()[1]) * 1024)


def table() -> str:
    """Of all sizes, and how well straight lines fit the times."""
    found = json.loads(RESULTS.read_text())
    lines = [
        "| training examples | queries | processor s | own memory, GiB | with pages of the file |",
        "|---|---|---|---|---|",
    ]
    for train, query in SIZES:
        if own := found.get(f"{train}x{query}"):
            own_peak, peak = (own[key] / 2**30 for key in ("anonymous", "resident"))
            seconds = own["cpu_seconds"]
            lines.append(f"| {train} | {query} | {seconds:.1f} | {own_peak:.2f} | {peak:.2f} |")
    lines.append("")
    for what, sizes in (
        ("training examples", [(count, QUERY[0]) for count in TRAIN]),
        ("queries", [(TRAIN[0], count) for count in QUERY]),
    ):
        counts = [own[what == "queries"] for own in sizes]
        times = [found[f"{train}x{query}"]["cpu_seconds"] for train, query in sizes]
        slope, intercept = np.polyfit(counts, times, 1)
        off = max(abs(intercept + slope * n - t) / t for n, t in zip(counts, times, strict=True))
        power = np.polyfit(np.log(counts), np.log(times), 1)[0]
        lines.append(
            f"- In {what}: {intercept:.1f} s + {1e3 * slope:.2f} s a thousand; the three times are "
            f"within {off:.0%} of the line, and grow as the power {power:.2f}."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
