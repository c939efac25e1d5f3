"""Which attributes of a module its ``training_step`` reads and its training hooks set: what a step
does then depends on what happened in training, and not on its batch alone."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

# Methods that Lightning calls in training, and attribution does not.
_HOOKS = (
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "optimizer_step",
    "lr_scheduler_step",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "validation_step",
    "on_validation_epoch_end",
    "on_validation_end",
)
_OURS = ("torch", "lightning", "pytorch_lightning", "builtins")


@dataclass
class _Method:
    reads: set[str] = field(default_factory=set)
    sets: set[str] = field(default_factory=set)
    calls: set[str] = field(default_factory=set)


@lru_cache(maxsize=64)
def set_by_hooks(kind: Any) -> dict[str, frozenset[str]]:
    """Attributes that ``training_step`` reads, by the hook that sets them; as far as the source of
    the class shows."""
    methods = _methods(kind)
    # What the step sets itself, it is taken to set before it reads it.
    read = _reached(methods, "training_step", "reads") - _reached(methods, "training_step", "sets")
    found = {}
    for hook in _HOOKS:
        if hook in methods and (both := _reached(methods, hook, "sets") & read):
            found[hook] = frozenset(both)
    return found


def _methods(kind: type) -> dict[str, _Method]:
    methods: dict[str, _Method] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.partition(".")[0] in _OURS:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        for node in tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []:
            if isinstance(node, ast.FunctionDef) and node.args.args:
                methods[node.name] = _read(node)
    return methods


def _reached(methods: dict[str, _Method], start: str, what: str) -> set[str]:
    """What a method reads or sets, itself or through others of the class."""
    found: set[str] = set()
    waiting, seen = [start], set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in methods:
            continue
        seen.add(name)
        found |= getattr(methods[name], what)
        waiting += methods[name].calls | methods[name].reads  # a property is read
    return found - methods.keys()


def _read(function: ast.FunctionDef) -> _Method:
    own, method = function.args.args[0].arg, _Method()
    filled = {id(node) for node in _only_filled(function)}
    for node in ast.walk(function):
        target = node.target if isinstance(node, ast.AugAssign) else None
        if isinstance(target, ast.Attribute) and _is(target.value, own):
            method.reads.add(target.attr)
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and _is(called.value, own):
            method.calls.add(called.attr)
        if isinstance(node, ast.Attribute) and _is(node.value, own):
            if isinstance(node.ctx, ast.Store):
                method.sets.add(node.attr)
            elif id(node) not in filled:
                method.reads.add(node.attr)
    return method


def _only_filled(function: ast.FunctionDef) -> Iterator[ast.expr]:
    """Attributes whose method is called for its effect alone (``self.outputs.append(loss)``)."""
    for node in ast.walk(function):
        called = node.value if isinstance(node, ast.Expr) else None
        if isinstance(called, ast.Call) and isinstance(called.func, ast.Attribute):
            yield called.func.value


def _is(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
