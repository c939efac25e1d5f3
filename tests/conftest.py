"""Quiet, single-threaded tests: waking a second thread takes longer than all their work."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import logging
import os

import pytest
import torch
from hydra._internal.hydra import Hydra

from tda_lightning.runtime import seeded_generators

torch.set_num_threads(1)
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)
logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)

# Every Trainer asks which installed packages bring callbacks: 20 ms for the same answer.
# Lightning, not imported yet, takes over the function that it finds here.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)


# torch.manual_seed leaves a note for each kind of device that has not been used yet, with the stack
# of its call.
for device in (torch.cuda, torch.xpu, torch.mtia):
    if not device.is_available():
        device.manual_seed_all = lambda seed: None


# Thousands of tests and all that they import live until the end: looking through them for garbage,
# again and again, took a tenth of the time.
gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()


def fsync(file: int) -> None:
    """Check the file only: no test cuts the power, and a real fsync takes up to 10 ms."""
    os.fstat(file)  # a closed file is still an error


os.fsync = fsync


def pytest_runtest_teardown() -> None:
    """Once something draws from NumPy or Python's ``random``, their states are read and written
    around every batch until the process ends. One test that draws would make all later ones pay."""
    seeded_generators._drawn_from.clear()


# They start first: at the end they would keep one process busy while the other is idle.
LONGEST = ("test_damaged_files_give_our_error_or_valid_data", "test_no_kill_loses_anything")

# Hydra composes a configuration twice: once to see what mode it asks for, which none of ours does.
Hydra.get_mode = lambda *_, **__: None


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: getattr(item, "originalname", "") not in LONGEST)
    tables: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            tables.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for table in tables.values():
        quick = [item for item in table if item.get_closest_marker("slow") is None]
        for item in set(quick) - set(covering(quick)):
            item.add_marker(pytest.mark.slow)


def covering(table: list[pytest.Function]) -> list[pytest.Function]:
    """Few cases of a test with several parameters, such as networks times optimizers, in which
    every value of every parameter stands at least once. The other combinations are slow tests."""
    values = {item: set(enumerate(item.callspec._idlist)) for item in table}
    if not table or len(next(iter(values.values()))) < 2:
        return table
    chosen: list[pytest.Function] = []
    missing = set().union(*values.values())
    while missing:
        best = max(values, key=lambda item: len(values[item] & missing))
        chosen.append(best)
        missing -= values.pop(best)
    return chosen
