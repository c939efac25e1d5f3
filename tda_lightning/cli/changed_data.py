"""A data module with another training set than its class makes, whatever its class can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler

from tda_lightning.records.rendered import Rendered

Make = Callable[[Any], Dataset[object]]
Shown = Callable[[Any, Callable[[int], Rendered], int], Rendered]
Listed = Callable[[Any, str, Sequence[Any]], list[Any]]


def with_changed_training_set(
    data: Any, make: Make, shown: Shown, listed: Listed, setting: str
) -> Any:
    """The same data module with a changed training set; queries stay.

    Its class gets a subclass: whatever else it can do, hooks included, it still can.

    Args:
        make: the changed training set from the data module's own, which it has as ``dataset``.
        shown: renders an example of the changed set, given the module's own way to render.
        listed: a column ("documents", or one of ``group_columns``) of the changed set, given its
            name and the module's own column.
        setting: that asks for it, for errors.
    """
    own = type(data)
    methods: dict[str, Any] = {}
    changed: dict[int, Dataset[object]] = {}

    def changed_set(whole: Any) -> Dataset[object]:
        if id(whole) not in changed:
            changed[id(whole)] = make(whole)
        return changed[id(whole)]

    def examples_of(self: Any) -> Dataset[object]:
        if names_its_training_set(own):
            return changed_set(own.train_dataset.__get__(self))
        return changed_set(own.train_dataloader(self).dataset)

    def train_dataloader(self: Any) -> DataLoader[object]:
        loader = own.train_dataloader(self)
        inner = loader.dataset
        # The loader may be over the property of this class already, or over one made from it.
        while inner is not None:
            if any(inner is one for one in changed.values()):
                return loader  # type: ignore[no-any-return]
            inner = getattr(inner, "dataset", None)
        return _over(loader, changed_set(loader.dataset), setting)

    def render(self: Any, split: str, index: int) -> Rendered:
        if split != "train":
            return own.render(self, split, index)
        return shown(examples_of(self), lambda one: own.render(self, split, one), index)

    def documents(self: Any, split: str) -> Sequence[Any]:
        found = own.documents(self, split)
        return found if split != "train" else listed(examples_of(self), "documents", found)

    def group_columns(self: Any, split: str) -> dict[str, list[object]]:
        columns = own.group_columns(self, split)
        if split != "train":
            return columns
        examples = examples_of(self)
        return {name: listed(examples, name, given) for name, given in columns.items()}

    if names_its_training_set(own):
        methods["train_dataset"] = property(examples_of)
    methods["train_dataloader"] = train_dataloader
    for method in (render, documents, group_columns):
        if hasattr(own, method.__name__):
            methods[method.__name__] = method
    data.__class__ = type(own.__name__, (own,), {**methods, "__module__": own.__module__})
    return data


def training_set(data: Any) -> Any:
    """The training set of a data module, from its loader where it has no ``train_dataset``."""
    if names_its_training_set(type(data)):
        return data.train_dataset
    data.prepare_data()
    data.setup("fit")
    return data.train_dataloader().dataset


def names_its_training_set(kind: type) -> bool:
    """Whether a class of data modules has the training set as a property."""
    return isinstance(getattr(kind, "train_dataset", None), property)


def _over(loader: Any, examples: Dataset[object], setting: str) -> DataLoader[object]:
    """A loader like ``loader`` over other examples."""
    sampler = getattr(loader, "sampler", None)
    if type(sampler) not in (RandomSampler, SequentialSampler) or loader.batch_size is None:
        raise ValueError(
            f"{setting} cannot be applied to a training loader with {type(sampler).__name__}: "
            "expected shuffle=True or examples in order. Change the training set in the data "
            "module."
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
