"""Data sets read with their indices: column n of the scores is index n, whatever the order."""

from __future__ import annotations

import copy
import itertools
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from tda_lightning.runtime.indexed import (
    Collate,
    Convert,
    Indexed,
    IndexedBatches,
    Keys,
    array_of_keys,
    items_of,
    list_of_keys,
    one_key,
    tensor_of_keys,
    tuple_of_keys,
)
from tda_lightning.runtime.layouts import (
    CannotCut,
    Rule,
    cut,
    first_axis,
    learned,
    merged,
    misfit,
    order_of,
    signature,
)
from tda_lightning.runtime.origins import Origin, remember
from tda_lightning.runtime.random_states import Snapshot, unchanged_randomness
from tda_lightning.runtime.stand_in import stand_in_of
from tda_lightning.runtime.structures import mapped, moved, parts, same, with_parts

# Hooks through which a batch goes to the device, in Lightning's order.
TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_WORKER_OPTIONS = ("worker_init_fn", "multiprocessing_context", "timeout", "prefetch_factor")

_PROBED = 12  # examples that a layout is told by
_REORDERED = (
    "The loader's collate_fn puts the examples of a batch into another order (sorted by length, "
    "for instance), so they are read one at a time, which is slow. Let it keep the order: "
    "pack_padded_sequence(enforce_sorted=False) needs no sorting."
)
_NOT_COMPARED = (
    "Single examples could not be read by themselves, so batches are cut along their first axes "
    "without a comparison with what the loader makes of one example."
)
_REORDERED_BATCH = (
    "The loader's collate_fn puts the examples of a batch into another order than they are asked "
    "for (sorted by length, for instance), so in a recorded batch they cannot be told apart. Let "
    "it keep the order, which changes nothing in training: "
    "pack_padded_sequence(enforce_sorted=False) needs no sorting."
)


