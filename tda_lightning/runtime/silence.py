"""Keep a LightningModule from logging while its steps run outside of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_METHODS = ("log", "log_dict")


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """Replace ``log`` and ``log_dict`` of the module and its submodules by nothing, and restore.

    A LightningModule inside another raises on ``self.log`` under ``Trainer.predict``.
    """
    loggers = [
        part
        for part in module.modules()
        if all(callable(getattr(part, name, None)) for name in _METHODS)
    ]
    kept = [{name: vars(part)[name] for name in _METHODS if name in vars(part)} for part in loggers]
    for part in loggers:
        vars(part).update(dict.fromkeys(_METHODS, _log_nothing))
    try:
        yield
    finally:
        for part, own in zip(loggers, kept, strict=True):
            for name in _METHODS:
                vars(part).pop(name, None)
            vars(part).update(own)


def _log_nothing(*args: object, **kwargs: object) -> None:
    return None
