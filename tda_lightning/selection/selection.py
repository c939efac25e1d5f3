"""What was chosen from a pool, in memory and as files."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from tda_lightning.store.atomic_write import write_text

FORMAT = "tda-lightning selection"
VERSION = 1


@dataclass(frozen=True)
class Choice:
    """One example of the pool that was trained on.

    Attributes:
        replica: which of the repetitions, from 0.
        step: of training, from 1.
        index: in the pool.
        score: predicted change of the anchors' mean measurement if it had been in the training
            set; below 0, since smaller measurements are better.
    """

    replica: int
    step: int
    index: int
    score: float


@dataclass(frozen=True)
class Selection:
    """Examples chosen from a pool, and what training on them did.

    Attributes:
        choices: in the order of training, replica by replica.
        num_pool: size of the pool.
        measurements: mean measurement of the whole target before training and after every step,
            [replica, step + 1].
        states: weights and buffers that each replica ended with.
        labels: of the chosen examples, by index; empty where the pool does not say them.
        notes: what a reader should know about pool and target.
    """

    choices: tuple[Choice, ...]
    num_pool: int
    measurements: Tensor
    states: tuple[Mapping[str, Tensor], ...]
    labels: Mapping[int, object]
    notes: tuple[str, ...] = ()

    @property
    def indices(self) -> list[int]:
        """The chosen examples, each once: what most replicas chose first, the most helpful of
        equals first."""
        replicas: dict[int, set[int]] = {}
        best: dict[int, float] = {}
        for choice in self.choices:
            replicas.setdefault(choice.index, set()).add(choice.replica)
            best[choice.index] = min(choice.score, best.get(choice.index, choice.score))
        return sorted(best, key=lambda index: (-len(replicas[index]), best[index], index))

    def write_csv(self, path: str | PathLike[str]) -> None:
        """One line for each choice: replica, step, index in the pool, score, label."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["replica", "step", "index", "score", "label"])
            for own in self.choices:
                label = self.labels.get(own.index, "")
                rows.writerow([own.replica, own.step, own.index, repr(own.score), label])


def save_chosen(
    indices: Sequence[int],
    num_pool: int,
    pool: Mapping[str, object],
    path: str | PathLike[str],
) -> None:
    """Write what ``tda train extra=FILE`` adds to a training set.

    Args:
        indices: of the chosen examples, in the pool.
        num_pool: its size.
        pool: the changes of the data settings that make it, as ``tda select pool=`` takes them.
        path: the file; an older one is replaced.
    """
    content = {"format": FORMAT, "version": VERSION, "pool": dict(pool), "num_pool": num_pool}
    write_text(Path(path), json.dumps(content | {"chosen": list(indices)}, indent=1) + "\n")


def load_chosen(path: str | PathLike[str]) -> tuple[list[int], int | None, dict[str, object]]:
    """Indices in the pool, its size (None where a hand-written file does not say) and its settings.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has another form, no indices, or one twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Make one with tda select.")
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _odd(path, f"no JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _odd(path, f'no "format": "{FORMAT}"')
    if content.get("version") != VERSION:
        raise _odd(path, f"version {content.get('version')!r}")
    chosen, pool, size = content.get("chosen"), content.get("pool"), content.get("num_pool")
    if not isinstance(chosen, list) or not chosen or not isinstance(pool, dict):
        raise _odd(path, "no indices or no settings of the pool")
    if any(type(index) is not int or index < 0 for index in chosen):
        raise _odd(path, f"the indices {chosen!r:.100}")
    if len(set(chosen)) < len(chosen):
        raise _odd(path, "an index twice")
    if size is not None and (type(size) is not int or max(chosen) >= size):
        raise _odd(path, f"index {max(chosen)} of a pool of {size!r:.100}")
    return chosen, size, pool


def mean_measurements(rows: Sequence[Sequence[float]]) -> Tensor:
    """[replica, step + 1]; a replica that ended early keeps its last value."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])


def _odd(path: Path, got: str) -> ValueError:
    return ValueError(
        f'{path}: expected a file of chosen examples, {{"format": "{FORMAT}", "version": '
        f'{VERSION}, "pool": {{KEY: VALUE}}, "chosen": [INDEX, ...]}}, as tda select writes it; '
        f"got {got}."
    )
