"""Replaces a method of an object for a while, also where others do so at the same time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Wrapped:
    """``owner.name`` replaced by ``make(present method)``, until :meth:`remove`.

    Two recorders wrap the same strategy, and either may end first. The outermost wrapper alone can
    be taken away; one beneath another passes every call on until its turn comes.

    Args:
        owner: whose attribute dictionary takes the wrapper.
        name: of the method.
        make: from the method as it is now, the one that is called instead.
    """

    def __init__(
        self, owner: object, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        self._owner, self._name, self._active = owner, name, True
        self._before = vars(owner).get(name)  # None: the method of the class
        inner = getattr(owner, name)
        outer = make(inner)

        def method(*args: Any, **kwargs: Any) -> Any:
            return (outer if self._active else inner)(*args, **kwargs)

        vars(method)["wrapped"] = self
        vars(owner)[name] = method

    def remove(self) -> None:
        """Put the method back as it was."""
        self._active = False
        methods = vars(self._owner)
        while isinstance(top := _wrapped_by(methods.get(self._name)), Wrapped) and not top._active:
            if top._before is None:
                del methods[self._name]
            else:
                methods[self._name] = top._before


def _wrapped_by(method: Any) -> Any:
    return getattr(method, "wrapped", None)
