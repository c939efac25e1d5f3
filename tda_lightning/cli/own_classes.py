"""``tda train module=my.Module data=my.Data``: one's own classes in the place of a configuration.

Their names become the ``_target_`` of nodes of their own, into which nothing of this library's
configurations is merged; ``module.KEY=VALUE`` and ``data.KEY=VALUE`` are their arguments.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

# A path of Python names, such as my.Module. Options of conf/ have no dots.
_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_NODES = {"module": "model", "model": "model", "data": "data"}


def with_own_classes(arguments: Sequence[str]) -> list[str]:
    """The arguments of ``tda train`` in Hydra's terms.

    Raises:
        ValueError: one of the two classes is given without the other.

    Example:
        >>> with_own_classes(["module=my.Net", "data=my.Data", "module.width=8"])[:3]
        ['model=own', 'data=own', '++model._target_=my.Net']
    """
    classes: dict[str, str] = {}
    rest: list[str] = []
    for text in arguments:
        key, equals, value = text.partition("=")
        if equals and key in _NODES and _CLASS.fullmatch(value):
            classes[_NODES[key]] = value
        else:
            rest.append(text)
    given = {text.partition("=")[0] for text in rest}
    own_file = "config" in given and "config=null" not in rest
    if not classes and not own_file:
        return [*arguments]
    # What a file describes has nodes of its own too, into which the file's are read later.
    nodes = [node for node in ("model", "data") if node in classes or own_file]
    nodes = [node for node in nodes if node not in given]
    if len(nodes) == 1 and not {"experiment", *_NODES} & given:
        (have,) = classes
        lacks = "data=my.Data" if have == "model" else "module=my.Module"
        raise ValueError(
            f"One's own {'module' if have == 'model' else 'data'} needs its other half: add "
            f"{lacks}, or the name of a configuration of this library (see tda train --help)."
        )
    made = [f"{node}=own" for node in nodes]
    made += [f"++{node}._target_={name}" for node, name in classes.items()]
    if "model" in nodes:
        # The module has its own loss and optimizer, unless something else is said.
        made += [] if "task" in given else ["task=none"]
        made += [f"~{group}" for group in ("optimizer", "scheduler") if group not in given]
        if "model" in classes and not {"name", "output"} & given:
            made.append(f"name={classes['model'].rpartition('.')[2].lower()}")
    added = {*nodes, "trainer"} if own_file else {*nodes}
    return made + [_argument(text, added) for text in rest]


def _argument(text: str, nodes: set[str]) -> str:
    """An argument of one's own class is added to its node, which has none so far."""
    key, dot, setting = text.partition(".")
    node = _NODES.get(key, key)
    return f"++{node}.{setting}" if dot and node in nodes else text


def import_from_here() -> None:
    """Let classes be found in the working directory, as ``python -m`` does, but last: a file there
    takes no other module's place."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
