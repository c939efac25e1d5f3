"""``tda evaluate judge=[...]``: judgements of scores that need no retraining."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from tda_lightning.attribution.module import AttributionModule
from tda_lightning.cli.evaluation_baselines import baseline, baselines_of
from tda_lightning.cli.retraining import RecordedRun
from tda_lightning.cli.run_config import build, trusts
from tda_lightning.cli.trainers import silent_trainer
from tda_lightning.evaluation import (
    BASELINES,
    Interval,
    NothingToRankError,
    agreement,
    average_precision,
    last_layer_cosine,
    predicted_classes,
    random_scores,
    randomised,
    shared_group,
    times_similarity,
    top_cardinality,
)
from tda_lightning.records.data_module import Grouped
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.provenance import well_formed
from tda_lightning.records.scores import Scores
from tda_lightning.report.columns import group, guess, raw_labels

JUDGEMENTS = ("class", "subclass", "shortcut", "mixed", "cardinality", "randomisation")

Value = Interval | float | str  # a text says why there is none


@dataclass(frozen=True)
class Judged:
    """One row of the table.

    Attributes:
        name: of the scores.
        values: by judgement.
    """

    name: str
    values: dict[str, Value] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """With intervals over queries, and reasons where there is no number."""
        return {"name": self.name, **{name: _as_json(value) for name, value in self.values.items()}}


def check_judgements(config: DictConfig) -> None:
    """Refuse judgements that there are not, and those that lack a setting.

    Raises:
        ValueError: says what to give.
    """
    asked = list(config.judge)
    for name in asked:
        if name not in JUDGEMENTS:
            raise ValueError(f"judge must be among {', '.join(JUDGEMENTS)}, got {name}.")
    if "subclass" in asked and config.subclass is None:
        raise ValueError(
            "judge=subclass needs subclass=COLUMN, a column of the data that divides its classes "
            "further, such as subclass='gold label' of sentence pairs."
        )
    if {"shortcut", "mixed"} & {*asked} and (config.marked is None or len(config.marked) != 1):
        raise ValueError(
            "judge=shortcut and judge=mixed need marked={COLUMN: VALUE}, which says by a column of "
            "the data which training examples carry the shortcut or come from elsewhere, such as "
            "marked={origin: train}."
        )


@dataclass(frozen=True)
class _Row:
    """Scores to judge, or why there are none; and how the same are made of random weights."""

    name: str
    scores: Scores | str
    of_random_weights: Callable[[], Scores] | None = None


def judged_rows(run: RecordedRun, scores: Mapping[str, Scores]) -> Iterator[Judged]:
    """The scores; with ``similarity=true`` also times the similarity of last-layer features; and
    the baselines."""
    judges = {name: _JUDGES[name](run) for name in run.config.judge if name != "randomisation"}
    for row in _rows(run, scores):
        judged = Judged(row.name)
        for judgement in run.config.judge:
            try:
                if isinstance(row.scores, str):
                    value: Value = row.scores
                elif judgement != "randomisation":
                    value = judges[judgement](row.scores)
                elif row.of_random_weights is None:
                    value = "a product of two that are judged here"
                else:
                    value = agreement(row.scores, row.of_random_weights())
            except (NothingToRankError, UnsupportedTrainingError, ValueError) as error:
                value = str(error)
            judged.values[judgement] = value
        yield judged


def _rows(run: RecordedRun, scores: Mapping[str, Scores]) -> Iterator[_Row]:
    for name, own in scores.items():
        yield _Row(name, own, partial(_by_random_weights, run, own))
    if run.config.similarity:
        compared = (run.module, run.task, run.end, run.train, run.queries, run.config.batch_size)
        similar = last_layer_cosine(*compared)
        for name, own in scores.items():
            yield _Row(f"{name} x last_layer", times_similarity(own, similar))
    for name in baselines_of(run):
        made: Scores | str
        try:
            made = baseline(name, run)
        except (UnsupportedTrainingError, ValueError) as error:
            made = f"not possible: {error}"
        yield _Row(name, made, partial(_baseline_by_random_weights, run, name))


def column(run: RecordedRun, name: str, split: str) -> list[object] | None:
    """A column of the data, one value for each example; None where this split has none."""
    data = run.data
    dataset = data.train_dataset if split == "train" else data.query_dataset
    columns: Mapping[str, Any] = (
        data.group_columns(split) if isinstance(data, Grouped) else guess(dataset)
    )
    if name in columns:
        return list(columns[name])
    if split == "train":
        raise ValueError(
            f"The data have no column {name!r} of training examples; there are "
            f"{', '.join(columns) or 'none'}. A data module names some in group_columns(split)."
        )
    return None


def _class_judge(run: RecordedRun) -> Callable[[Scores], Value]:
    train, query = raw_labels(run.data.train_dataset), raw_labels(run.data.query_dataset)
    if train is None or query is None:
        raise ValueError(
            "judge=class needs one label for each example, and none are found in these data. Give "
            "judge=[subclass] subclass=COLUMN."
        )
    if any(isinstance(label, float) for label in [*train, *query]):
        raise ValueError(
            "judge=class compares classes, and the targets of these data are numbers, of which "
            "hardly any two are the same. Give judge=[subclass] subclass=COLUMN, which takes "
            "numbers in quarters of the training set."
        )
    return partial(shared_group, train_groups=train, query_groups=query, k=run.config.k)


def _subclass_judge(run: RecordedRun) -> Callable[[Scores], Value]:
    train, query = (column(run, run.config.subclass, split) for split in ("train", "query"))
    if train is None or query is None:
        raise ValueError(f"The queries have no column {run.config.subclass!r}.")
    if any(isinstance(value, float) for value in train):
        found = group({"value": train}, {"value": query}, range(len(query)))
        if not found:
            raise ValueError(
                f"All training examples have the same {run.config.subclass!r}: nothing to tell."
            )
        train, query = found[0].train.tolist(), found[0].query.tolist()  # type: ignore[union-attr]
    return partial(shared_group, train_groups=train, query_groups=query, k=run.config.k)


def _marked(run: RecordedRun) -> tuple[Tensor, Tensor]:
    """Which training examples are marked, bool [train], and which queries, bool [query]; all of
    them where the queries have no such column."""
    ((name, value),) = run.config.marked.items()
    train, query = column(run, name, "train"), column(run, name, "query")
    assert train is not None
    sought = _holding(name, value, train, "training example")
    if query is None:
        return sought, torch.ones(len(run.queries), dtype=torch.bool)
    return sought, _holding(name, value, query, "query")


def _holding(name: object, value: object, held: Sequence[object], what: str) -> Tensor:
    """Which examples hold the value in their column."""
    found = torch.tensor([str(own) == str(value) for own in held])
    if not bool(found.any()):
        raise ValueError(
            f"No {what} has {name}={value!r}; the column holds "
            f"{', '.join(sorted(set(map(str, held)))[:10])}."
        )
    return found


def _mixed_judge(run: RecordedRun) -> Callable[[Scores], Value]:
    sought, asked = _marked(run)
    return lambda own: average_precision(own.values[asked], sought)


def _shortcut_judge(run: RecordedRun) -> Callable[[Scores], Value]:
    """Of marked queries that the model takes for the marked examples' class, and that are not."""
    sought, asked = _marked(run)
    train, query = raw_labels(run.data.train_dataset), raw_labels(run.data.query_dataset)
    said = predicted_classes(run.module, run.task, run.end, run.queries)
    if train is None or query is None or said is None:
        raise ValueError("judge=shortcut needs a ClassificationTask and labelled examples.")
    classes = {train[place] for place in sought.nonzero().squeeze(1).tolist()}
    if len(classes) != 1:
        raise ValueError(
            f"A shortcut leads to one class, and the marked examples have {len(classes)}."
        )
    (target,) = classes
    if not isinstance(target, int):
        raise ValueError(f"judge=shortcut compares predictions with class numbers, got {target!r}.")
    misled = asked & torch.tensor([label != target for label in query]) & (said == target)
    if not bool(misled.any()):
        return lambda _: "no marked query is misled"
    return lambda own: average_precision(own.values[misled], sought)


