"""Ways to damage the files of a trajectory or of scores, each drawn from a seeded generator.

A mutation changes the copy of a recorded folder in place: ``apply(generator, victim, place)``.
Those of :data:`BYTES` know nothing of HDF5, those of :data:`FOLDER` change what lies where, those
of :data:`CONTENT` (``tests.mutations_hdf5``) rewrite a file through h5py, so that all of HDF5's own
checksums are right and only the reader stands between the damage and the user.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """The folder whose files are damaged, and one beside it that nothing may touch."""

    root: Path
    outside: Path

    def files(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*.h5") if path.is_file())

    def like(self, victim: Path) -> list[Path]:
        """Other files of the victim's kind."""
        return [f for f in self.files() if f.parent == victim.parent and f != victim]


Mutation = Callable[[random.Random, Path, Place], None]


# Bytes.


def _on_bytes(change: Callable[[random.Random, bytearray], bytes | bytearray | None]) -> Mutation:
    def apply(generator: random.Random, victim: Path, place: Place) -> None:
        content = bytearray(victim.read_bytes())
        changed = change(generator, content)
        victim.write_bytes(content if changed is None else changed)

    return apply


def _flip(generator: random.Random, content: bytearray, count: int, end: int) -> None:
    for _ in range(count):
        content[generator.randrange(min(end, len(content)))] ^= 1 << generator.randrange(8)


def _overwrite(generator: random.Random, content: bytearray, fill: Callable[[int], bytes]) -> None:
    size = generator.choice([1, 2, 4, 8, 64, 512, 4096])
    start = generator.randrange(len(content))
    size = min(size, len(content) - start)
    content[start : start + size] = fill(size)


