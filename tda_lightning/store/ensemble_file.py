"""The file that names an ensemble's kind, members and their seeds: ``ensemble.json``, JSON text.

::

    format            "tda-lightning ensemble"
    format_version    1
    kind              "seeds", "forks", "dropout" or "lora"
    run               folder of the recorded run that it was made from, relative to this file's
    run_id            of that run, when the ensemble was begun
    settings          of the kind
    members           [{number, folder, seed, state, reason}]: the folder of each trajectory,
                      likewise relative, and whether it is planned, finished or diverged
"""

from __future__ import annotations

import json
from dataclasses import asdict
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

from tda_lightning.records.ensemble import (
    DIVERGED,
    FINISHED,
    KINDS,
    PLANNED,
    EnsembleFacts,
    MemberFact,
)
from tda_lightning.records.errors import TrajectoryFormatError, TrajectoryNotFoundError
from tda_lightning.store.atomic_write import write_text
from tda_lightning.store.untrusted import from_json, require_regular

FILE_NAME = "ensemble.json"
_FORMAT, _VERSION = "tda-lightning ensemble", 1
_LARGEST = 1 << 24  # bytes


def is_ensemble(path: str | PathLike[str]) -> bool:
    """Whether the folder is that of an ensemble."""
    return (Path(path) / FILE_NAME).is_file()


def read_ensemble(path: str | PathLike[str]) -> EnsembleFacts:
    """What the ensemble's folder ``path`` says about it.

    Raises:
        TrajectoryNotFoundError: it holds no ensemble.
        TrajectoryFormatError: its file is damaged or of another version.
    """
    file = Path(path) / FILE_NAME
    if not file.exists():
        raise TrajectoryNotFoundError(
            f"No ensemble in {path}: expected a folder with {FILE_NAME}, as tda ensemble and "
            "tda_lightning.ensembles write it. Check the path."
        )
    require_regular(file)
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"{file.stat().st_size} bytes")
        return _facts(from_json(file.read_bytes()))
    except (LookupError, RecursionError, TypeError, ValueError) as error:
        raise TrajectoryFormatError(
            f"{file} is damaged: {type(error).__name__}: {error}. Restore the file from a copy, or "
            "make the ensemble again."
        ) from error


def write_ensemble(facts: EnsembleFacts, path: str | PathLike[str]) -> None:
    """Write ``facts`` into the folder ``path``, replacing what is there."""
    text = {"format": _FORMAT, "format_version": _VERSION, **asdict(facts)}
    write_text(Path(path) / FILE_NAME, json.dumps(text, indent=1) + "\n")


def _facts(text: Any) -> EnsembleFacts:
    if text["format"] != _FORMAT or text["format_version"] != _VERSION:
        raise ValueError(
            f"expected {_FORMAT!r} of version {_VERSION}, got "
            f"{str(text['format'])[:100]!r} of version {str(text['format_version'])[:100]}"
        )
    if text["kind"] not in KINDS:
        raise ValueError(f"kind is {str(text['kind'])[:100]!r}, expected one of {KINDS}")
    if not isinstance(text["settings"], dict) or not isinstance(text["members"], list):
        raise TypeError("settings are no JSON object, or members no list")
    members = tuple(_member(entry) for entry in text["members"])
    if [member.number for member in members] != list(range(1, len(members) + 1)):
        raise ValueError("members are not numbered from 1")
    if not isinstance(text["run_id"], str | None):
        raise TypeError(f"run_id is {str(text['run_id'])[:100]!r}")
    run = _folder(text["run"])
    return EnsembleFacts(text["kind"], run, text["run_id"], members, text["settings"])


def _member(entry: Any) -> MemberFact:
    number, seed, state = entry["number"], entry["seed"], entry["state"]
    if type(number) is not int or not (seed is None or type(seed) is int):
        raise TypeError(f"member {str(number)[:100]} has seed {str(seed)[:100]}")
    if state not in (PLANNED, FINISHED, DIVERGED) or not isinstance(entry["reason"], str):
        raise ValueError(f"member {number} is {str(state)[:100]!r}")
    return MemberFact(number, _folder(entry["folder"]), seed, state, entry["reason"])


def _folder(text: object) -> str:
    """A relative path, by forward slashes on every system."""
    if not isinstance(text, str) or not text or PurePosixPath(text).is_absolute() or "\0" in text:
        raise ValueError(f"expected a relative folder, got {str(text)[:100]!r}")
    return text