def _cardinality_judge(run: RecordedRun) -> Callable[[Scores], Value]:
    return partial(top_cardinality, k=run.config.k)


_JUDGES: dict[str, Callable[[RecordedRun], Callable[[Scores], Value]]] = {
    "class": _class_judge,
    "subclass": _subclass_judge,
    "shortcut": _shortcut_judge,
    "mixed": _mixed_judge,
    "cardinality": _cardinality_judge,
}


def _by_random_weights(run: RecordedRun, scores: Scores) -> Scores:
    """Scores by the same estimator of the run with random weights.

    Raises:
        UnsupportedTrainingError: they are not made from checkpoints alone.
    """
    made = well_formed(scores.provenance)
    node = made.get("config", {}).get("estimator")
    if node is None:
        raise UnsupportedTrainingError("the scores were not made by tda attribute")
    if made.get("estimator") == "Unrolled" or node.get("order") == "recorded" or "what_if" in made:
        raise UnsupportedTrainingError("these scores train the run again, from its first weights")
    trajectory = randomised(run.trajectory, run.module, run.config.seed)
    attribution = AttributionModule(
        run.module, trajectory, build(node, trusts(run.config)), run.task
    )
    return attribution.attribute(
        run.train,
        run.queries,
        run.config.batch_size,
        trainer=silent_trainer(),
        self_influence=False,
        measurement=run.measurement,
    )


def _baseline_by_random_weights(run: RecordedRun, name: str) -> Scores:
    if name == "random":
        return random_scores(len(run.queries), len(run.train), run.config.seed + 1)
    assert name in BASELINES
    weights = randomised(run.trajectory, run.module, run.config.seed)
    return baseline(name, replace(run, trajectory=weights))


def _as_json(value: Value) -> object:
    if isinstance(value, Interval):
        return {"value": value.value, "over_queries": [value.low, value.high]}
    return {"reason": value} if isinstance(value, str) else {"value": value}
