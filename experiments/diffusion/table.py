"""The tables of the README, from the kept results.

python -m experiments.diffusion.table            # print
python -m experiments.diffusion.table --write    # and put them into README.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from experiments.diffusion.setting import RESULTS

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- by table.py, from here -->", "<!-- to here -->"


def main() -> None:
    """Print the tables; write them where the README has them."""
    parser = argparse.ArgumentParser(description="The tables, from the kept results.")
    parser.add_argument("--write", action="store_true", help="put them into README.md")
    options = parser.parse_args()
    text = "\n\n".join(
        make(json.loads(path.read_text()))
        for name, make in TABLES.items()
        if (path := RESULTS / f"{name}.json").exists()
    )
    print(text)
    if options.write:
        before, _, rest = README.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        README.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def outliers(found: dict[str, Any]) -> str:
    """The outlier test."""
    setup, rows = found["setup"], []
    for name, own in found["measured"].items():
        rows.append(
            f"| {name} | {own['mnist_of_zeros']:.2f} | {own['mnist_of_planes']:.2f} "
            f"| {own['overlap']:.2f} | {own['generally_influential']:.0f} "
            f"| {own['distinct']:.0f} | {own['size_by_timestep']:.1f} "
            f"| {found['seconds'][name] / found['seconds']['training']:.1f} |"
        )
    share = setup["zeros"] / setup["train"]
    head = (
        f"{setup['train']} training images of {setup['size']} x {setup['size']} pixels, "
        f"{setup['zeros']} of them zeros (share {share:.2f}); {setup['epochs']} epochs; "
        f"{setup['held_out']} held-out queries, half of them zeros; the {setup['top']} strongest "
        "proponents of each.\n\n"
        "| | MNIST among proponents of zeros | ... of aeroplanes | overlap | generally influential "
        "| distinct | size by timestep, largest / smallest | processor time / training's |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *rows])


def retrainings(found: dict[str, Any]) -> str:
    """Linear datamodeling scores."""
    setup, rows = found["setup"], []
    for name, (same, other, seconds) in found["lds"].items():
        cells = [f"{value:.2f} ({low:.2f} to {high:.2f})" for value, low, high in (same, other)]
        rows.append(f"| {name} | {' | '.join(cells)} | {seconds / setup['training_seconds']:.1f} |")
    each = ", ".join(f"{value:.2f}" for value in sorted(setup["agreement_of_queries"]))
    head = (
        f"{setup['train']} digits of {setup['size']} x {setup['size']} pixels, {setup['steps']} "
        f"steps; losses of {setup['queries']} generated samples, means over "
        f"{setup['timesteps']} timesteps and {setup['measured_draws']} draws of the noise "
        f"({setup['scored_draws']} where they are scored); {setup['subsets']} retrainings on "
        "random halves, by replays of the run and by those of a run of another seed. The two "
        f"truths agree at {setup['agreement']:.2f} (rank correlation over subsets; "
        f"mean over samples, of each: {each}). Intervals of 95% over subsets.\n\n"
        "| | linear datamodeling score, replays | another seed | processor time / training's |\n"
        "|---|---|---|---|"
    )
    return "\n".join([head, *rows])


TABLES = {"outliers": outliers, "retrainings": retrainings}

if __name__ == "__main__":
    main()
