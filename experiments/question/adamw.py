"""Where to take the derivative of a run of AdamW, on problems so small that it is exact.

python -m experiments.question.adamw --data-root FOLDER                  # all, an hour and a half
python -m experiments.question.adamw concrete --data-root FOLDER

What exists is kept, point by point (runs/question/adamw); the outcome goes to results/adamw_*.npz,
which experiments.question.table reads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.question.tiny import PROBLEMS, Problem, Runs, measure, scores, train
from experiments.question.tiny_table import ASKED, few
from tda_lightning.evaluation.linear_datamodeling import draw_subsets

WORK = Path("runs/question/adamw")
RESULTS = Path(__file__).parent / "results"
SUBSETS, FRESH, STACKED = 100, (101, 102, 103, 104), 8
SHARES = (0.99, 0.95, 0.8, 0.5, 0.2)  # of the training set that a subset keeps
SPEEDS = (0.5, 0.5**0.5, 0.25, 0.95, 0.8, 0.2)  # multiples of the rate
FEW = dict.fromkeys(("mnist", "transformer"), (0.95, 0.5))  # where others would take too long
# Points where the derivative is taken, the most important ones first; see points().
COUNTS = {
    "concrete": (16, 8, 4, 8, 4, 0),
    "mnist": (8, 0, 2, 4, 0, 0),
    "transformer": (4, 0, 2, 2, 0, 2),
}


def main() -> None:
    """The problems that are named, or all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("problems", nargs="*", metavar="PROBLEM", help=", ".join(PROBLEMS))
    parser.add_argument("--data-root", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.problems or PROBLEMS:
        problem, folder = PROBLEMS[name](options.data_root), WORK / name
        folder.mkdir(parents=True, exist_ok=True)
        retrain(problem, FEW.get(name, SHARES), folder)
        for some in stacks(points(problem, *COUNTS[name]), folder):
            differentiate(problem, some, folder)
            keep(name, problem, folder)


def points(
    problem: Problem, draws: int, complements: int, raw: int, seeds: int, others: int, slower: int
) -> dict[str, Runs]:
    """Runs at which the scores are taken, by name.

    Args:
        draws: random halves at weights 0 and 1.
        complements: of the first draws, the other halves.
        raw: of the first draws: half the rate; expected second moments; coordinates without a
            second moment passing their derivative on.
        seeds: fresh ones, with all weights 1, with a random half each, with half the rate.
        others: draws of each of the other shares.
        slower: seeds with a quarter of the rate; and an eighth of it in the recorded run.
    """
    whole = torch.ones(1, problem.num_train, dtype=torch.float64)

    def drawn(share: float, number: int) -> Tensor:
        size = draw_subsets(problem.num_train, share, number + 1, seed=7)
        return size[number:].double()

    found = {
        "whole": Runs([0], whole),
        "half": Runs([0], whole / 2),
        **{
            f"rate{speed:g}": Runs([0], whole * speed, speeds=[speed])
            for speed in SPEEDS[: None if others else 3]
        },
        "spread": Runs([0], whole / 2, spread=0.25),
        "spread-slow": Runs([0], whole / 2, spread=0.25, speeds=[0.5]),
        "held": Runs([0], whole / 2, spread=0.25, held=True),
        "held-slow": Runs([0], whole / 2, spread=0.25, held=True, speeds=[0.5]),
        **{
            f"signs{count}-slow": Runs([0], whole / 2, spread=0.25, signs=count, speeds=[0.5])
            for count in (1, 4, 16)
        },
        **{f"draw-{k}": Runs([0], drawn(0.5, k)) for k in range(draws)},
        **{f"complement-{k}": Runs([0], 1 - drawn(0.5, k)) for k in range(complements)},
        **{f"seed-whole-{k}": Runs([k], whole) for k in range(1, seeds + 1)},
        **{f"seed-draw-{k}": Runs([k], drawn(0.5, 20 + k)) for k in range(1, seeds + 1)},
        **{f"seed-slow-{k}": Runs([k], whole / 2, speeds=[0.5]) for k in range(1, seeds + 1)},
        **{f"draw-slow-{k}": Runs([0], drawn(0.5, k), speeds=[0.5]) for k in range(raw)},
        **{
            f"seed-held-slow-{k}": Runs([k], whole / 2, spread=0.25, held=True, speeds=[0.5])
            for k in range(1, seeds + 1)
        },
        **{f"draw-held-{k}": Runs([0], drawn(0.5, k), spread=0.25, held=True) for k in range(raw)},
    }
    found |= {f"raw-{k}": Runs([0], drawn(0.5, k), blind=False) for k in range(raw)}
    if slower:
        found["rate0.125"] = Runs([0], whole / 8, speeds=[0.125])
    found |= {f"seed-slower-{k}": Runs([k], whole / 4, speeds=[0.25]) for k in range(1, slower + 1)}
    for share in (0.95, 0.8, 0.2):
        found |= {f"draw{share}-{k}": Runs([0], drawn(share, k)) for k in range(others)}
    return found


def stacks(wanted: dict[str, Runs], folder: Path) -> Iterator[dict[str, Runs]]:
    """Those that are missing, like ones together."""
    missing = {k: runs for k, runs in wanted.items() if not (folder / f"{k}.npy").exists()}

    def kind(item: tuple[str, Runs]) -> tuple[object, ...]:
        return item[1].spread, item[1].held, item[1].signs, item[1].blind

    for _, like in groupby(missing.items(), kind):
        rows = list(like)
        for first in range(0, len(rows), STACKED):
            yield dict(rows[first : first + STACKED])


def differentiate(problem: Problem, some: dict[str, Runs], folder: Path) -> None:
    """Scores at several points at once, a file for each: float32 [query, train]."""
    one = next(iter(some.values()))
    runs = Runs(
        [seed for each in some.values() for seed in each.seeds],
        torch.cat([each.weights for each in some.values()]),
        spread=one.spread,
        held=one.held,
        signs=one.signs,
        blind=one.blind,
        speeds=[speed for each in some.values() for speed in each.speeds or (1.0,)],
    )
    for name, values in zip(some, scores(problem, runs), strict=True):
        np.save(folder / f"{name}.npy", values.numpy())
        print(folder.name, name, flush=True)


def retrain(problem: Problem, shares: tuple[float, ...], folder: Path) -> None:
    """The truth for subsets of each share: float32 [subset, query], and [seed, subset, query]."""
    truths: dict[str, tuple[tuple[int, ...], Tensor, bool]] = {
        "recorded": ((0,), torch.ones(1, problem.num_train), False)
    }
    for share in shares:
        subsets = draw_subsets(problem.num_train, share, SUBSETS).double()
        truths[f"single_run-{share}"] = (0,), subsets, False
        if share < 0.99 and (share == 0.5 or len(shares) > 2):  # batches must add up
            truths[f"fresh-{share}"] = FRESH, subsets, True
    for name, (seeds, subsets, removed) in truths.items():
        file = folder / f"{name}.truth.npy"
        if file.exists():
            continue
        outcomes = []
        for seed in seeds:
            for some in subsets.double().split(25):
                runs = Runs([seed] * len(some), some, removed=removed)
                last = train(problem, runs, torch.float64)[-1]
                outcomes.append(measure(problem, last.weights).detach())
        found = torch.cat(outcomes).unflatten(0, (len(seeds), -1))
        np.save(file, (found if removed else found[0]).float().numpy())
        print(folder.name, name, flush=True)


def keep(name: str, problem: Problem, folder: Path) -> None:
    """All of the above in one file: sums of scores over what each subset leaves out.

    ``removed-SHARE`` is float16 [point, query, subset], in multiples of ``unit``, float64
    [point, query]; the truths are as they were; ``points`` is a JSON list of names, and only
    ``few`` of them are there for shares that no table asks for.
    """
    files = [key for key in points(problem, *COUNTS[name]) if (folder / f"{key}.npy").exists()]
    values = torch.stack([torch.from_numpy(np.load(folder / f"{key}.npy")) for key in files])
    truths = sorted(folder.glob("*.truth.npy"))
    arrays = {path.name.removesuffix(".truth.npy"): np.load(path) for path in truths}
    total = values.sum(2)
    sums = {
        share: values @ draw_subsets(problem.num_train, share, SUBSETS).double().T
        for share in FEW.get(name, SHARES)
    }
    unit = torch.stack([(s - total[..., None]).abs().amax(-1) for s in sums.values()]).amax(0)
    unit = unit.clamp_min(1e-300)
    for share, found in sums.items():
        removed = (total[..., None] - found) / unit[..., None]
        names = files if str(share) in ASKED else few(files)
        rows = removed[[files.index(key) for key in names]]
        arrays[f"removed-{share}"] = rows.numpy().astype(np.float16)
    arrays["unit"] = unit.numpy()
    aside = RESULTS / f"adamw_{name}.part.npz"
    np.savez_compressed(aside, points=json.dumps(files), **arrays)
    aside.replace(RESULTS / f"adamw_{name}.npz")


if __name__ == "__main__":
    main()
