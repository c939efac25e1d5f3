"""Tensors cached beside a trajectory: curvature, features, unfinished attributions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tda_lightning.store import layout
from tda_lightning.store.atomic_write import make_folder
from tda_lightning.store.hdf5 import (
    get_arrays,
    get_tensors,
    put_tensors,
    reading,
    subgroup,
    writing,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class TensorCache(MutableMapping[str, "Mapping[str, Tensor]"]):
    """Named tensors by a hexadecimal key, one file for each key.

    Where the folder cannot be written to, a warning is given instead of an error, because
    everything here can be computed again.

    Attributes:
        root: the trajectory's folder.
        kind: which of the ``layout.CACHES``.
    """

    root: Path
    kind: layout.FileKind = layout.CURVATURE

    def __getitem__(self, key: str) -> Mapping[str, Tensor]:
        with reading(self._files()[key], self.kind) as file:
            return get_tensors(subgroup(file, layout.VALUES))

    def check(self, key: str) -> None:
        """Read a file without torch.

        Raises:
            TrajectoryFormatError: it is damaged.
        """
        with reading(self._files()[key], self.kind) as file:
            get_arrays(subgroup(file, layout.VALUES))

    def __setitem__(self, key: str, value: Mapping[str, Tensor]) -> None:
        kind = self.kind.name
        if not layout.KEY.fullmatch(key):
            raise ValueError(
                f"A key of {kind} must be hexadecimal digits in lower case, got {key!r}: pass a "
                "digest of everything that determines it."
            )
        path = layout.cache_file(self.root, self.kind, key)
        try:
            self.root.stat()  # one that has vanished is not made again
            make_folder(path.parent)
            with writing(path, self.kind) as file:
                put_tensors(file.create_group(layout.VALUES), value)
        except OSError as error:
            warnings.warn(
                f"{path} cannot be written, so {kind} is not kept: {error}. Scores are not "
                "affected; the next attribution will compute it again.",
                stacklevel=2,
            )

    def __delitem__(self, key: str) -> None:
        self._files()[key].unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files())

    def __len__(self) -> int:
        return len(self._files())

    def _files(self) -> dict[str, Path]:
        return layout.cache_files(self.root, self.kind)
