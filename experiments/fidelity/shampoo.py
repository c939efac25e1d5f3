"""Would EV-corrected Shampoo be a better curvature than EK-FAC? Tried here, and not kept.

python -m experiments.fidelity.shampoo --data-root FOLDER    # train and score what is missing
python -m experiments.fidelity.shampoo --table               # its part of the README

EK-FAC takes the eigenbases of the mean b b^T and a a^T of a layer's factors. Shampoo's are those
of the mean D D^T and D^T D of its gradients D, for D = b a^T the same sums with each example
weighted by |a|^2 and |b|^2 (Gupta, Koren and Singer, 2018, https://arxiv.org/abs/1802.09568).
Eigenvalues are the mean squares of the gradients' coordinates in either basis, "EV-corrected"
(Eschenhagen et al., 2025, https://arxiv.org/abs/2506.03595). The library's gradients know both
sums, so the one is put in place of the other. Influence functions at their default damping, judged
by the retrainings on half of the data that this folder keeps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from experiments.fidelity import kept
from experiments.fidelity.run import RUNS, tda
from experiments.marked import with_block
from tda_lightning import AttributionModule, Trajectory
from tda_lightning.cli.command import quiet_lightning
from tda_lightning.cli.run_config import build, load_config
from tda_lightning.cli.trainers import silent_trainer
from tda_lightning.estimators import InfluenceFunction
from tda_lightning.evaluation.linear_datamodeling import (
    bootstrap,
    draw_subsets,
    rank_correlation,
)
from tda_lightning.gradients.forms import Gradient, Outer
from tda_lightning.store.atomic_write import write_text

TRIED = {
    "concrete": "Concrete, MLP",
    "fashion_mnist_noisy_tenth": "FashionMNIST, 30% random labels, a tenth of the rate",
}
FILE = kept.RESULTS / "shampoo.json"
README = Path(__file__).parent / "README.md"
BASES = {"ekfac": "EK-FAC", "shampoo": "EV-corrected Shampoo"}
PROTOCOLS = {"single_run": "single run", "algorithm": "algorithm"}


def main() -> None:
    """Score with both bases, or write what was found into the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", help="folder of the data sets")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        README.write_text(with_block(README.read_text(), "shampoo", table(read())))
        return
    torch.set_num_threads(1)
    quiet_lightning()
    for name in TRIED:
        if name not in (found := read()):
            found[name] = study(name, options.data_root)
            write_text(FILE, json.dumps(found, indent=1) + "\n")
            print(name, flush=True)


def read() -> dict[str, dict[str, dict[str, object]]]:
    """By study and basis: LDS of each query by protocol, and processor seconds."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def study(name: str, data_root: str | None) -> dict[str, dict[str, object]]:
    """Both bases on one recorded run."""
    folder = RUNS / name
    if not (folder / "config.yaml").exists():
        root = [] if data_root is None else [f"data.root={data_root}"]
        tda("train", f"experiment=fidelity/{name}", f"name=fidelity/{name}", *root, "threads=1")
    config = load_config(folder)
    data = build(config.data, trust=False)
    data.setup()
    module = build(config.model, trust=False, optimizer=None, scheduler=None)
    task = build(config.task, trust=False)
    run = Trajectory.load(str(folder))
    truth = kept.load(name).truth
    found: dict[str, dict[str, object]] = {}
    for basis in BASES:
        began = time.process_time()
        # With a cache of its own: both bases have the same name in the run's.
        own = replace(run, curvature={})
        attribution = AttributionModule(module, own, InfluenceFunction(), task)
        with shampoo_bases(basis == "shampoo"):
            values = attribution.attribute(
                data.train_dataset,
                data.query_dataset,
                trainer=silent_trainer(),
                self_influence=False,
            ).values
        seconds = time.process_time() - began
        found[basis] = {"seconds": round(seconds, 2), **lds(values, truth)}
    return found


def lds(values: Tensor, truth: dict[str, Tensor]) -> dict[str, list[float]]:
    """Of each query, by protocol."""
    found = {}
    for protocol, outcomes in truth.items():
        left_out = ~draw_subsets(values.shape[1], 0.5, len(outcomes))
        correlation = rank_correlation(values.double() @ left_out.double().T, outcomes.T)
        found[protocol] = [round(value, 5) for value in correlation.tolist()]
    return found


@contextmanager
def shampoo_bases(wanted: bool) -> Iterator[None]:
    """Layers' bases from D D^T and D^T D of whole gradients, as those without factors have them."""
    before = Outer.covariances
    if wanted:
        Outer.covariances = Gradient.covariances  # type: ignore[method-assign]
    try:
        yield
    finally:
        Outer.covariances = before  # type: ignore[method-assign]


def table(found: dict[str, dict[str, dict[str, object]]]) -> str:
    """LDS with intervals over queries, differences paired by query."""
    heads = [f"{words}{extra}" for words in PROTOCOLS.values() for extra in ("", ", less EK-FAC")]
    lines = [
        f"| study | curvature | {' | '.join(heads)} | processor time |",
        "|---" * (len(heads) + 3) + "|",
    ]
    for name, rows in found.items():
        for basis, words in BASES.items():
            cells = []
            for protocol in PROTOCOLS:
                own, other = (torch.tensor(rows[b][protocol]).double() for b in (basis, "ekfac"))
                cells += [told(own), "" if basis == "ekfac" else told(own - other)]
            line = [TRIED[name], words, *cells, f"{rows[basis]['seconds']:.1f} s"]
            lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


def told(per_query: Tensor) -> str:
    """A mean with its 95% interval."""
    found = bootstrap(per_query)
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


if __name__ == "__main__":
    main()
