"""How much of stage 1 goes, and whose training: 5% and half left out, one run and five of them.

python -m experiments.two_stages.question --data-root FOLDER     # train, retrain, score, keep
python -m experiments.two_stages.question                        # the table, from what is kept

The run, and its retrainings on half of stage 1, are those of ``run.py``. What was done is kept in
``runs/two_stages``. ``results/question.npz``: ``outcomes_PROTOCOL`` float32 [subset, seed, query]
with 95% kept; ``ranks_SHARE`` uint8 [row, query, subset]; ``about``, names and seconds of the rows.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.marked import with_block
from experiments.two_stages import results, setting
from experiments.two_stages.run import kept_sums, recorded
from experiments.two_stages.scores import estimators
from experiments.two_stages.table import HERE, PROTOCOLS, TITLES
from experiments.two_stages.truth import FRACTION, SUBSETS, ground_truth
from tda_lightning import Trajectory
from tda_lightning.evaluation import draw_subsets, linear_datamodeling_score
from tda_lightning.store.atomic_write import write_text

FEW = 0.95
SHARES = (FEW, FRACTION)  # of stage 1 that a subset keeps
MEMBERS = 5
ROWS = {
    "unrolled": TITLES["unrolled"],
    "unrolled at half": TITLES["unrolled at half"],
    "recorded": TITLES["recorded"],
    "source": TITLES["source"],
    "source at half": TITLES["source at half"],
    "source_blocks": TITLES["source_blocks"],
    "source_blocks at half": TITLES["source_blocks at half"],
    "multi_stage 0.1": TITLES["multi_stage"],
    "influence 0.1": TITLES["influence"],
    "tracin": TITLES["tracin"],
}
AVERAGED = ("source", "source at half", "unrolled at half")  # over five runs
FILE = HERE / "results" / "question.npz"


def main() -> None:
    """Whatever is missing, given the data; then the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", type=Path, help="the folder of mnist/")
    parser.add_argument("--folder", type=Path, default=Path("runs/two_stages"))
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if options.data_root is not None:
        measure(options.folder, setting.load(options.data_root))
    readme = HERE / "README.md"
    write_text(readme, with_block(readme.read_text(), "question", table()))


def measure(folder: Path, data: setting.Data) -> None:
    """Train, retrain and score, and keep what the table needs."""
    runs = recorded(folder, data)
    truths = {
        protocol: ground_truth(protocol, runs, data, folder / f"{protocol}-{FEW}.h5", FEW, 0)
        for protocol in PROTOCOLS
    }
    subsets = {share: draw_subsets(len(data.stages[0]), share, SUBSETS) for share in SHARES}
    found: dict[str, Mapping[str, np.ndarray]] = {}
    for name in ROWS:
        found[name] = predicted(folder, name, runs, data, subsets)
    for name in AVERAGED:
        each = [found[name]]
        for number in range(2, MEMBERS + 1):
            member = folder / f"member-{number}"
            others = recorded(member, data, seed=setting.SEED + 100 + number)
            each.append(predicted(member, name, others, data, subsets))
        found[f"{name}, {MEMBERS} runs"] = {
            key: np.stack([one[key] for one in each]).sum(0) / (1 if key == "seconds" else MEMBERS)
            for key in each[0]
        }
    ranks = {
        f"ranks_{share}": torch.stack(
            [results.ranked(torch.from_numpy(row[str(share)]), SUBSETS) for row in found.values()]
        ).numpy()
        for share in subsets
    }
    outcomes = {f"outcomes_{p}": truth.outcomes.float().numpy() for p, truth in truths.items()}
    about = {name: round(float(row["seconds"]), 1) for name, row in found.items()}
    results.keep(FILE, about=np.array(json.dumps(about)), **ranks, **outcomes)


def predicted(
    folder: Path,
    name: str,
    runs: Sequence[Trajectory],
    data: setting.Data,
    subsets: Mapping[float, Tensor],
) -> Mapping[str, np.ndarray]:
    """Sums of the scores of what subsets keep [query, subset], by share; processor seconds."""
    path = folder / "question" / f"{name.replace(' ', '_')}.npz"
    if not path.exists():
        score = estimators(runs, data)[name]
        began = time.process_time()
        values = score()
        seconds = time.process_time() - began
        path.parent.mkdir(parents=True, exist_ok=True)
        sums = {str(share): kept_sums(values, kept).numpy() for share, kept in subsets.items()}
        results.keep(path, seconds=np.array(seconds), **sums)
        print(f"{path}: {seconds:.1f} s", flush=True)
    with np.load(path, allow_pickle=False) as kept:
        return {key: kept[key] for key in kept.files}


def table() -> str:
    """LDS by share kept and protocol, in markdown."""
    halves = results.read(HERE / "results").outcomes
    heads = [f"{words}, {share:.0%} kept" for words in PROTOCOLS.values() for share in SHARES]
    lines = [f"| LDS | {' | '.join(heads)} | seconds |", "|---" * (len(heads) + 2) + "|"]
    alone = torch.eye(SUBSETS, dtype=torch.bool)
    with np.load(FILE, allow_pickle=False) as arrays:
        for number, (name, seconds) in enumerate(json.loads(str(arrays["about"])).items()):
            cells = []
            for protocol in PROTOCOLS:
                few = torch.from_numpy(arrays[f"outcomes_{protocol}"])
                for share, truth in ((FEW, few), (FRACTION, halves[protocol][:SUBSETS])):
                    ranks = torch.from_numpy(arrays[f"ranks_{share}"][number])
                    cells.append(str(linear_datamodeling_score(ranks, alone, truth)))
            own, _, many = name.partition(", ")
            title = ROWS[own] + (f", {many}" if many else "")
            lines.append(f"| {title} | {' | '.join(cells)} | {seconds:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
