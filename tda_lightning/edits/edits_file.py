"""Edits as a file: what a report exports, and what ``tda attribute edits=FILE`` and ``tda train
drop=FILE`` read.

JSON, so that a person can read and write it::

    {"format": "tda-lightning edits", "version": 1, "num_train": 1500, "edits": [
      {"kind": "Removal", "index": 3, "note": "blank"},
      {"kind": "Relabel", "index": 5, "label": 7}]}

``num_train`` is the size of the training set that the indices count; a ``note`` is for people.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from tda_lightning.edits.edits import Relabel, Removal

FORMAT = "tda-lightning edits"
VERSION = 1


def save_edits(
    edits: Sequence[Removal | Relabel], path: str | PathLike[str], num_train: int
) -> None:
    """Write removals and other labels to a file.

    Args:
        edits: of different training examples.
        path: the file; an older one is replaced.
        num_train: number of training examples that the indices count.
    """
    records: list[dict[str, object]] = []
    for edit in edits:
        record: dict[str, object] = {"kind": type(edit).__name__, "index": edit.index}
        if isinstance(edit, Relabel):
            label = edit.label
            record["label"] = label.tolist() if hasattr(label, "tolist") else label
        records.append(record)
    content = {"format": FORMAT, "version": VERSION, "num_train": num_train, "edits": records}
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_edits(path: str | PathLike[str], num_train: int | None = None) -> list[Removal | Relabel]:
    """The edits of a file, in its order.

    Args:
        path: written by a report, by :func:`save_edits` or by hand.
        num_train: size of the training set that they are meant for; None does not compare it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has another form, no edits, edits an example twice, or counts another
            training set.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Export edits from a report.")
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _odd(path, f"got no JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _odd(path, f'got no "format": "{FORMAT}"')
    version = content.get("version")
    if version != VERSION:
        raise _odd(path, f"got version {version!r}, of which this version of the library knows 1")
    records = content.get("edits")
    if not isinstance(records, list) or not records:
        raise _odd(path, "got no edits: mark examples as wrong or to be relabelled first")
    size = content.get("num_train")
    if num_train is not None and size is not None and size != num_train:
        raise ValueError(
            f"The edits in {path} count {size} training examples, the training set has "
            f"{num_train}. Give the edits of a report about this training set; of a run that was "
            "itself trained without some examples, give both files, the earlier one first."
        )
    edits = [_edit(record, path, number) for number, record in enumerate(records)]
    seen: set[int] = set()
    for edit in edits:
        if edit.index in seen:
            raise _odd(path, f"got two edits of training example {edit.index}")
        if num_train is not None and edit.index >= num_train:
            raise ValueError(
                f"{path} edits training example {edit.index}; expected 0 to {num_train - 1}."
            )
        seen.add(edit.index)
    return edits


def _edit(record: object, path: Path, number: int) -> Removal | Relabel:
    if not isinstance(record, dict):
        raise _odd(path, f"got {record!r:.100} as edit {number}")
    kind, index = record.get("kind"), record.get("index")
    if type(index) is not int or index < 0:
        raise _odd(path, f"got the index {index!r:.100} in edit {number}")
    if kind == "Removal":
        return Removal(index)
    if kind == "Relabel" and "label" in record:
        return Relabel(index, record["label"])
    raise _odd(path, f"got {record!r:.100} as edit {number}")


def _odd(path: Path, got: str) -> ValueError:
    return ValueError(
        f"{path}: expected a file of edits, {{kind: Removal, index}} or {{kind: Relabel, index, "
        f"label}}, as a report exports it; {got}."
    )
