"""Record, score at several points, retrain: one study after another, going on where it stopped.

python -m experiments.question.run --data-root FOLDER                      # all of them: a day
python -m experiments.question.run concrete --data-root FOLDER
python -m experiments.question.run mnist --data-root FOLDER --rows source@0.5 --no-truths

The runs, subsets and retrainings on half of the data are those of experiments/fidelity, whose
results are kept, and the runs are trained again to the bit. What stands in results/ is not done
again, whatever is on this machine: so rows are added to it from wherever there is time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.fidelity.run import tda
from experiments.question.kept import has_row, has_truth, keep
from experiments.question.studies import ESTIMATORS, MEMBERS, STUDIES, Study, rows

RUNS = Path("runs/question")


def main() -> None:
    """The studies that are named, or all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--data-root", help="folder of the data sets")
    parser.add_argument("--rows", nargs="*", help="these alone, such as source@0.5")
    parser.add_argument("--no-truths", action="store_true", help="no retraining")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    for name in options.studies:
        if name not in STUDIES:
            parser.error(f"expected studies among {', '.join(STUDIES)}, got {name}")
    for name in options.studies or STUDIES:
        study, folder = STUDIES[name], RUNS / name
        if not (folder / "config.yaml").exists():
            root = [] if options.data_root is None else [f"data.root={options.data_root}"]
            renamed = [f"experiment=fidelity/{name}", f"name=question/{name}"]
            tda("train", *renamed, *root, f"threads={options.threads}")
        score(name, study, folder, options.rows, options.threads)
        if not options.no_truths:
            retrain(name, study, folder, options.threads)
            keep(name, study, folder)


def score(name: str, study: Study, folder: Path, wanted: list[str] | None, threads: int) -> None:
    """The rows that are missing, each kept as soon as it is there."""
    for row, asked in rows(study).items():
        if has_row(name, row) or (wanted is not None and row not in wanted):
            continue
        target, of = folder / "scores" / f"{row}.h5", folder
        if not target.exists():
            common = [f"threads={threads}"]
            if asked.ensemble is not None:
                of = folder / "ensemble" / asked.ensemble
                kind = [f"kind={asked.ensemble}", f"members={MEMBERS}"]
                tda("ensemble", f"trajectory={folder}", *kind, *common)
            tda(
                "attribute",
                f"trajectory={of}",
                *ESTIMATORS[asked.estimator],
                *asked.point.settings,
                f"scores='{target}'",
                "self_influence=false",
                *common,
            )
        keep(name, study, folder)


def retrain(name: str, study: Study, folder: Path, threads: int) -> None:
    """The truths that are missing, by ``tda evaluate``."""
    scores = [file for file in (folder / "scores").glob("*.h5") if "+" not in file.name]
    for protocol, share in study.truths:
        if has_truth(name, protocol, share):
            continue
        how = f"together={study.together}" if protocol == "single_run" else "seeds=2"
        tda(
            "evaluate",
            f"trajectory={folder}",
            f"alpha={share}",
            "baselines=[random]",
            f"scores='{scores[0]}'",
            f"protocol={protocol}",
            how,
            f"num_subsets={study.subsets}",
            f"threads={threads}",
        )
        keep(name, study, folder)


if __name__ == "__main__":
    main()
