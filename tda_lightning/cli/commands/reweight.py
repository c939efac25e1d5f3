"""``tda reweight``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tda_lightning.cli.command import clear_errors, require_new, required
from tda_lightning.cli.question import ask_about_scored_queries
from tda_lightning.cli.recorded_run import Replayable
from tda_lightning.evaluation import measure, retrain
from tda_lightning.records.data_module import AttributedData, Grouped, Textual
from tda_lightning.records.provenance import well_formed
from tda_lightning.records.scores import Scores
from tda_lightning.report.columns import guess, raw_labels
from tda_lightning.reweighting import (
    balanced_weights,
    predicted_change,
    save_weights,
    weights_from_scores,
)
from tda_lightning.reweighting.features import column_features, is_label, word_features

_LABELS = ("label", "class", "labels", "target")
BY = ("scores", "words", "columns")


@clear_errors
def reweight(config: DictConfig) -> None:
    """Write weights of the training examples, and say what training with them does."""
    folder = Path(
        required(config, "trajectory", "tda reweight trajectory=FOLDER by=scores scores=FILE")
    )
    if config.by not in BY:
        raise ValueError(f"by must be one of {', '.join(BY)}, got {config.by!r}.")
    if (config.by == "scores") != (config.scores is not None):
        raise ValueError(
            f"by=scores takes its weights from scores=FILE, written by tda attribute; got "
            f"by={config.by} and scores={config.scores}."
        )
    target = Path(config.weights or folder / f"weights-{config.by}.csv")
    require_new(config, "weights, which are kept", "weights=FILE", target)
    scores = None
    if config.by == "scores":
        scores = Scores.load(config.scores)
        ask_about_scored_queries(config, scores)
    trajectory, _, data, module, task, train, query = Replayable.load(config, folder)
    if scores is not None:
        _require_of_run(scores, len(train), len(query), config)
        weights = weights_from_scores(scores.values, config.rate, config.bound)
    else:
        weights = _balanced(config, data)
    save_weights(weights, target)
    size = float(weights.sum() ** 2 / weights.square().sum())
    print(
        f"Weighted {len(weights)} training examples: from {float(weights.min()):.3g} to "
        f"{float(weights.max()):.3g}, {int((weights == 0).sum())} of them 0, as many as "
        f"{size:.0f} with equal weights: {target}"
    )
    if not config.retrain:
        return
    last = trajectory.checkpoints[trajectory.last_step]
    states = (
        {**last.buffers, **last.parameters},
        retrain(trajectory, module, task, train, weights),
    )
    before, after = (
        measure(module, task, state, query, config.batch_size, trajectory).double()
        for state in states
    )
    rows = {"recorded": before, "with these weights": after, "true change": after - before}
    if scores is not None:
        _require_same_queries(scores, before, config)
        rows["predicted change"] = predicted_change(scores.values, weights)
    Console().print(_table(rows))
    for note in _outcome_notes(rows, scores):
        print(note)


def _outcome_notes(rows: Mapping[str, Tensor], scores: Scores | None) -> Iterator[str]:
    """What a reader of the table should know."""
    sizes = "" if scores is None else scores.provenance.get("sizes", "")
    if sizes and not sizes.startswith("predicted"):
        yield f"Do not read the predicted change as a size. The scores give {sizes}."
    if float(rows["true change"].mean()) > 0:
        yield (
            "These weights made the queries worse on average. Try a smaller rate, another "
            "estimator, or equal weights."
            if scores is not None
            else "These weights made the queries worse on average, which is what evenness may cost."
        )


def _require_of_run(scores: Scores, num_train: int, num_query: int, config: DictConfig) -> None:
    """Refuse scores of something else than removals and the measurement of this run's queries."""
    if scores.num_train != num_train or scores.provenance.get("edits"):
        raise ValueError(
            f"{config.scores} has {scores.num_train} columns, expected the removals of the "
            f"{num_train} training examples, without edits= or pool=."
        )
    other = scores.num_queries != num_query or scores.provenance.get("measurement")
    if config.retrain and other:
        raise ValueError(
            f"{config.scores} is about {scores.num_queries} queries and the measurement "
            f"{scores.provenance.get('measurement') or 'of the task'}; retraining compares the "
            f"task's own measurement of {num_query} queries. Add retrain=false, or give the same "
            "data settings as to tda attribute."
        )


