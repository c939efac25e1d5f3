"""The list of all messages of errors, read from the source of the package."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

INTRODUCTION = """\
# All messages

What errors of the library say, by the class of the error and the folder of the code that raises it.
"…" stands for what is filled in. Short ones without advice are parts of longer messages.
[Troubleshooting](troubleshooting.md) has the causes.
"""
_PLACE = "…"


def messages(root: Path) -> Iterator[tuple[str, str, str]]:
    """(class of the error, folder, message) of every ``raise`` in the package under ``root``."""
    for path in sorted((root / "tda_lightning").rglob("*.py")):
        folder = path.relative_to(root / "tda_lightning").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = _text(node.exc.args[0])
                if text and isinstance(node.exc.func, ast.Name) and node.exc.func.id[0].isupper():
                    yield node.exc.func.id, folder, text


def all_messages(root: Path) -> str:
    """The page."""
    found: defaultdict[str, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for error, folder, text in messages(root):
        found[error][folder].add(text)
    lines = [INTRODUCTION]
    for error in sorted(found):
        lines.append(f"## {error}\n")
        for folder in sorted(found[error]):
            lines.append(f"**{folder}**\n")
            lines += [f"- {_escaped(text)}" for text in sorted(found[error][folder])]
            lines.append("")
    return "\n".join(lines) + "\n"


def _text(node: ast.expr) -> str:
    """A literal or formatted string, its values replaced by a place holder."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_text(node.left) or _PLACE) + (_text(node.right) or _PLACE)
    if isinstance(node, ast.JoinedStr):
        parts = (v.value if isinstance(v, ast.Constant) else _PLACE for v in node.values)
        return "".join(str(part) for part in parts)
    return ""


def _escaped(text: str) -> str:
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\`*_[]#|" else c for c in text)
