"""Sentence pairs in the form of DATE-LM's two application tasks, at the size of the data at hand.

python -m experiments.judges.text --data-root FOLDER

3000 development pairs of MNLI and, hidden among them, 150 pairs regenerated from the templates of
HANS, five of each of its 30 patterns. Queries are two further pairs of each pattern.

- *Filtering* (toxicity or bias there): which training pairs are of the hidden kind? A training
  pair's score is its mean over the queries, the references; judged by the area under the
  precision-recall curve.
- *Factual attribution*: which training pairs follow the query's own pattern? Recall@50 and MRR.

Nothing here is a result on MNLI, HANS or DATE-LM. ``experiments.judges.date_lm`` reads DATE-LM's
own data and checkpoints.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from experiments.judges import methods, names, quanda_metrics
from experiments.judges.date_lm import factual_attribution, filtering
from experiments.judges.run import RESULTS, Notes
from experiments.judges.setting import Problem
from tda_lightning import Scores, Trajectory, TrajectoryRecorder
from tda_lightning.cli.command import quiet_lightning
from tda_lightning.cli.trainers import SILENT
from tda_lightning.evaluation import bm25, last_layer_cosine, times_similarity
from tda_lightning.examples.data import MNLIData
from tda_lightning.examples.data.pairs import LABELS, Pair, words
from tda_lightning.examples.models import Classifier, Encoder
from tda_lightning.report import interactions
from tda_lightning.tasks import ClassificationTask

NUM_MNLI, HIDDEN, ASKED = 3000, 5, 2  # the latter two of each pattern
EPOCHS, BATCH_SIZE, RATE, SEED = 4, 32, 1e-3, 0
HEAD = "network.head"
GROUPED = "EK-FAC"  # whose scores are shown by groups
THEIRS = ("CaptumTracInCPFast", "TRAK", names.BASELINE)


@dataclass(frozen=True)
class Pairs:
    """The data.

    Attributes:
        problem: what quanda is shown.
        sought: which training pairs follow each query's pattern, bool [query, train].
        train_words: of each training pair.
        query_words: of each query.
        train_groups: set, heuristic and label of each training pair.
        query_groups: of each query.
    """

    problem: Problem
    sought: Tensor
    train_words: Sequence[Sequence[str]]
    query_words: Sequence[Sequence[str]]
    train_groups: Sequence[str]
    query_groups: Sequence[str]


def pairs(root: str) -> Pairs:
    """MNLI with some of HANS among it."""
    data = MNLIData(root, num_train=NUM_MNLI, num_query=None, queries="hans")
    data.setup()
    hans = data.pairs["query"]
    hidden = _of_each_pattern(hans, "train", HIDDEN)
    asked = _of_each_pattern(hans, "eval", ASKED)
    inputs, labels = data.query_dataset.tensors
    own = data.train_dataset.tensors
    train = TensorDataset(torch.cat([own[0], inputs[hidden]]), torch.cat([own[1], labels[hidden]]))
    special = torch.arange(len(train)) >= len(own[0])
    patterns = [*[""] * len(own[0]), *(hans[place].subcase for place in hidden)]
    sought = torch.tensor([[name == hans[place].subcase for name in patterns] for place in asked])
    problem = Problem("text", train, TensorDataset(inputs[asked], labels[asked]), 2)
    everything = [*data.pairs["train"], *(hans[place] for place in hidden)]
    return Pairs(
        Problem(**{**vars(problem), "special": special}),
        sought,
        [_words(pair) for pair in everything],
        [_words(hans[place]) for place in asked],
        [_group(pair) for pair in everything],
        [_group(hans[place]) for place in asked],
    )


def _of_each_pattern(hans: Sequence[Pair], origin: str, count: int) -> list[int]:
    found: dict[str, list[int]] = {}
    for place, pair in enumerate(hans):
        if pair.origin == origin:
            found.setdefault(pair.subcase, []).append(place)
    return [place for places in found.values() for place in places[:count]]


def _group(pair: Pair) -> str:
    label = "yes" if LABELS[pair.gold_label] == 0 else "no"
    return f"{pair.heuristic.replace('_', ' ') or 'MNLI'}, {label}"


def _words(pair: Pair) -> list[str]:
    return [*words(pair.premise), *words(pair.hypothesis)]


def recorded(problem: Problem, folder: Path) -> tuple[Trajectory, Classifier]:
    """The run, trained if it is not there, and the model with its last weights."""

    def module() -> Classifier:
        network = Encoder(2048, 48, 2)
        return Classifier(network, partial(torch.optim.AdamW, lr=RATE, weight_decay=0.01))

    if not (folder / "recorded").exists():
        seed_everything(SEED, verbose=False)
        order = torch.Generator().manual_seed(SEED)
        loader = DataLoader(problem.train, BATCH_SIZE, shuffle=True, generator=order)
        recorder = TrajectoryRecorder(str(folder / "run"), num_checkpoints=6, overwrite=True)
        Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[recorder], **SILENT).fit(
            module(), loader
        )
        (folder / "recorded").touch()
    run, own = Trajectory.load(str(folder / "run")), module().eval()
    own.load_state_dict(dict(run.checkpoints[run.last_step].parameters))
    return run, own


def main() -> None:
    """Train, explain, judge: goes on where it stopped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", required=True, help="folder of the data sets")
    parser.add_argument("--methods", nargs="*", default=[*names.OURS, *THEIRS])
    parser.add_argument("--folder", type=Path, default=Path("runs/judges"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_lightning()
    warnings.filterwarnings("ignore")
    folder = options.folder.absolute() / "text"
    folder.mkdir(parents=True, exist_ok=True)
    data = pairs(options.data_root)
    run, model = recorded(data.problem, folder)
    notes = Notes(RESULTS / "text.json")
    notes.once("accuracy", lambda: right(model, data.problem))
    end = run.checkpoints[run.last_step].parameters
    task = ClassificationTask()
    cosines = last_layer_cosine(model, task, end, data.problem.train, data.problem.query).values
    rows = {"embedding similarity": cosines}
    rows["BM25"] = bm25(data.train_words, data.query_words).values
    for name in options.methods:
        file = folder / f"{name}.pt"
        if not file.exists():
            print(f"text: {name}", flush=True)
            method = methods.method(name, run, model, folder / "cache", HEAD)
            torch.save(methods.explained(method, model, data.problem), file)
        rows[name] = torch.load(file, weights_only=True)["values"]
    for name in names.OURS.keys() & rows.keys():
        rows[f"{name} x similarity"] = times_similarity(Scores(rows[name]), cosines).values
    if GROUPED in rows:
        notes.once("interactions", lambda: by_group(rows[GROUPED], data))
    for name, values in rows.items():
        notes.once(name, lambda v=values: judged(v, data, model))


def right(model: Classifier, problem: Problem) -> dict[str, float]:
    """Share of right answers: of the training pairs of MNLI, of the hidden pairs, of the
    queries."""

    def share(inputs: Tensor, labels: Tensor) -> float:
        with torch.no_grad():
            said = torch.cat([model(part).argmax(1) for part in inputs.split(256)])
        return float((said == labels).float().mean())

    inputs, labels = problem.train.tensors
    hidden = problem.special
    return {
        "MNLI": share(inputs[~hidden], labels[~hidden]),
        "hidden": share(inputs[hidden], labels[hidden]),
        "queries": share(*problem.query.tensors),
    }


def by_group(values: Tensor, data: Pairs) -> dict[str, Any]:
    """Scores by group of queries and of training pairs, as lists."""
    found = interactions(Scores(values), data.train_groups, data.query_groups)
    return {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in vars(found).items()
    }


def judged(values: Tensor, data: Pairs, model: Classifier) -> dict[str, Any]:
    """DATE-LM's measures, and quanda's that apply to text."""
    from quanda.metrics.downstream_eval import ClassDetectionMetric, MRRMetric, RecallAtKMetric
    from quanda.metrics.heuristics import TopKCardinalityMetric

    problem = data.problem
    inputs, _ = problem.query.tensors
    with torch.no_grad():
        targets = model(inputs).argmax(1)
    given = {"model": model, "train_dataset": problem.train}
    found: dict[str, Any] = {
        "filtering": filtering(values, problem.special),
        **factual_attribution(values, data.sought),
    }
    rank, recall = MRRMetric(**given), RecallAtKMetric(**given, k=quanda_metrics.TOP)
    rank.update(values, data.sought)
    recall.update(values, data.sought)
    classes = ClassDetectionMetric(**given, s=quanda_metrics.TOP)
    classes.update(values, targets)
    top = TopKCardinalityMetric(**given, top_k=quanda_metrics.TOP)
    top.update(values)
    for name, metric in (
        *(("quanda MRR", rank), ("quanda recall", recall)),
        *(("class", classes), ("cardinality", top)),
    ):
        found[name] = quanda_metrics.told(metric)
    return found


if __name__ == "__main__":
    main()
