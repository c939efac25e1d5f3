"""Copies an index from a store that fsspec reads into a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import fsspec

from tda_lightning.store.atomic_write import make_folder, replacing
from tda_lightning.store.layout import COMPRESSION_FILE, INDEX_FILE, SHARD_NAME, shard_file


def fetch_files(url: str, target: Path) -> None:
    """Copy the files of the index at ``url`` into ``target``, what it says of itself last.

    Raises:
        FileNotFoundError: there is none.
        FileExistsError: ``target`` holds another index, or another state of this one.
    """
    system, root = fsspec.core.url_to_fs(url)
    if not system.exists(f"{root}/{INDEX_FILE}"):
        raise FileNotFoundError(f"{url} holds no index: expected {INDEX_FILE} there.")
    there = (target / INDEX_FILE).read_bytes() if (target / INDEX_FILE).exists() else None
    if there is not None and there != system.cat_file(f"{root}/{INDEX_FILE}"):
        raise FileExistsError(
            f"{target} holds another index than {url}, or an earlier state of it, which is kept. "
            "Choose another folder, or delete that one."
        )
    files = [COMPRESSION_FILE]
    for name in system.ls(f"{root}/{Path(shard_file(Path(), 0, 1)).parent}", detail=False):
        # Names come from the store: no other than a shard's leads anywhere.
        if found := SHARD_NAME.fullmatch(name.rpartition("/")[2]):
            files.append(str(shard_file(Path(), int(found[1]), int(found[2]))))
    for file in [*files, INDEX_FILE]:
        _fetch(system, f"{root}/{file}", target / file)


def _fetch(system: Any, source: str, path: Path) -> None:
    if path.exists() and path.stat().st_size == system.size(source):
        return
    make_folder(path.parent)
    with replacing(path) as part, system.open(source, "rb") as read, open(part, "wb") as written:
        shutil.copyfileobj(read, written)
