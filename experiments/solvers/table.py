"""The tables of the README, from the kept results, within seconds.

python -m experiments.solvers.table            # print
python -m experiments.solvers.table --write    # and put them into README.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.fidelity.kept import Kept, read
from experiments.fidelity.table import BEGIN, END, WORDS, best, lds
from experiments.solvers.studies import STUDIES, TITLES
from tda_lightning.evaluation import difference

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def main() -> None:
    """Print the tables; write them where the README has them."""
    parser = argparse.ArgumentParser(description="The tables, from the kept results.")
    parser.add_argument("--write", action="store_true", help="put them into README.md")
    options = parser.parse_args()
    text = tables(load())
    print(text)
    if options.write:
        readme = HERE / "README.md"
        before, _, rest = readme.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def load() -> dict[str, Kept]:
    """What is kept of the studies."""
    files = {name: RESULTS / f"{name}.npz" for name in STUDIES}
    return {name: read(file) for name, file in files.items() if file.exists()}


def tables(found: Mapping[str, Kept]) -> str:
    """Markdown: for each study all dampings and the best ones, then the iterations."""
    parts = []
    for name, kept in found.items():
        count = len(next(iter(kept.predicted.values())))
        parts.append(f"### {STUDIES[name].title}: {count} queries")
        parts += [every_damping(kept), best_damping(kept)]
    if (RESULTS / "iterations.json").exists():
        outcome = json.loads((RESULTS / "iterations.json").read_text())
        parts.append(f"### Walks of conjugate gradients, a GPT of {outcome['parameters']} weights")
        parts.append(iterations(outcome["rows"]))
    return "\n\n".join(parts)


def every_damping(kept: Kept) -> str:
    """One line for each damping and solver, beside EK-FAC with the same damping."""
    heads = ["damping", "solver"]
    for protocol in kept.truth:
        heads += [f"LDS, {WORDS[protocol]}", "less EK-FAC"]
    heads += ["largest residual", "correlation with CG", "walks per query", "processor time"]
    lines = [_line(heads), "|---" * len(heads) + "|"]
    dampings = sorted({n.partition("-")[2] for n in kept.predicted} - {""}, key=float)
    names = ["layers", *(f"{solver}-{d}" for d in dampings for solver in TITLES)]
    for name in names:
        if name not in kept.predicted:
            continue
        solver, _, damping = name.partition("-")
        cells = [damping, TITLES[solver]]
        for protocol in kept.truth:
            own = lds(kept, name)[protocol]
            cells.append(str(own))
            same = f"ekfac-{damping}"
            gap = same in kept.predicted and name != same
            cells.append(str(difference(own, lds(kept, same)[protocol])) if gap else "")
        lines.append(_line(cells + _costs(kept.about["told"][name])))
    return "\n".join(lines)


def best_damping(kept: Kept) -> str:
    """One line for each solver, its damping chosen on other subsets, beside EK-FAC's best and
    beside the default (0.1 of each layer's mean eigenvalue)."""
    heads = ["solver, best damping"]
    for protocol in kept.truth:
        heads += [f"LDS, {WORDS[protocol]}", "less EK-FAC, best damping", "less EK-FAC, default"]
    lines = [_line(heads), "|---" * len(heads) + "|"]
    for solver in TITLES:
        cells = [TITLES[solver]]
        for protocol in kept.truth:
            name, reference = (best(kept, one, protocol) for one in (solver, "ekfac"))
            if name is None or reference is None or name == "layers":
                break
            own, other = lds(kept, name)[protocol], lds(kept, reference)[protocol]
            cells.append(f"{own}, at {name.partition('-')[2]}")
            cells.append("" if solver == "ekfac" else str(difference(own, other)))
            cells.append(str(difference(own, lds(kept, "layers")[protocol])))
        else:
            lines.append(_line(cells))
    return "\n".join(lines)


def iterations(rows: list[dict[str, Any]]) -> str:
    """Walks by damping, queries at once and preconditioner."""
    sizes = sorted({row["queries"] for row in rows})
    heads = ["damping", "preconditioner"]
    heads += [f"{n} queries at once" if n > 1 else "one query" for n in sizes]
    lines = [_line(heads), "|---" * len(heads) + "|"]
    for damping in sorted({row["damping"] for row in rows}, reverse=True):
        for preconditioner in (None, "ekfac"):
            cells = [f"{damping:g}", "EK-FAC" if preconditioner else "none"]
            for size in sizes:
                asked = {"damping": damping, "preconditioner": preconditioner, "queries": size}
                walks = [row["walks"] for row in rows if asked.items() <= row.items()]
                cells.append(str(*walks))
            lines.append(_line(cells))
    return "\n".join(lines)


def _costs(told: Mapping[str, Any]) -> list[str]:
    residual, correlation, walks = told["residual"], told["correlation"], told["walks"]
    return [
        "" if residual is None else f"{residual:.1e}",
        "" if correlation is None else f"{correlation:.3f}",
        f"{walks:.1f}" if walks else "",
        f"{told['seconds']:.1f} s",
    ]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
