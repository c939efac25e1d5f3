"""A data module whose training set lacks some examples and has other labels for some.

``tda train drop=FILE`` writes what it left out into the recorded configuration, so that everything
that is built from it sees the same training set, whatever becomes of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset

from tda_lightning.cli.added_data import with_extra
from tda_lightning.cli.changed_data import training_set, with_changed_training_set
from tda_lightning.edits import Relabel, Removal, load_edits
from tda_lightning.records.rendered import Rendered
from tda_lightning.report.columns import raw_labels

_LABEL_KEYS = ("label", "labels", "y", "target", "targets")
_LABEL_COLUMNS = ("label", "class")


@dataclass(frozen=True)
class Drop:
    """What ``drop`` does to a training set, in the indices of the whole of it.

    Attributes:
        left_out: examples that are not trained on.
        relabelled: other labels by index.
    """

    left_out: tuple[int, ...] = ()
    relabelled: Mapping[int, object] | None = None

    def kept(self, count: int) -> list[int]:
        """Indices of what is left of ``count`` examples."""
        out = set(self.left_out)
        return [index for index in range(count) if index not in out]

    def then(self, edits: Sequence[Removal | Relabel], count: int) -> Drop:
        """With further edits, whose indices count what is left of ``count`` examples."""
        kept = self.kept(count)
        out, relabelled = list(self.left_out), dict(self.relabelled or {})
        for edit in edits:
            index = kept[edit.index]
            if isinstance(edit, Relabel):
                relabelled[index] = edit.label
            else:
                out.append(index)
                relabelled.pop(index, None)
        return Drop(tuple(sorted(out)), relabelled)


def read_drop(files: str | Sequence[str], count: int) -> Drop:
    """The edits of one file, or of several in turn, each about what the one before it left.

    Args:
        count: number of examples in the whole training set.

    Raises:
        FileNotFoundError, ValueError: as :func:`~tda_lightning.edits.load_edits`; also where
            nothing is left.
    """
    drop = Drop()
    for path in [files] if isinstance(files, str) else files:
        left = count - len(drop.left_out)
        drop = drop.then(load_edits(path, left), count)
    if len(drop.left_out) >= count:
        raise ValueError(f"drop leaves none of the {count} training examples.")
    return drop


def apply_drop(config: DictConfig, data: Any) -> Any:
    """The data module without what ``drop=FILE`` names, which the configuration then lists."""
    if config.drop is None:
        return data
    drop = read_drop(config.drop, len(training_set(data)))
    config.drop = {"left_out": list(drop.left_out), "relabelled": dict(drop.relabelled or {})}
    return without(data, drop)


def as_trained(
    run_config: DictConfig,
    data: Any,
    trust: bool = False,
    asked: Mapping[str, object] | None = None,
) -> Any:
    """The data module of a recorded configuration, without what its training left out and with what
    it added.

    Args:
        trust: build classes from anywhere.
        asked: other settings that the data module was built with.
    """
    setting: Any = OmegaConf.to_container(run_config.get("drop") or OmegaConf.create({}))
    if setting:
        data = without(data, Drop(tuple(setting["left_out"]), setting["relabelled"]))
    return with_extra(run_config, data, trust, asked or {})


@dataclass(frozen=True)
class EditedExamples(Dataset[object]):
    """A map-style data set without some examples and with other labels for some."""

    dataset: Any
    kept: Sequence[int]
    relabelled: Mapping[int, object]

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def labels(self) -> list[Any] | None:
        """The labels as they are now; None where they cannot be read at once."""
        whole = raw_labels(self.dataset)
        if whole is None:
            return None
        return [self.relabelled.get(index, whole[index]) for index in self.kept]

    def __getitem__(self, position: int) -> object:
        index = self.kept[position]
        item = self.dataset[index]
        if index not in self.relabelled:
            return item
        return _with_label(item, self.relabelled[index], index)


def _with_label(item: Any, label: object, index: int) -> object:
    def like(old: Any) -> object:
        if not isinstance(old, torch.Tensor):
            return label
        new = torch.as_tensor(label, dtype=old.dtype)
        if new.shape != old.shape:
            raise ValueError(
                f"The label of training example {index} has the shape {list(old.shape)}, its new "
                f"label {label!r} has {list(new.shape)}."
            )
        return new

    if isinstance(item, Mapping):
        for key in _LABEL_KEYS:
            if key in item:
                return {**item, key: like(item[key])}
    elif isinstance(item, tuple | list) and len(item) > 1:
        return type(item)([*item[:-1], like(item[-1])])
    raise ValueError(
        f"Training example {index} cannot be relabelled: expected a tuple with the label last or a "
        f"dictionary with one of {', '.join(_LABEL_KEYS)}, got {type(item).__name__}. Leave it out "
        "instead."
    )


def without(data: Any, drop: Drop) -> Any:
    """The same data module without what is dropped; queries stay."""
    relabelled = drop.relabelled or {}

    def make(whole: Any) -> EditedExamples:
        return EditedExamples(whole, drop.kept(len(whole)), relabelled)

    def shown(examples: EditedExamples, own: Callable[[int], Rendered], index: int) -> Rendered:
        whole = examples.kept[index]
        rendered = own(whole)
        if whole not in relabelled:
            return rendered
        caption = f"relabelled as {relabelled[whole]}, was {rendered.caption}"
        return replace(rendered, caption=caption)

    def listed(examples: EditedExamples, name: str, values: Sequence[Any]) -> list[Any]:
        return _kept_column(name, values, examples)

    return with_changed_training_set(data, make, shown, listed, "drop")


def _kept_column(name: str, values: Sequence[Any], examples: EditedExamples) -> list[object]:
    """A column without what was left out; labels as they are now, in the words of the column."""
    column = list(values)
    if name.lower() in _LABEL_COLUMNS and examples.relabelled:
        words = {_label(examples.dataset[index]): value for index, value in enumerate(values)}
        for index, label in examples.relabelled.items():
            column[index] = words.get(label, str(label))
    return [column[index] for index in examples.kept]


def _label(item: Any) -> object:
    label = item[-1] if isinstance(item, tuple | list) else None
    if isinstance(item, Mapping):
        label = next((item[key] for key in _LABEL_KEYS if key in item), None)
    plain = label.tolist() if isinstance(label, torch.Tensor) else label
    return plain if isinstance(plain, int | float | str) else None
