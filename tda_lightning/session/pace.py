"""How the work of an attribution is gone through: in full, with progress bars.

A dry run goes through a little of it, with a clock, behind the same methods
(``attribution/dry_run.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.processes import from_all
from tda_lightning.runtime.progress import SlowProgress

T = TypeVar("T")
Numbered = tuple[int, Sequence[int]]  # a batch of example indices and its position in the order


class Pace:
    """Goes through everything."""

    def walk(
        self, title: str, source: ExampleSource, module: nn.Module, batches: Sequence[Numbered]
    ) -> Iterator[tuple[int, Tensor, object]]:
        """This process's batches as (position, example indices on the host, batch on the module's
        device)."""
        _require_same_walk(title)
        with SlowProgress(title, len(batches)) as progress:
            for loaded in loaded_batches(source, module, batches):
                yield loaded
                progress.advance()

    def loop(self, title: str, items: Iterable[T], total: int | None, memory: int) -> Iterator[T]:
        """The items, one after the other."""
        if total is None:
            items = list(items)
            total = len(items)
        with SlowProgress(title, total) as progress:
            for item in items:
                yield item
                progress.advance()

    def rounds(self, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The rounds of queries."""
        yield from ranges

    def refuse(self, error: Exception) -> None:
        """Raise ``error``."""
        raise error


def loaded_batches(
    source: ExampleSource, module: nn.Module, batches: Sequence[Numbered]
) -> Iterator[tuple[int, Tensor, object]]:
    """Batches read from ``source``, each as (position, example indices on the host, batch on the
    device)."""
    device = next(module.parameters()).device
    if source.num_workers == 0:  # a DataLoader would read the same, more slowly
        for position, chosen in batches:
            indices = torch.as_tensor(chosen, dtype=torch.int64)
            yield position, indices, source.batch(indices, module)
        return
    pinned = replace(source, pin_memory=True) if device.type == "cuda" else source
    loader = pinned.indexed([indices for _, indices in batches])
    for (position, _), (data, indices) in zip(batches, loader, strict=True):
        yield position, indices, source.placed(data, module, indices)


def _require_same_walk(title: str) -> None:
    """Refuse processes that are about to walk for different things: they add up their results.

    Raises:
        RuntimeError: in every process.
    """
    titles = from_all(title)
    for rank, other in enumerate(titles):
        if other != titles[0]:
            raise RuntimeError(
                f"Process {rank} is about to walk over the training set for {other!r}, process 0 "
                f"for {titles[0]!r}; expected the same. Give every process the same arguments, "
                "weights and data, and the same trajectory folder with its curvature."
            )
