"""Tensors kept beside the trajectory that they come from: curvature, features, unfinished work."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tda_lightning.store import layout
from tda_lightning.store.atomic_write import make_folder
from tda_lightning.store.hdf5 import get_tensors, put_tensors, reading, subgroup, writing


@dataclass(frozen=True, eq=False)
class TensorCache(MutableMapping[str, Mapping[str, Tensor]]):
    """Named tensors by a hexadecimal key, one file for each key under ``<root>/<kind>``.

    Where the folder cannot be written, what is set is not kept, with a warning: it can always be
    computed again.

    Attributes:
        root: of the trajectory.
        kind: ``curvature``; ``features`` of the training examples; or ``unfinished``: where an
            interrupted attribution goes on.
    """

    root: Path
    kind: str = "curvature"

    def __getitem__(self, key: str) -> Mapping[str, Tensor]:
        path = self._files().get(key)
        if path is None:
            raise KeyError(key)
        with reading(path, self.kind) as file:
            return get_tensors(subgroup(file, layout.VALUES))

    def __setitem__(self, key: str, value: Mapping[str, Tensor]) -> None:
        if not layout.KEY.fullmatch(key):
            raise ValueError(
                f"A key of {self.kind} must be hexadecimal digits in lower case, got {key!r}: "
                "pass a digest of everything that determines it."
            )
        path = layout.cache_file(self.root, self.kind, key)
        try:
            make_folder(path.parent)
            with writing(path, self.kind) as file:
                put_tensors(file.create_group(layout.VALUES), value)
        except OSError as error:
            warnings.warn(
                f"{path} cannot be written, so the file of {self.kind} is not kept: {error}. "
                "Scores are not affected; the next attribution will compute it again.",
                stacklevel=2,
            )

    def __delitem__(self, key: str) -> None:
        path = self._files().get(key)
        if path is None:
            raise KeyError(key)
        path.unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files())

    def __len__(self) -> int:
        return len(self._files())

    def _files(self) -> dict[str, Path]:
        return layout.cache_files(self.root, self.kind)