def _swap(generator: random.Random, content: bytearray) -> None:
    size = min(generator.choice([8, 64, 512]), len(content) // 2)
    first, second = sorted(generator.sample(range(len(content) // size), 2))
    a, b = slice(first * size, (first + 1) * size), slice(second * size, (second + 1) * size)
    content[a], content[b] = content[b], content[a]


def _repeat(generator: random.Random, content: bytearray) -> bytes:
    start, stop = sorted(generator.sample(range(len(content)), 2))
    return bytes(content[:stop] + content[start:])


def _cut(generator: random.Random, content: bytearray) -> bytes:
    start, stop = sorted(generator.sample(range(len(content)), 2))
    return bytes(content[:start] + content[stop:])


BYTES: dict[str, Mutation] = {
    "one bit": _on_bytes(lambda g, c: _flip(g, c, 1, len(c))),
    "some bits": _on_bytes(lambda g, c: _flip(g, c, g.choice([2, 8, 64, 512]), len(c))),
    "bits at the start": _on_bytes(lambda g, c: _flip(g, c, g.choice([1, 2]), 512)),
    "bits of the attributes": _on_bytes(lambda g, c: _flip(g, c, 1, 2048)),
    "zeros": _on_bytes(lambda g, c: _overwrite(g, c, bytes)),
    "ones": _on_bytes(lambda g, c: _overwrite(g, c, lambda size: b"\xff" * size)),
    "noise": _on_bytes(lambda g, c: _overwrite(g, c, g.randbytes)),
    "truncated": _on_bytes(lambda g, c: c[: g.randrange(len(c))]),
    "end lost": _on_bytes(lambda g, c: c[: -g.randint(1, 16)]),
    "garbage after": _on_bytes(lambda g, c: c + g.randbytes(g.choice([1, 512, 5000]))),
    "garbage before": _on_bytes(lambda g, c: g.randbytes(g.choice([1, 512, 1024])) + c),
    "blocks swapped": _on_bytes(_swap),
    "block twice": _on_bytes(_repeat),
    "block gone": _on_bytes(_cut),
    "empty": _on_bytes(lambda g, c: b""),
    "text": _on_bytes(lambda g, c: g.choice([b"hello", b"\x89HDF\r\n\x1a\n", b"\0" * 4096])),
}


# What lies where.


def _another(generator: random.Random, victim: Path, place: Place) -> None:
    other = generator.choice([file for file in place.files() if file != victim])
    victim.write_bytes(other.read_bytes())


def _another_alike(generator: random.Random, victim: Path, place: Place) -> None:
    other = generator.choice(place.like(victim) or [victim])
    victim.write_bytes(other.read_bytes())


def _renamed(generator: random.Random, victim: Path, place: Place) -> None:
    victim.rename(victim.with_name(_name(generator, victim)))


def _twice(generator: random.Random, victim: Path, place: Place) -> None:
    victim.with_name(_name(generator, victim)).write_bytes(victim.read_bytes())


def _name(generator: random.Random, victim: Path) -> str:
    """A file name that a reader might take for one of ours, or stumble over."""
    stem = victim.stem
    step = f"{generator.choice([0, 1, 2, 5, 10**8, 10**17]):08d}"
    return generator.choice(
        [
            f"{step}.h5",
            f"{step}-{step}.h5",
            "00000001-99999999.h5",
            "00000009-00000002.h5",
            f"00{stem}.h5",
            f"{stem}.H5",
            f"{stem}.h5.part",
            stem.translate({48 + digit: 0x0660 + digit for digit in range(10)}) + ".h5",
            "..h5",
            "%2E%2E%2Fx.h5",
            "beef.h5",
            "a" * 128 + ".h5",
            "line\nbreak \x1b[31m.h5",
            os.fsdecode(b"\xff\xfe.h5"),
        ]
    )


def _folder_gone(generator: random.Random, victim: Path, place: Place) -> None:
    shutil.rmtree(_folder(generator, place))


def _folder(generator: random.Random, place: Place) -> Path:
    return generator.choice(sorted(path for path in place.root.iterdir() if path.is_dir()))


def _folder_as_file(generator: random.Random, victim: Path, place: Place) -> None:
    folder = _folder(generator, place)
    shutil.rmtree(folder)
    folder.write_bytes(b"in the way")


def _folder_linked(generator: random.Random, victim: Path, place: Place) -> None:
    folder = _folder(generator, place)
    folder.rename(place.outside / "moved")
    folder.symlink_to(place.outside / "moved")


def _instead(make: Callable[[random.Random, Path, Place], object]) -> Mutation:
    def apply(generator: random.Random, victim: Path, place: Place) -> None:
        victim.unlink()
        make(generator, victim, place)

    return apply


def _bind_socket(generator: random.Random, victim: Path, place: Place) -> None:
    # A socket's path is short: bind it from its folder.
    before = os.getcwd()
    os.chdir(victim.parent)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(victim.name)
    finally:
        os.chdir(before)


def _leftovers(generator: random.Random, victim: Path, place: Place) -> None:
    for number in range(generator.randint(1, 3)):
        content = victim.read_bytes()
        name = f"{victim.name}{generator.choice(['', f'.{number}'])}.part"
        victim.with_name(name).write_bytes(content[: generator.randrange(len(content))])


def _linked_away(generator: random.Random, victim: Path, place: Place) -> None:
    victim.rename(place.outside / "moved.h5")
    target = generator.choice([place.outside / "moved.h5", os.path.relpath(place.outside)])
    victim.symlink_to(target)


FOLDER: dict[str, Mutation] = {
    "another file": _another,
    "another of its kind": _another_alike,
    "deleted": lambda g, v, p: v.unlink(),
    "renamed": _renamed,
    "copied": _twice,
    "folder deleted": _folder_gone,
    "folder is a file": _folder_as_file,
    "folder is a link": _folder_linked,
    "file is a folder": _instead(lambda g, v, p: v.mkdir()),
    "fifo": _instead(lambda g, v, p: os.mkfifo(v)),
    "socket": _instead(_bind_socket),
    "link outside": _linked_away,
    "link to nothing": _instead(lambda g, v, p: v.symlink_to(p.outside / "nothing")),
    "link to itself": _instead(lambda g, v, p: v.symlink_to(v)),
    "link to a device": _instead(lambda g, v, p: v.symlink_to("/dev/zero")),
    "link to a fifo": _instead(lambda g, v, p: v.symlink_to(p.outside / "fifo")),
    "unreadable": lambda g, v, p: g.choice([v, v.parent]).chmod(0),
    "leftovers": _leftovers,
}
