"""No code outside ``optimizers/`` knows an optimizer."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from tda_lightning.optimizers import find_rule, known_optimizers

PACKAGE = Path(__file__).parents[2] / "tda_lightning"
FREE = {"optimizers", "examples"}  # the rules themselves, and models that choose an optimizer
FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.relative_to(PACKAGE).parts[0] not in FREE]
NAMES = [name for name in known_optimizers() if hasattr(torch.optim, name)]
STATES = {state for name in NAMES for state in find_rule(name).states}
# "sum" is a word of every file.
WORDS = {*NAMES, *STATES} - {"sum"}
FORBIDDEN = re.compile(rf"(?<![A-Za-z])(?:{'|'.join(WORDS)})(?![a-z])")


def code(tree: ast.AST) -> Iterator[str]:
    """Names and texts of a file, docstrings apart."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings:
                yield node.value
        else:
            for field in ("id", "attr", "name", "arg"):
                if isinstance(value := getattr(node, field, None), str):
                    yield value


def test_the_words_are_those_of_the_rules() -> None:
    assert {"SGD", "Adam", "AdamW", "RMSprop", "Adagrad"} <= WORDS
    assert {"momentum_buffer", "exp_avg", "exp_avg_sq", "square_avg", "grad_avg"} <= WORDS
    found = [FORBIDDEN.search(text) for text in code(ast.parse("x = kind == 'SGD'; y = y.exp_avg"))]
    assert len([one for one in found if one]) == 2


def test_no_code_names_an_optimizer_or_its_states() -> None:
    named = {
        str(path.relative_to(PACKAGE)): text
        for path in FILES
        for text in code(ast.parse(path.read_text()))
        if FORBIDDEN.search(text)
    }
    assert len(FILES) > 300
    assert not named