def _require_same_queries(scores: Scores, measured: Tensor, config: DictConfig) -> None:
    """Refuse to compare with queries that the recorded run answers otherwise than those that were
    scored: they are others."""
    made = well_formed(scores.provenance)
    scored = torch.tensor(made.get("measurements", []), dtype=torch.float64)
    if "members" in made or len(scored) != len(measured):  # a mean over several runs tells nothing
        return
    other = ~torch.isclose(scored, measured.double(), rtol=0.01, atol=1e-3)
    if bool(other.any()):
        first = int(other.nonzero()[0])
        raise ValueError(
            f"{config.scores} is about other queries than these: the recorded run measured "
            f"{float(scored[first]):.4g} for query {first}, and {float(measured[first]):.4g} here. "
            "Add retrain=false, or give the same data settings as to tda attribute."
        )


def _balanced(config: DictConfig, data: AttributedData) -> Tensor:
    """Weights under which words or columns do not tell the label."""
    given = raw_labels(data.train_dataset)
    if given is None or any(isinstance(label, float) for label in given):
        raise ValueError(
            f"by={config.by} evens out what features say about the label, and the training set has "
            "no classes for labels. Use by=scores."
        )
    names = sorted(set(given), key=str)
    labels = torch.tensor([names.index(label) for label in given])
    if config.by == "words":
        if not isinstance(data, Textual):
            raise ValueError(
                f"by=words needs a data module with documents(split), {type(data).__name__} has "
                "none. Use by=columns, or tda_lightning.reweighting.balanced_weights."
            )
        features, words = word_features(data.documents("train"), config.min_count)
    else:
        columns = _columns(config, data, labels.tolist())
        features, words = column_features(columns, config.min_count)
    found = balanced_weights(features, labels, config.bound, config.penalty)
    table = Table(title=f"What {len(words)} features say about the label: share of it above all")
    for name in ("", "weights 1", "these weights"):
        table.add_column(name, justify="right" if name else "left")
    before, after = found.before.abs(), found.after.abs()
    table.add_row("mean", f"{float(before.mean()):.4f}", f"{float(after.mean()):.4f}")
    table.add_row("largest", f"{float(before.max()):.4f}", f"{float(after.max()):.4f}")
    for place in before.amax(1).argsort(descending=True)[:5].tolist():
        label = int(before[place].argmax())
        cells = (float(part[place, label]) for part in (found.before, found.after))
        table.add_row(f"{words[place]}, {names[label]}", *(f"{cell:+.4f}" for cell in cells))
    Console().print(table)
    return found.weights


def _columns(config: DictConfig, data: AttributedData, labels: Sequence[int]) -> dict[str, Any]:
    """The columns asked for; by default all but those that are the label under another name."""
    grouped = isinstance(data, Grouped)
    found: Mapping[str, Any] = (
        data.group_columns("train") if grouped else guess(data.train_dataset)  # type: ignore[attr-defined]
    )
    if config.columns is not None:
        unknown = [name for name in config.columns if name not in found]
        if unknown or not config.columns:
            raise ValueError(
                f"columns must be some of {', '.join(map(str, found)) or 'none'}, which is what "
                f"the training set has; got {', '.join(map(str, unknown)) or 'none'}."
            )
    same = [name for name, values in found.items() if is_label(list(map(str, values)), labels)]
    asked = list(found) if config.columns is None else list(config.columns)
    wanted = [name for name in asked if name not in same]
    if not wanted or (config.columns is not None and len(wanted) < len(asked)):
        given = ", ".join(str(name) for name in asked if name in same)
        others = ", ".join(str(name) for name in found if name not in same)
        raise ValueError(
            f"Each value of {given or 'a column'} comes with one label alone, so no weights can "
            "keep it from telling the label. The training set has "
            f"{others or 'nothing'} besides."
        )
    left = [name for name in asked if name in same and str(name).lower() not in _LABELS]
    if left:
        print(f"Left out, since each of its values comes with one label alone: {', '.join(left)}.")
    return {name: found[name] for name in wanted}


def _table(rows: Mapping[str, Tensor]) -> Table:
    """Means over the queries."""
    count = len(next(iter(rows.values())))
    table = Table(title=f"Mean measurement of {count} queries (smaller is better)")
    table.add_column("")
    table.add_column("mean", justify="right")
    table.add_column("correlation with the true change", justify="right")
    true = rows["true change"]
    for name, values in rows.items():
        cell = ""
        if name == "predicted change" and count > 2:
            cell = f"{float(torch.corrcoef(torch.stack([values, true]))[0, 1]):.3f}"
        table.add_row(name, f"{float(values.mean()):.5g}", cell)
    return table
