"""Which attributes of a module its ``training_step`` reads and its training hooks set: what a step
does then depends on what happened in training, and not on its batch alone."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

from torch import nn

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
_STEP = frozenset({"training_step"})
_OURS = ("torch", "lightning", "pytorch_lightning", "builtins")


@dataclass
class _Method:
    reads: set[str] = field(default_factory=set)
    sets: set[str] = field(default_factory=set)
    carries: set[str] = field(default_factory=set)  # sets to what it makes of the value before
    uses: set[str] = field(default_factory=set)  # reads for more than carrying and logging
    calls: set[str] = field(default_factory=set)
    asks: set[str] = field(default_factory=set)  # calls of anything by this name


@lru_cache(maxsize=64)
def set_by_hooks(kind: Any) -> dict[str, frozenset[str]]:
    """Attributes that ``training_step`` reads, by the hook that sets them; as far as the source of
    the class shows."""
    methods = _methods(kind)
    # What the step sets itself, it is taken to set before it reads it.
    read = _reached(methods, *_STEP, what="reads") - _reached(methods, *_STEP, what="sets")
    found = {}
    for hook in _HOOKS:
        if hook in methods and (both := _reached(methods, hook, what="sets") & read):
            found[hook] = frozenset(both)
    return found


def carried(module: nn.Module) -> set[str]:
    """Attributes of a module and its parts that ``training_step`` itself carries on from one batch
    to the next and uses, a counter or a running mean, without buffers; as far as the source of
    their classes shows. Installed packages are not looked into: they would hold many classes."""
    asked = _asked_of_parts(cast(Hashable, type(module)))
    found = set()
    for path, part in module.named_modules():
        if path and _is_installed(type(part)):
            continue
        names = _carried(cast(Hashable, type(part)), asked if path else _STEP)
        before = f"{path}." if path else ""
        found |= {f"{before}{name}" for name in names - {*part._buffers, *part._parameters}}
    return found


def _is_installed(kind: type) -> bool:
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return "site-packages" in str(file)


@lru_cache(maxsize=64)
def _asked_of_parts(kind: Any) -> frozenset[str]:
    """Names of methods that ``training_step`` may call of a module's parts."""
    return frozenset({"forward"} | _reached(_methods(kind), *_STEP, what="asks"))


@lru_cache(maxsize=256)
def _carried(kind: Any, starts: frozenset[str]) -> frozenset[str]:
    methods = _methods(kind)
    carries, uses = (_reached(methods, *starts, what=what) for what in ("carries", "uses"))
    return frozenset(carries & uses)


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


def _reached(methods: dict[str, _Method], *starts: str, what: str) -> set[str]:
    """What methods read or set, themselves or through others of the class."""
    found: set[str] = set()
    waiting, seen = [*starts], set()
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
    aside = filled | {id(node) for node in _only_logged(function, own)}
    for node in ast.walk(function):
        target = node.target if isinstance(node, ast.AugAssign) else None
        if isinstance(target, ast.Attribute) and _is(target.value, own):
            method.reads.add(target.attr)
            method.carries.add(target.attr)
        if isinstance(node, ast.Assign):
            for name, read in _own_values(node, own):
                method.carries.add(name)
                aside.add(id(read))
    for node in ast.walk(function):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute):
            (method.calls if _is(called.value, own) else method.asks).add(called.attr)
        if isinstance(node, ast.Attribute) and _is(node.value, own):
            if isinstance(node.ctx, ast.Store):
                method.sets.add(node.attr)
            elif id(node) not in filled:
                method.reads.add(node.attr)
                if id(node) not in aside:
                    method.uses.add(node.attr)
    return method


def _only_filled(function: ast.FunctionDef) -> Iterator[ast.expr]:
    """Attributes whose method is called for its effect alone (``self.outputs.append(loss)``)."""
    for node in ast.walk(function):
        called = node.value if isinstance(node, ast.Expr) else None
        if isinstance(called, ast.Call) and isinstance(called.func, ast.Attribute):
            yield called.func.value


def _only_logged(function: ast.FunctionDef, own: str) -> Iterator[ast.AST]:
    """What is in the arguments of ``self.log`` and ``self.log_dict``."""
    for node in ast.walk(function):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and _is(called.value, own):
            yield from ast.walk(node) if called.attr in ("log", "log_dict") else ()


def _own_values(node: ast.Assign, own: str) -> Iterator[tuple[str, ast.AST]]:
    """Attributes among the targets that the assigned value reads, with where it does."""
    targets = {
        target.attr
        for target in node.targets
        if isinstance(target, ast.Attribute) and _is(target.value, own)
    }
    for read in ast.walk(node.value):
        if isinstance(read, ast.Attribute) and _is(read.value, own) and read.attr in targets:
            yield read.attr, read


def _is(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