@dataclass(frozen=True)
class ExampleSource:
    """A map-style data set and how its examples become batches.

    Attributes:
        dataset: read by index.
        batch_size: examples per batch, where nobody asks for others.
        collate: makes a batch of a list of examples; with ``keys``, of what the data set gives.
        num_workers: processes that read.
        pin_memory: as the loader has it.
        keys: for a loader with ``batch_size=None``, which does not join examples itself: turns
            indices into what the data set is asked for, an index or several at once.
        worker_options: further options of a loader with workers.
        data_module: the ``LightningDataModule`` whose transfer hooks batches go through.
        loader: the loader that was given, if any.
        example: the task's own way to a batch of one, if it has any.
        alone: read one example at a time, as :meth:`checked` found that batches cannot be cut.
        notes: what a reader of the scores should know about that.
    """

    dataset: Any
    batch_size: int
    collate: Callable[[Any], object] = default_collate
    num_workers: int = 0
    pin_memory: bool = False
    keys: Keys | None = None
    worker_options: Mapping[str, Any] = field(default_factory=dict)
    data_module: Any = None
    loader: Any = None
    example: Callable[[Any, int], Any] | None = None
    alone: bool = False
    notes: tuple[str, ...] = ()
    # What has been found out, by the structure of a batch and by the class of a module.
    _layouts: dict[object, _Layout] = field(default_factory=dict, repr=False, compare=False)
    _order_kept: dict[type, bool | None] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls, data: object, batch_size: int, what: str, data_module: object = None
    ) -> ExampleSource:
        """From a data set, a loader, whose way of making batches is kept, or a
        ``LightningDataModule``, whose training loader and transfer hooks are taken.

        Args:
            data_module: whose transfer hooks serve where ``data`` is no data module itself.

        Raises:
            ValueError: the data set is empty.
            TypeError: it cannot be read by index, or there are several loaders, or a loader whose
                batches are made in a way that cannot be followed.
        """
        if isinstance(data, ExampleSource):
            return data
        if is_data_module(data):
            data, data_module = _training_loader(data, what), data
        _refuse_several(data, what)
        if isinstance(data, DataLoader):
            source = _of_loader(data, batch_size, what, data_module)
        else:
            source = cls(data, batch_size, data_module=data_module)
        dataset = source.dataset
        readable = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if not readable or isinstance(dataset, IterableDataset):
            raise TypeError(
                f"{what} must be a map-style Dataset, a DataLoader over one or a "
                f"LightningDataModule with such a loader, got {type(dataset).__name__}: scores "
                "belong to example indices."
            )
        if len(dataset) == 0:
            raise ValueError(f"The {what} set is empty: there is nothing to attribute.")
        if source.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if isinstance(data, DataLoader):
            _require_plain_iteration(data, source, what)
        return source

    def __len__(self) -> int:
        return len(self.dataset)

    def indexed(self, batches: Sequence[Sequence[int]]) -> DataLoader[Any]:
        """The given batches of indices, each as (batch, indices), as the data set and
        ``collate`` make them."""
        if any(len(batch) > 1 for batch in batches):
            self.require_order()
        workers = self.num_workers if len(batches) > 1 else 0
        common: dict[str, Any] = {
            "num_workers": workers,
            "pin_memory": self.pin_memory,
            # Its own: reading draws nothing from the generators of the user's program.
            "generator": torch.Generator(),
            **(self.worker_options if workers else {}),
        }
        if self.keys is not None:
            return DataLoader(
                IndexedBatches(self.dataset, self.keys),
                sampler=[list(batch) for batch in batches],
                batch_size=None,
                collate_fn=Convert(self.collate),  # type: ignore[arg-type]
                **common,
            )
        return DataLoader(
            Indexed(self.dataset),
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=Collate(self.collate),
            **common,
        )

    def batches(
        self, start: int = 0, stop: int | None = None, size: int | None = None
    ) -> list[range]:
        """Consecutive batches of the examples from ``start`` to ``stop``."""
        end, size = len(self) if stop is None else stop, size or self.batch_size
        if self.keys is one_key or self.alone:
            size = 1
        return [range(first, min(first + size, end)) for first in range(start, end, size)]

    def read(self, indices: Sequence[int]) -> object:
        """The batch of these examples, as a ``DataLoader`` reads it.

        Raises:
            ValueError: the loader puts them into another order.
        """
        if len(indices) > 1:
            self.require_order()
        if self.keys is not None:
            return self.collate(self.dataset[self.keys(list(indices))])
        if type(self.dataset) is TensorDataset and self.collate is default_collate:
            # The same batch, without a call for each example.
            return list(self.dataset[torch.as_tensor(indices, dtype=torch.int64)])  # type: ignore[index]
        return self.collate(items_of(self.dataset, indices))

    def join(self, items: list[object]) -> object:
        """The batch of examples that may be no part of the data set.

        Raises:
            TypeError: the data set makes the batches itself.
        """
        if self.keys is not None:
            raise TypeError(
                "The loader has batch_size=None: its data set makes the batches, so that no other "
                "example can be put into one. Give a loader with a batch size and a collate_fn."
            )
        return self.collate(items)

    def others(self, data: object, batch_size: int, what: str) -> ExampleSource:
        """:meth:`of` further examples, such as queries. A data set without a loader of its own is
        made into batches as this one is, and its batches go through the same transfer hooks."""
        source = ExampleSource.of(data, batch_size, what, self.data_module)
        if source is data or source.loader is not None or self.keys is not None:
            return source
        return replace(source, collate=self.collate)

    def with_dataset(self, dataset: object) -> ExampleSource:
        """Another data set, made into batches in the same way."""
        return replace(self, dataset=dataset, _layouts={}, _order_kept={})

    def batch(self, indices: Tensor | Sequence[int], module: nn.Module) -> object:
        """The batch of these examples on the device of the module."""
        chosen = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        return self.placed(self.read(chosen), module, chosen)

    def placed(self, batch: Any, module: nn.Module, indices: Tensor | Sequence[int]) -> Any:
        """The batch of these examples on the module's device, by the transfer hooks of the data
        module and the module: the data module's where it overrides one, as in Lightning."""
        there = self._transferred(batch, module)
        self.recognise(there, module, indices)
        return there

    def recognise(self, batch: object, module: nn.Module, indices: Tensor | Sequence[int]) -> None:
        """Note which examples a batch on the module's device is made of, if it matters."""
        if len(indices) > 1 and (self.example is not None or not self._stacks(module)):
            chosen = indices.tolist() if isinstance(indices, Tensor) else list(indices)
            reader = _Reader(weakref.ref(self), weakref.ref(module), self.example)
            remember(batch, Origin(reader, tuple(chosen)))

    def _transferred(self, batch: Any, module: nn.Module) -> Any:
        device = next(module.parameters()).device
        before, transfer, after = (self._hook(module, name) for name in TRANSFER_HOOKS)
        stand_in = stand_in_of(module)
        if stand_in is not None and (dtype := stand_in.input_dtype) is not None:
            batch = mapped(lambda t: t.to(dtype) if t.is_floating_point() else t, batch)
        if before is None or transfer is None or after is None:
            return moved(batch, device)
        with _attached(self.data_module, stand_in):
            return after(transfer(before(batch, 0), device, 0), 0)

    def _stacks(self, module: nn.Module) -> bool:
        """Whether batches hold their examples along first axes for certain."""
        changed = (self.data_module, module) if self.data_module is not None else (module,)
        return (
            self.keys is None
            and self.collate is default_collate
            and not any(
                hasattr(one, name) and overrides(one, name)
                for one in changed
                for name in TRANSFER_HOOKS
            )
        )

    def checked(self, module: nn.Module) -> ExampleSource:
        """Compare a batch of examples spread over the data with the batches of one of each.

        Returns:
            This source, or where the loader puts examples into another order one that reads them
            one at a time.

        Raises:
            ValueError: what a batch holds of an example depends on the other examples.
        """
        if self.alone or self._stacks(module) or len(self) < 2 or self.keys is one_key:
            return self
        if type(module) not in self._order_kept:
            self._order_kept[type(module)] = self._keeps_order(module)
        kept = self._order_kept[type(module)]
        if kept is None:
            return replace(self, notes=(*self.notes, _NOT_COMPARED))
        if kept:
            return self
        return replace(self, alone=True, batch_size=1, notes=(*self.notes, _REORDERED))

    def _keeps_order(self, module: nn.Module) -> bool | None:
        """Whether examples stand where they are asked for; None where it cannot be seen."""
        last, count = len(self) - 1, min(len(self), _PROBED)
        size = min(count, max(2, self.batch_size))
        spread = [position * last // (count - 1) for position in range(count)]
        groups = [spread[n : n + size] for n in range(0, count, size)]
        compared = [self._compared(group, module) for group in groups if len(group) > 1]
        if not any(compared):  # they may differ too much for one batch
            compared = [self._compared(list(range(size)), module)]
        known = [layout.order_kept for layout in compared if layout is not None]
        return all(known) if known else None

    def rule_of(self, batch: object, indices: Sequence[int], module: nn.Module) -> Rule:
        """How a batch of these examples is cut.

        Raises:
            ValueError: as :meth:`checked`, or the loader puts examples into another order.
        """
        kind = signature(batch)
        if kind not in self._layouts:
            few = min(len(indices), _PROBED)
            own = [indices[n * (len(indices) - 1) // (few - 1)] for n in range(few)]
            layout = self._compared(own, module)
            if layout is None:
                layout = _Layout(first_axis(batch, len(indices)))
            self._layouts[kind] = layout
        if not self._layouts[kind].order_kept:
            raise ValueError(_REORDERED_BATCH)
        return self._layouts[kind].rule

    def single(self, index: int, module: nn.Module) -> object:
        """The batch of one, read by itself; nothing that draws is moved on."""
        with unchanged_randomness(self.dataset):
            return self._transferred(self.read([index]), module)

    def _compared(self, indices: list[int], module: nn.Module) -> _Layout | None:
        """The layout of a batch of these examples; None where it cannot be read, nor they alone."""
        with unchanged_randomness(self.dataset):
            try:
                if self.keys is None:
                    items = items_of(self.dataset, indices)
                    read = [self.collate(_copies(items)) for _ in range(2)]
                    each = [self.collate(_copies([item])) for item in items]
                else:
                    read = [self.read(indices) for _ in range(2)]
                    each = [self.read([index]) for index in indices]
                batch, again = (self._transferred(one, module) for one in read)
                alone = [self._transferred(one, module) for one in each]
            except Exception:  # of the user's code, which may be made for whole batches
                return None
        rule = learned(batch, alone)
        if rule.whole:
            try:
                cut(rule, batch, 0, len(alone))
            except (TypeError, ValueError, AttributeError):
                rule = Rule("unknown")  # it cannot be put together again
        layout = _Layout(rule)
        if same(batch, again):  # nothing is drawn, so values can be compared
            places = (misfit(rule, batch, n, one) for n, one in enumerate(alone))
            where = next((place for place in places if place is not None), None)
            reordered = where is not None and order_of(rule, batch, alone) is not None
            if where is not None and not reordered and rule.whole:
                raise ValueError(
                    f"What a batch holds at {where} depends on all its examples: in a batch of "
                    "one, collate_fn (or a transfer hook) gives something else, so an example's "
                    "loss is not its own. Do in training_step what needs the whole batch, or let "
                    "each example be treated alone."
                )
            layout = _Layout(rule, not reordered)
        earlier = self._layouts.get(signature(batch))
        if earlier is not None:
            rule = merged(rule, earlier.rule)
            layout = _Layout(rule, layout.order_kept and earlier.order_kept)
        self._layouts[signature(batch)] = layout
        return layout

    def require_order(self) -> None:
        """Refuse a loader that puts the examples of a batch into another order than asked for.

        Raises:
            ValueError: it was :meth:`checked`, and does.
        """
        if self.alone:
            raise ValueError(_REORDERED_BATCH)

    def _hook(self, module: nn.Module, name: str) -> Callable[..., Any] | None:
        if self.data_module is not None and overrides(self.data_module, name):
            return getattr(self.data_module, name)  # type: ignore[no-any-return]
        own = getattr(module, name, None)
        return own if own is not None else getattr(self.data_module, name, None)


@dataclass(frozen=True)
class _Layout:
    """How batches of one structure are cut, and whether examples stand in the order asked for."""

    rule: Rule
    order_kept: bool = True


@dataclass(frozen=True)
class _Reader:
    """Reads single examples of a source for a module, as long as both live: tensors of a batch may
    be the data set's own, and are not to keep it alive."""

    source: weakref.ref[ExampleSource]
    module: weakref.ref[nn.Module]
    example: Callable[[Any, int], Any] | None

    def rule_of(self, batch: object, indices: Sequence[int]) -> Rule:
        source, module = self._alive()
        return source.rule_of(batch, indices, module)

    def single(self, index: int) -> object:
        source, module = self._alive()
        return source.single(index, module)

    def _alive(self) -> tuple[ExampleSource, nn.Module]:
        source, module = self.source(), self.module()
        if source is None or module is None:
            raise CannotCut("The data set or the module of this batch is gone: read it again.")
        return source, module


def _copies(items: list[object]) -> list[object]:
    """Examples that a collate function may take apart: their containers are others."""
    copied = []
    for item in items:
        inside = parts(item)
        try:
            copied.append(item if inside is None else with_parts(item, inside))
        except TypeError:
            copied.append(item)
    return copied


@contextmanager
def _attached(data_module: Any, trainer: object) -> Iterator[None]:
    """The data module's hooks see ``trainer``."""
    if data_module is None or trainer is None:
        yield
        return
    held = data_module.trainer
    data_module.trainer = trainer
    try:
        yield
    finally:
        data_module.trainer = held


def _of_loader(loader: DataLoader[Any], given: int, what: str, data_module: Any) -> ExampleSource:
    keys, size = None, loader.batch_size
    if size is None and loader.batch_sampler is not None:
        size = getattr(loader.batch_sampler, "batch_size", None)
    elif size is None:
        keys = _keys_of(loader, what)
        size = 1 if keys is one_key else getattr(loader.sampler, "batch_size", None)
    return ExampleSource(
        loader.dataset,
        size if isinstance(size, int) else given,
        loader.collate_fn,
        loader.num_workers,
        loader.pin_memory,
        keys,
        {name: getattr(loader, name) for name in _WORKER_OPTIONS},
        data_module,
        loader,
    )


def _keys_of(loader: DataLoader[Any], what: str) -> Keys:
    """What the sampler of a loader with ``batch_size=None`` asks the data set for."""
    if isinstance(loader.dataset, IterableDataset):
        return one_key  # refused as such
    with unchanged_randomness(loader.sampler):
        first = next(iter(loader.sampler), None)
    several: dict[type, Keys] = {
        list: list_of_keys,
        tuple: tuple_of_keys,
        Tensor: tensor_of_keys,
        np.ndarray: array_of_keys,
    }
    if isinstance(first, (int, np.integer)) or (isinstance(first, Tensor) and first.dim() == 0):
        return one_key
    if type(first) not in several:
        raise TypeError(
            f"The sampler of the {what} loader, which has batch_size=None, asks for "
            f"{type(first).__name__}: expected an index or a list of indices, so that each example "
            "has its column."
        )
    return several[type(first)]


def _refuse_several(data: object, what: str) -> None:
    """Refuse a collection of loaders: a batch of several has no one list of examples."""
    inside: list[object] = []
    if isinstance(data, Mapping):
        inside = list(data.values())
    elif isinstance(data, (list, tuple)):
        inside = list(data)
    elif not isinstance(data, DataLoader) and hasattr(data, "iterables"):  # a CombinedLoader
        inside = [DataLoader]
    if any(isinstance(one, DataLoader) or one is DataLoader for one in inside):
        raise TypeError(
            f"{what} is a {type(data).__name__} of loaders, expected one: each batch has one list "
            "of example indices, and each example one column. Attribute to one data set at a time, "
            "or join them with torch.utils.data.ConcatDataset."
        )


def _require_plain_iteration(loader: DataLoader[Any], source: ExampleSource, what: str) -> None:
    """Refuse a loader whose class hands out other batches than its data set and ``collate_fn``
    make: what it does to them could not be done again."""
    kind = type(loader)
    iterates = (kind.__iter__, getattr(kind, "_get_iterator", None))
    if iterates == (DataLoader.__iter__, getattr(DataLoader, "_get_iterator", None)):
        return
    chosen = source.batches(stop=min(2, len(source)))[0]
    copied: Any = copy.copy(loader)
    probe = {"num_workers": 0, "prefetch_factor": None, "persistent_workers": False}
    slot = "sampler" if source.keys is not None else "batch_sampler"
    drawn = list(chosen) if source.keys is None else source.keys(list(chosen))
    vars(copied).update(probe, generator=torch.Generator(), _iterator=None, **{slot: [drawn]})
    with unchanged_randomness(loader):
        try:
            before = Snapshot.take()
            handed = list(itertools.islice(copied, 2))
            before.restore()
            alike = len(handed) == 1 and same(handed[0], source.read(chosen))
        except Exception:  # whatever it needs of its own making, it is not a plain loader
            alike = False
    if not alike:
        raise TypeError(
            f"The {what} loader is a {kind.__name__} with an __iter__ of its own, which hands out "
            "other batches than its data set and collate_fn make, so single examples cannot be "
            "read as training read them. Do that work in collate_fn or in the hook "
            "on_after_batch_transfer, or pass a plain DataLoader."
        )


def is_data_module(data: object) -> bool:
    """Whether ``data`` is a ``LightningDataModule``, as far as its methods tell."""
    methods = ("prepare_data", "setup", "train_dataloader", *TRANSFER_HOOKS)
    whole = all(callable(getattr(data, name, None)) for name in methods)
    return whole and not isinstance(data, (nn.Module, type))


_SET_UP: weakref.WeakSet[Any] = weakref.WeakSet()


def _training_loader(data_module: Any, what: str) -> object:
    """The training loader of a data module, which is set up first as Lightning does it; once, as
    another set-up might split the data otherwise."""
    if what != "training":
        raise TypeError(
            f"{what} is a LightningDataModule, which may have several loaders: pass the loader or "
            f"data set to explain, for instance {what}=datamodule.val_dataloader(). Its transfer "
            "hooks are those of the data module given as train."
        )
    fn = getattr(getattr(getattr(data_module, "trainer", None), "state", None), "fn", None)
    if fn != "fit" and data_module not in _SET_UP:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            data_module.prepare_data()
        data_module.setup("fit")
    _SET_UP.add(data_module)
    return data_module.train_dataloader()


_HOOK_OWNERS = ("DataHooks", "ModelHooks", "LightningModule", "LightningDataModule", "Callback")


def overrides(thing: object, name: str) -> bool:
    """Whether a Lightning module, data module or callback has a method of its own in place of
    Lightning's."""
    if name in vars(thing):
        return True
    owner = next((kind for kind in type(thing).__mro__ if name in vars(kind)), None)
    package = getattr(owner, "__module__", "").partition(".")[0]
    base = getattr(owner, "__name__", "") in _HOOK_OWNERS
    return owner is not None and not (base and package in ("lightning", "pytorch_lightning"))
