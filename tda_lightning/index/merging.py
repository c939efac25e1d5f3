"""Puts the parts of an index together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tda_lightning.index.build import damage_of
from tda_lightning.index.facts import IndexFacts
from tda_lightning.store.atomic_write import make_folder
from tda_lightning.store.index_files import copy_file
from tda_lightning.store.layout import COMPRESSION_FILE, INDEX_FILE, shard_file


def merge_files(parts: Sequence[tuple[Path, IndexFacts]], target: Path) -> None:
    """Copy the shards of all parts into ``target``.

    Raises:
        ValueError: they differ in more than which shards they have.
        FileExistsError: ``target`` holds another index.
    """
    (first, facts), *others = parts
    for path, other in others:
        if not facts.same_as(other):
            raise ValueError(
                f"{first} and {path} are not parts of one index: expected the same run, settings "
                f"and coordinates. Build {path} again with like={first}, or build all parts in one "
                "folder."
            )
    appended = max((own.appended for _, own in parts), key=len)
    if any(own.appended != appended[: len(own.appended)] for _, own in parts):
        raise ValueError("Different examples were appended to the parts: append them to the whole.")
    if (target / INDEX_FILE).exists():
        there = IndexFacts.read(target)
        common = min(len(appended), len(there.appended))
        if not there.same_as(facts) or there.appended[:common] != appended[:common]:
            raise FileExistsError(
                f"{target} holds another index, which is kept. Choose another folder."
            )
        appended = max(appended, there.appended, key=len)  # to the whole, since it was merged
    facts = replace(facts, appended=appended)
    make_folder(target)
    if not (target / COMPRESSION_FILE).exists():
        copy_file(first / COMPRESSION_FILE, target / COMPRESSION_FILE)
    facts.write(target)
    for own in facts.ranges():
        if damage_of(target, facts, *own) is None:
            continue
        for path, _ in parts:
            if damage_of(path, facts, *own) is None:
                copy_file(shard_file(path, *own), shard_file(target, *own))
                break
