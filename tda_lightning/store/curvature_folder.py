"""Fitted curvature kept beside the trajectory it was fitted on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tda_lightning.store import layout
from tda_lightning.store.durable import make_folder
from tda_lightning.store.h5 import get_tensors, put_tensors, reading, subgroup, writing


@dataclass(frozen=True, eq=False)
class CurvatureFolder(MutableMapping[str, Mapping[str, Tensor]]):
    """Named tensors by a hexadecimal key, one file for each key under ``<root>/curvature``.

    Where the folder cannot be written, what is set is not kept, with a warning: curvature can
    always be fitted again.
    """

    root: Path

    def __getitem__(self, key: str) -> Mapping[str, Tensor]:
        path = self._files().get(key)
        if path is None:
            raise KeyError(key)
        with reading(path, "curvature") as file:
            return get_tensors(subgroup(file, layout.VALUES))

    def __setitem__(self, key: str, value: Mapping[str, Tensor]) -> None:
        if not layout.CURVATURE_KEY.fullmatch(key):
            raise ValueError(
                f"A curvature key must be hexadecimal digits in lower case, got {key!r}: "
                "pass a digest of everything that determines the curvature."
            )
        path = layout.curvature_file(self.root, key)
        try:
            make_folder(path.parent)
            with writing(path, "curvature") as file:
                put_tensors(file.create_group(layout.VALUES), value)
        except OSError as error:
            warnings.warn(
                f"Fitted curvature is not kept, because {path} cannot be written: {error}. "
                "Scores are not affected; the next attribution will fit it again.",
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
        return layout.curvature_files(self.root)
