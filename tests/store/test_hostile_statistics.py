"""Files of statistics that no recorder wrote, and those that one did, as they are inspected."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from rich.console import Console

from tda_lightning.cli.inspect_table import description_table
from tda_lightning.records.errors import TrajectoryFormatError
from tda_lightning.store import layout, open_trajectory
from tda_lightning.store.inspect import describe
from tests.runs import fit

pytestmark = pytest.mark.filterwarnings("ignore")
ONLINE = {"every_n_steps": 4, "curvature": "online", "curvature_every": 2}
BLOCK = "net.0"  # [1, 5, 4]: five outputs, three inputs and a bias


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recorded") / "run"
    fit(root, recorder=ONLINE)
    return root


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "copy"))


def put(root: Path, name: str, values: Any, **options: Any) -> None:
    """Replace a dataset of block BLOCK in the first file; None removes it."""
    with h5py.File(layout.statistics_file(root, 0, 4), "r+") as file:
        group = file[BLOCK]
        attributes = dict(group[name].attrs) if name in group else dict(group["count"].attrs)
        if name in group:
            del group[name]
        if values is not None:
            group.create_dataset(name, data=values, **options)
            group[name].attrs.update(attributes)


def put_blocks(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    with h5py.File(layout.statistics_file(root, 0, 4), "r+") as file:
        blocks = json.loads(file[layout.BLOCKS][0])
        changed = change(blocks)
        text = json.dumps(blocks if changed is None else changed).encode()
        del file[layout.BLOCKS]
        file[layout.BLOCKS] = np.array([text])


def require_refused(root: Path, message: str) -> None:
    statistics = open_trajectory(root).statistics
    with pytest.raises(TrajectoryFormatError, match=message):
        statistics[0, 4]
    assert statistics[4, 8]
    assert any(BLOCK in p or "0000000-0000" in p or "damaged" in p for p in describe(root).problems)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: [], "blocks are no JSON object"),
        (lambda b: b.update(x=3), "TypeError"),
        (lambda b: b.update({BLOCK: []}), "block 'net.0' has"),
        (lambda b: b[BLOCK].pop("shape") and None, "block 'net.0' has"),
        (lambda b: b[BLOCK].update(more=1), "block 'net.0' has"),
        (lambda b: b[BLOCK].update(parameters="net.0.weight"), "block 'net.0' is of"),
        (lambda b: b[BLOCK].update(parameters=[]), "block 'net.0' is of"),
        (lambda b: b[BLOCK].update(parameters=[None]), "block 'net.0' is of"),
        (lambda b: b[BLOCK].update(parameters=["net.4.weight"]), "is in two blocks"),
        (lambda b: b[BLOCK].update(shape=[1, 5]), "has shape"),
        (lambda b: b[BLOCK].update(shape=["1", 5, 4]), "has shape"),
        (lambda b: b[BLOCK].update(shape=[True, 5, 4]), "has shape"),
        (lambda b: b[BLOCK].update(shape=[1, 5, 4.0]), "has shape"),
        (lambda b: b[BLOCK].update(shape=[0, 5, 4]), "has shape"),
        (lambda b: b[BLOCK].update(shape=[1, 2**60, 2**60]), "has shape"),
        (lambda b: b[BLOCK].update(shape=[1, 2**40, 4]), "the triangle of a matrix has shape"),
        (lambda b: b.update({"../../x": {**b.pop(BLOCK)}}), "has no '..%2F..%2Fx'"),
        (lambda b: b.update({"": b.pop(BLOCK)}), "cannot have a member ''"),
        (lambda b: b.update({"a\0b": b.pop(BLOCK)}), "damaged"),
    ],
)
def test_impossible_blocks(change: Callable[[Any], Any], message: str, copy: Path) -> None:
    put_blocks(copy, change)
    require_refused(copy, message)


SMALL = np.float32


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("packed left", np.zeros((1, 14), SMALL), "triangle of a matrix has shape"),
        ("packed left", np.zeros((1, 16), SMALL), "triangle of a matrix has shape"),
        ("packed left", np.zeros((2, 15), SMALL), "triangle of a matrix has shape"),
        ("packed left", np.zeros(15, SMALL), "triangle of a matrix has shape"),
        ("packed left", np.full((1, 15), np.nan, SMALL), "not all finite"),
        ("packed left", np.full((1, 15), np.inf, SMALL), "not all finite"),
        ("packed left", np.full((1, 15), -1, SMALL), "has negative numbers"),
        ("packed left", np.zeros((1, 15), np.float64), "dtype"),
        ("packed left", None, "KeyError: 'left'"),
        ("left", np.zeros((1, 5, 5), SMALL), "two kinds of side left"),
        ("else", np.zeros(1, SMALL), "a block of .*'else'"),
        ("count", np.zeros((1, 1), SMALL), "count has shape"),
        ("count", -np.ones(1, SMALL), "count is a sum of squares"),
        ("trace", np.zeros(2, SMALL), "trace has shape"),
        ("examples", np.zeros(0, SMALL), "examples has shape"),
        ("examples", None, "a block of"),
    ],
)
def test_impossible_sums(name: str, values: Any, message: str, copy: Path) -> None:
    put(copy, name, values)
    require_refused(copy, message)


@pytest.mark.parametrize("shape", [(1, 5, 5), (1, 5, 1), (1, 4), (1, 5, 6), (5,), (1, 5, 2, 1)])
def test_impossible_sides(shape: tuple[int, ...], copy: Path) -> None:
    put(copy, "packed left", None)
    put(copy, "left", np.zeros(shape, SMALL))
    require_refused(copy, "side left has shape")


def test_a_huge_triangle_makes_no_room(copy: Path) -> None:
    """A few bytes that claim to be a matrix of terabytes, in every way that HDF5 has."""
    width = 1 << 20
    count = width * (width + 1) // 2
    for groups, options in (
        (1, {"chunks": (1, 1 << 20)}),
        (1, {"chunks": (1, 1 << 20), "compression": "gzip"}),
        (0, {"chunks": (1, 1 << 20), "maxshape": (None, count)}),
    ):
        put_blocks(copy, lambda b: b[BLOCK].update(shape=[1, width, 4]) and None)
        put(copy, "packed left", None)
        with h5py.File(layout.statistics_file(copy, 0, 4), "r+") as file:
            made = file[BLOCK].create_dataset("packed left", (groups, count), "f4", **options)
            made.attrs["dtype"] = np.bytes_(b"float32")
        start = time.monotonic()
        require_refused(copy, "claims|compressed|triangle")
        assert time.monotonic() - start < 2


def test_compressed_sums_are_not_ours(copy: Path) -> None:
    put(copy, "packed left", np.ones((1, 15), SMALL), compression="gzip", chunks=(1, 15))
    require_refused(copy, "'packed left' in /net.0 is compressed")


@pytest.mark.parametrize("name", ["00000002-00000006", "00000000-00000008", "00000008-00000008"])
def test_overlapping_intervals_are_refused(name: str, copy: Path) -> None:
    file = layout.statistics_file(copy, 0, 4)
    shutil.copy(file, file.with_name(f"{name}.h5"))
    with pytest.raises(TrajectoryFormatError, match=r"expected steps after \d"):
        open_trajectory(copy).merged_statistics(0, 8)
    assert any("expected steps after" in problem for problem in describe(copy).problems)


def test_blocks_that_do_not_add_up_are_refused(copy: Path) -> None:
    put(copy, "packed left", None)
    put(copy, "left", np.ones((1, 5), SMALL))
    trajectory = open_trajectory(copy)
    assert trajectory.statistics[0, 4][BLOCK].left.shape == (1, 5)
    with pytest.raises(TrajectoryFormatError, match="different blocks"):
        trajectory.merged_statistics(0, 8)


# Inspection


def shown(path: Path) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(description_table(describe(path)))
    return console.export_text()


def test_statistics_are_listed(recorded: Path) -> None:
    found = describe(recorded)
    assert not found.problems
    assert list(found.statistics) == [(0, 4), (4, 8), (8, 12)]
    # 22 examples in batches of 4: steps 2, 4, then 6 with the last two, 8; 10 and 12.
    for (start, stop), examples in zip(found.statistics, (8, 6, 6), strict=True):
        entry = found.statistics[start, stop]
        assert entry.name == f"{examples} examples, 3 blocks"
        assert entry.size == layout.statistics_file(recorded, start, stop).stat().st_size
    rows = {" ".join(line.replace("│", " ").split()) for line in shown(recorded).splitlines()}
    assert "curvature online, every 2 steps, true Fisher" in rows
    assert any(row.startswith("statistics 4-8 6 examples, 3 blocks ") for row in rows)


def test_damaged_and_missing_statistics_are_problems(copy: Path) -> None:
    file = layout.statistics_file(copy, 4, 8)
    file.write_bytes(file.read_bytes()[:-100])
    found = describe(copy)
    assert [entry.name.split()[-1] for entry in found.statistics.values()] == [
        "blocks",
        "damaged",
        "blocks",
    ]
    assert len(found.problems) == 1 and str(file) in found.problems[0]
    file.unlink()
    (problem,) = describe(copy).problems
    assert "expected statistics up to each checkpoint, got none up to [8]" in problem
    assert torch.is_tensor(open_trajectory(copy).statistics[0, 4][BLOCK].left)
