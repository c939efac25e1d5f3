"""A data module whose training set lacks some examples and has other labels for some.

``tda train drop=FILE`` writes what it left out into the recorded configuration, so that everything
that is built from it sees the same training set, whatever becomes of the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler

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
    drop = read_drop(config.drop, len(_whole(data)))
    config.drop = {"left_out": list(drop.left_out), "relabelled": dict(drop.relabelled or {})}
    return without(data, drop)


def _whole(data: Any) -> Any:
    """The training set of a data module, from its loader where it has no ``train_dataset``."""
    if _names_its_training_set(type(data)):
        return data.train_dataset
    data.prepare_data()
    data.setup("fit")
    return data.train_dataloader().dataset


def _names_its_training_set(kind: type) -> bool:
    return isinstance(getattr(kind, "train_dataset", None), property)


def as_trained(run_config: DictConfig, data: Any) -> Any:
    """The data module of a recorded configuration, without what its training left out."""
    setting: Any = OmegaConf.to_container(run_config.get("drop") or OmegaConf.create({}))
    if not setting:
        return data
    return without(data, Drop(tuple(setting["left_out"]), setting["relabelled"]))


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
    """The same data module with a changed training set; queries stay.

    Its class gets a subclass: whatever else it can do, hooks included, it still can.
    """
    own = type(data)
    methods: dict[str, Any] = {}
    edited: dict[int, EditedExamples] = {}

    def changed(whole: Any) -> EditedExamples:
        if id(whole) not in edited:
            edited[id(whole)] = EditedExamples(whole, drop.kept(len(whole)), drop.relabelled or {})
        return edited[id(whole)]

    def examples_of(self: Any) -> EditedExamples:
        if _names_its_training_set(own):
            return changed(own.train_dataset.__get__(self))
        return changed(own.train_dataloader(self).dataset)

    def train_dataloader(self: Any) -> DataLoader[object]:
        loader = own.train_dataloader(self)
        # The loader may be over the property of this class already.
        if isinstance(loader.dataset, EditedExamples):
            return loader
        return _over(loader, changed(loader.dataset))

    def render(self: Any, split: str, index: int) -> Rendered:
        if split != "train":
            return own.render(self, split, index)
        examples = examples_of(self)
        whole = examples.kept[index]
        shown = own.render(self, split, whole)
        if whole not in examples.relabelled:
            return shown
        label = examples.relabelled[whole]
        return replace(shown, caption=f"relabelled as {label}, was {shown.caption}")

    def documents(self: Any, split: str) -> Sequence[Any]:
        listed = own.documents(self, split)
        return listed if split != "train" else [listed[index] for index in examples_of(self).kept]

    def group_columns(self: Any, split: str) -> dict[str, list[object]]:
        columns = own.group_columns(self, split)
        if split != "train":
            return columns
        examples = examples_of(self)
        return {name: _kept_column(name, given, examples) for name, given in columns.items()}

    if _names_its_training_set(own):
        methods["train_dataset"] = property(examples_of)
    methods["train_dataloader"] = train_dataloader
    for method in (render, documents, group_columns):
        if hasattr(own, method.__name__):
            methods[method.__name__] = method
    data.__class__ = type(own.__name__, (own,), {**methods, "__module__": own.__module__})
    return data


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


def _over(loader: Any, examples: EditedExamples) -> DataLoader[object]:
    """A loader like ``loader`` over other examples."""
    sampler = getattr(loader, "sampler", None)
    if type(sampler) not in (RandomSampler, SequentialSampler) or loader.batch_size is None:
        raise ValueError(
            f"drop cannot be applied to a training loader with {type(sampler).__name__}: expected "
            "shuffle=True or examples in order. Leave the examples out in the data module."
        )
    return DataLoader(
        examples,
        batch_size=loader.batch_size,
        shuffle=isinstance(sampler, RandomSampler),
        generator=loader.generator,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        drop_last=loader.drop_last,
        pin_memory=loader.pin_memory,
    )
