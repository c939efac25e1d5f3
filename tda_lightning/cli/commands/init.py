"""``tda init``: a small project to start from."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

_TEMPLATE = Path(__file__).parents[1] / "project"
_HELP = """\
tda init [FOLDER]: write a small project to start from, a module and data of one's own.

FOLDER must not exist, or be empty; by default it is my_attribution.
"""


def init(arguments: Sequence[str]) -> int:
    """Write the project; the exit status."""
    if any(text in ("-h", "--help") for text in arguments):
        print(_HELP, end="")
        return 0
    if len(arguments) > 1 or any(text.startswith("-") or "=" in text for text in arguments):
        print(
            f"tda init: expected a folder, got {' '.join(arguments)}.\n\n{_HELP}", file=sys.stderr
        )
        return 2
    folder = Path(arguments[0] if arguments else "my_attribution")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        print(
            f"tda init: {folder} is not empty, and stays as it is. Choose another folder.",
            file=sys.stderr,
        )
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(_TEMPLATE.iterdir()):
        if file.is_file():
            name = file.name.removesuffix(".txt")
            (folder / name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    names = ", ".join(path.name for path in sorted(folder.iterdir()))
    print(
        f"Wrote {names} to {folder}. To begin:\n"
        f"    cd {folder}\n"
        "    tda train module=model.Net data=data.Points trainer.max_epochs=20\n"
        "    tda attribute runs/net trust_config=true self_influence=true\n"
        "    tda report runs/net/scores/source.h5 trust_config=true"
    )
    return 0
