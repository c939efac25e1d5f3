"""Train, explain, judge: every part goes on where it stopped.

python -m experiments.judges.run --data-root FOLDER [--problems clean text ...]
python -m experiments.judges.table --write

Recorded runs and explanations are kept in ``runs/judges``; what the judges say goes to
experiments/judges/results, which experiments.judges.table reads.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.judges import dattri_metrics as compared
from experiments.judges import methods, names, quanda_metrics, setting
from tda_lightning import Scores, Trajectory
from tda_lightning.cli.command import quiet_lightning
from tda_lightning.evaluation import draw_subsets, retrain_each, times_similarity
from tda_lightning.examples.models import Classifier
from tda_lightning.store.atomic_write import write_text
from tda_lightning.tasks import ClassificationTask

RESULTS = Path(__file__).parent / "results"
SUBSETS = 40


class Notes:
    """A JSON file of what has been found so far, by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """What is noted under ``name``; found and noted if it is not there."""
        if name not in self.found:
            print(f"{self.path.stem}: {name}", flush=True)
            self.found[name] = find()
            write_text(self.path, json.dumps(self.found, indent=1) + "\n")
        return self.found[name]


def main() -> None:
    """All problems that are not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", required=True, help="folder of the data sets")
    parser.add_argument("--problems", nargs="*", default=list(setting.PROBLEMS))
    parser.add_argument("--methods", nargs="*", default=list(names.METHODS))
    parser.add_argument("--folder", type=Path, default=Path("runs/judges"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_lightning()
    warnings.filterwarnings("ignore")
    RESULTS.mkdir(exist_ok=True)
    for name in options.problems:
        study(name, options.data_root, options.folder.absolute() / name, options.methods)


def study(name: str, root: str, folder: Path, wanted: list[str]) -> None:
    """One problem: every method's explanations, and what quanda says of them."""
    problem = setting.problem(name, root)
    folder.mkdir(parents=True, exist_ok=True)
    run, model = setting.recorded(problem, folder)
    notes = Notes(RESULTS / f"{name}.json")
    notes.once("accuracy", lambda: accuracy(model, problem))
    kept: dict[str, dict[str, Any]] = {}
    for title in wanted:
        method = methods.method(title, run, model, folder / "cache")
        file = folder / f"{title}.pt"
        if not file.exists():
            print(f"{name}: {title}", flush=True)
            torch.save(methods.explained(method, model, problem), file)
        found = kept[title] = torch.load(file, weights_only=True)
        judge(notes, title, problem, model, found.get("values"), found.get("self_influence"))
        if name == "clean":
            parts = ("first", "second", "again", "self")
            seconds = {part: round(found[part], 2) for part in parts}
            notes.once(f"{title}: seconds", lambda s=seconds: s)
            if title != "SOURCE, keep=0.5":  # trains the run again, from its first weights
                work = (method, problem, model, found["values"], folder)
                notes.once(
                    f"{title}: randomisation",
                    lambda w=work: quanda_metrics.randomised_model(*w),
                )
    cosines = methods.similarity(model, problem)
    for title in names.OURS:
        if title in kept and "values" in kept[title]:
            values = times_similarity(Scores(kept[title]["values"]), cosines).values
            judge(notes, f"{title} x similarity", problem, model, values, None)
            kept[f"{title} x similarity"] = {"values": values}
    if name == "clean":
        retrained(notes, problem, run, model, kept, folder)
    if name == "mislabelled":
        special = problem.special
        own = {t: one["self_influence"] for t, one in kept.items() if "self_influence" in one}
        notes.once("dattri: wrong labels", lambda: compared.wrong_labels(own, special))


def judge(
    notes: Notes,
    title: str,
    problem: setting.Problem,
    model: Classifier,
    values: Tensor | None,
    self_influence: Tensor | None,
) -> None:
    """Note quanda's verdict."""
    work = (problem, model, values, self_influence)
    notes.once(title, lambda: quanda_metrics.judged(*work))


def accuracy(model: Classifier, problem: setting.Problem) -> dict[str, float]:
    """Share of right answers."""
    with torch.no_grad():
        return {
            name: float((model(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean())
            for name, data in (("train", problem.train), ("query", problem.query))
        }


def retrained(
    notes: Notes,
    problem: setting.Problem,
    run: Trajectory,
    model: Classifier,
    kept: dict[str, dict[str, Any]],
    folder: Path,
) -> None:
    """quanda's and dattri's linear datamodeling scores, over the recorded run replayed and over
    trainings with fresh seeds, on half of the digits each."""
    subsets = draw_subsets(len(problem.train), 0.5, SUBSETS)
    for protocol in ("replayed", "fresh"):
        files = models(protocol, subsets, problem, run, model, folder)
        outcomes = losses(files, problem)
        for title, found in kept.items():
            work = (problem, model, found["values"], subsets, files, folder)
            notes.once(
                f"{title}: LDS {protocol}", lambda w=work: quanda_metrics.linear_datamodeling(*w)
            )
        values = {title: found["values"] for title, found in kept.items()}
        notes.once(
            f"dattri: LDS {protocol}",
            lambda v=values, o=outcomes: compared.datamodeling(v, subsets, o),
        )


def models(
    protocol: str,
    subsets: Tensor,
    problem: setting.Problem,
    run: Trajectory,
    model: Classifier,
    folder: Path,
) -> list[str]:
    """Files of the weights trained on each subset."""
    files = [str(folder / f"{protocol}-{number}.pt") for number in range(len(subsets))]
    if not Path(files[-1]).exists():
        print(f"{problem.name}: {len(files)} trainings, {protocol}", flush=True)
        if protocol == "replayed":
            task = ClassificationTask()
            states = retrain_each(run, model, task, problem.train, subsets.float())
            for file, state in zip(files, states, strict=True):
                torch.save(state, file)
        else:
            for number, (file, row) in enumerate(zip(files, subsets, strict=True)):
                part = torch.utils.data.TensorDataset(*problem.train[row.nonzero().squeeze(1)])
                fresh = setting.trained(part, problem.outputs, 1000 + number, None)
                torch.save(fresh.state_dict(), file)
    return files


def losses(files: list[str], problem: setting.Problem) -> Tensor:
    """Of the labels of the queries after each training, [subset, query]."""
    inputs, labels = problem.query.tensors
    module = setting.network(problem.outputs).eval()
    rows = []
    for file in files:
        module.load_state_dict(torch.load(file, weights_only=True))
        with torch.no_grad():
            rows.append(torch.nn.functional.cross_entropy(module(inputs), labels, reduction="none"))
    return torch.stack(rows)


if __name__ == "__main__":
    main()
