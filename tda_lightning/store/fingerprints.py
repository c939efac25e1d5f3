"""Fingerprints of data sets, which tell whether data are those that a run was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from tda_lightning.records.errors import TrajectoryMismatchError
from tda_lightning.runtime.digests import digest
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.random_states import unchanged_randomness

LENGTH = "length"
_EXAMPLES = 64
_UNREADABLE = "unreadable"
_LISTED = 10  # differing examples that an error lists


def fingerprint(dataset: Any) -> dict[str, str] | None:
    """Length of ``dataset`` and hashes of up to 64 evenly spaced examples.

    Each example is read twice. One that differs between the readings (random augmentation) or
    cannot be read is left out. Random generators, including the data set's own, keep their states.

    Returns:
        ``{"length": "1000", "0": sha256, "15": sha256, ...}``, or None for an iterable data set.
    """
    size = num_examples(dataset)
    if size is None:
        return None
    count = min(size, _EXAMPLES)
    spaced = sorted({round(i * (size - 1) / max(count - 1, 1)) for i in range(count)})
    hashes = _hashes(dataset, spaced)
    return {LENGTH: str(size), **{i: h for i, h in hashes.items() if h != _UNREADABLE}}


def compare_fingerprints(recorded: Mapping[str, str] | None, dataset: Any) -> None:
    """Check that ``dataset`` is the recorded one, as far as its fingerprint can tell.

    Raises:
        TrajectoryMismatchError: the length differs, or some examples do.
    """
    size = num_examples(dataset)
    if recorded is None or size is None:
        return
    advice = "Pass the training set of the recorded run, in its order."
    if str(size) != recorded[LENGTH]:
        raise TrajectoryMismatchError(
            f"The training set is not the recorded one: expected {recorded[LENGTH]} examples, "
            f"got {size}. {advice}"
        )
    expected = {index: digest for index, digest in recorded.items() if index != LENGTH}
    got = _hashes(dataset, [int(index) for index in expected])
    # Examples that now differ between two readings cannot be compared.
    differing = [int(i) for i, digest in expected.items() if got.get(i, digest) != digest]
    if differing:
        named = ", ".join(map(str, differing[:_LISTED]))
        more = f" and {len(differing) - _LISTED} more" if len(differing) > _LISTED else ""
        raise TrajectoryMismatchError(
            f"The training set is not the recorded one: of {len(expected)} recorded examples "
            f"{len(differing)} differ, at indices {named}{more}. {advice}"
        )


def collation(loader: object) -> dict[str, str | None] | None:
    """How a loader makes batches: the name of its ``collate_fn``, and a hash of the batch of its
    first two examples, None where two readings differ.

    Returns:
        ``{"collate_fn": "module.name", "batch": sha256}``; None for what is no loader of a
        map-style data set, or cannot be read.
    """
    if not isinstance(loader, DataLoader) or num_examples(loader.dataset) is None:
        return None
    try:
        batch = _batch_hash(ExampleSource.of(loader, 1, "training"))
    except (TypeError, ValueError):  # attribution, not training, has to do with such a loader
        return None
    return (
        None if batch == _UNREADABLE else {"collate_fn": _name(loader.collate_fn), "batch": batch}
    )


def compare_collation(recorded: Mapping[str, str | None] | None, source: ExampleSource) -> None:
    """Check that a data set alone makes the batches that the recorded loader made, as far as can be
    told. A loader that was given says for itself how batches are made.

    Raises:
        TrajectoryMismatchError: its first two examples make another batch; or batches draw random
            numbers and cannot be compared.
    """
    default = _name(default_collate)
    if recorded is None or source.loader is not None or recorded["collate_fn"] == default:
        return
    if len(source) == 1:
        return  # one graph, whose nodes are the examples: nothing is joined
    if recorded["batch"] is None or _batch_hash(source) not in (recorded["batch"], None):
        raise TrajectoryMismatchError(
            f"The run's batches were made by its loader's collate_fn, {recorded['collate_fn']}, "
            "and a data set alone is made into other batches. Pass the loader or the data module: "
            "attribute(train=DataLoader(dataset, collate_fn=...), query=...)."
        )


def num_examples(dataset: object) -> int | None:
    """Length of a data set that is read by position; None for an iterable one."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return None
    return len(dataset) if hasattr(dataset, "__len__") else None


def _hashes(dataset: Dataset[object], indices: list[int]) -> dict[str, str]:
    with unchanged_randomness(dataset):
        first, second = ({i: _read(dataset, i) for i in indices} for _ in range(2))
    return {str(i): first[i] for i in indices if first[i] == second[i]}


def _batch_hash(source: ExampleSource) -> str | None:
    """Of the batch of the first two examples; None where two readings differ."""
    indices = range(min(2, len(source)))
    with unchanged_randomness(source.dataset):
        try:
            first, second = (digest(source.read(indices)) for _ in range(2))
        except Exception:
            return _UNREADABLE
    return first if first == second else None


def _name(function: object) -> str:
    """Where a function, or the class of a callable object, is defined."""
    while isinstance(function, partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"  # type: ignore[attr-defined]


def _read(dataset: Dataset[object], index: int) -> str:
    try:
        return digest(dataset[index])
    except Exception:
        # Training may never read this example, and must not fail because of it.
        return _UNREADABLE
