"""A data module whose training set is followed by chosen examples of a pool.

``tda train extra=FILE`` writes the pool's settings and the indices into the recorded configuration,
so that everything that is built from it sees the same training set, whatever becomes of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset

from tda_lightning.cli.changed_data import with_changed_training_set
from tda_lightning.cli.own_data import OwnData, as_attributed
from tda_lightning.cli.run_config import build
from tda_lightning.records.data_module import AttributedData, Grouped, Scaled, Textual
from tda_lightning.records.rendered import Rendered
from tda_lightning.report.columns import raw_labels
from tda_lightning.selection.selection import load_chosen


@dataclass(frozen=True)
class Pool:
    """Examples that were not in training.

    Attributes:
        data: the data module that has them.
        split: "train" or "query": which part of it they are.
    """

    data: AttributedData
    split: str

    @property
    def dataset(self) -> Any:
        """The examples."""
        return self.data.train_dataset if self.split == "train" else self.data.query_dataset


@dataclass(frozen=True)
class MoreExamples(Dataset[object]):
    """A map-style data set, followed by some examples of another."""

    dataset: Any
    pool: Any
    chosen: Sequence[int]

    def __len__(self) -> int:
        return len(self.dataset) + len(self.chosen)

    @property
    def labels(self) -> list[Any] | None:
        """All labels; None where they cannot be read at once."""
        own, others = raw_labels(self.dataset), raw_labels(self.pool)
        if own is None or others is None:
            return None
        return [*own, *(others[index] for index in self.chosen)]

    def __getitem__(self, position: int) -> object:
        own = len(self.dataset)
        if position < own:
            return self.dataset[position]
        return self.pool[self.chosen[position - own]]


def apply_extra(config: DictConfig, data: Any) -> tuple[Any, int]:
    """The data module with what ``extra=FILE`` chooses, which the configuration then lists, and how
    many examples that adds."""
    if config.get("extra") is None:
        return data, 0
    chosen, size, asked = load_chosen(config.extra)
    config.extra = {"pool": asked, "num_pool": size, "chosen": chosen}
    return with_extra(config, data, trust=True, asked={}), len(chosen)


def with_extra(run_config: DictConfig, data: Any, trust: bool, asked: Mapping[str, object]) -> Any:
    """The data module of a recorded configuration, with what its training added.

    Args:
        trust: build classes from anywhere.
        asked: other settings of the data, such as where its files are.

    Raises:
        ValueError: the pool is not of the size that was chosen from.
    """
    setting: Any = OmegaConf.to_container(run_config.get("extra") or OmegaConf.create({}))
    if not setting:
        return data
    of_queries = ("queries", "num_query")  # which are asked about is not for the pool
    changes = {name: value for name, value in asked.items() if name not in of_queries}
    pool = pool_from(run_config, changes, setting["pool"], trust)
    chosen, size = setting["chosen"], len(pool.dataset)
    if setting["num_pool"] not in (None, size) or max(chosen) >= size:
        wanted = setting["num_pool"] or f"at least {max(chosen) + 1}"
        raise ValueError(
            f"The extra examples were chosen from a pool of {wanted}, and {setting['pool']} makes "
            f"one of {size}. Give the pool they were chosen from."
        )
    return with_chosen(data, pool, chosen)


def pool_from(
    run_config: DictConfig,
    known: Mapping[str, object],
    settings: Mapping[str, object],
    trust: bool,
) -> Pool:
    """The pool that the recorded data with other settings make.

    Args:
        known: changes of the recorded settings that hold for the training set too, such as where
            the files are now.
        settings: those of the pool; ``split`` is which part of it.
        trust: build classes from anywhere.
    """
    changes = {**known, **settings}
    split = str(changes.pop("split", "train"))
    if split not in ("train", "query"):
        raise ValueError(f"pool.split must be train or query, got {split!r}.")
    chosen: dict[str, Any] = {}
    if not str(run_config.data.get("_target_")).startswith("tda_lightning.examples.data."):
        chosen = {name: changes.pop(name) for name in ("queries", "num_query") if name in changes}
    data = as_attributed(build(run_config.data, trust, **changes), **chosen)
    if chosen and not isinstance(data, OwnData):  # it knows what to do with them itself
        data = as_attributed(build(run_config.data, trust, **changes, **chosen))
    own = data.own if isinstance(data, OwnData) else data
    if isinstance(own, Scaled):
        of_queries = ("queries", "num_query")
        kept = {name: value for name, value in known.items() if name not in of_queries}
        own.scaled_as(build(run_config.data, trust, **kept))
    return Pool(data, split)


def with_chosen(data: Any, pool: Pool, chosen: Sequence[int]) -> Any:
    """The same data module with chosen examples of a pool after its training set."""

    def make(whole: Any) -> MoreExamples:
        return MoreExamples(whole, pool.dataset, chosen)

    def shown(examples: MoreExamples, own: Callable[[int], Rendered], index: int) -> Rendered:
        count = len(examples.dataset)
        if index < count:
            return own(index)
        rendered = pool.data.render(pool.split, chosen[index - count])
        return replace(rendered, caption=f"extra: {rendered.caption}")

    def listed(examples: MoreExamples, name: str, values: Sequence[Any]) -> list[Any]:
        if name == "documents" and isinstance(pool.data, Textual):
            others: Sequence[Any] = pool.data.documents(pool.split)
        else:
            assert isinstance(pool.data, Grouped)  # of the class of ``data``
            others = pool.data.group_columns(pool.split)[name]
        return [*values, *(others[index] for index in chosen)]

    return with_changed_training_set(data, make, shown, listed, "extra")
