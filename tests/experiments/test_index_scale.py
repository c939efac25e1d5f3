"""experiments/index_scale: a search in parts finds what one product of all rows finds."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tda_lightning.index.rounding import rounded
from tda_lightning.store.index_files import write_shard

fsspec = pytest.importorskip("fsspec")
from experiments.index_scale import table  # noqa: E402
from experiments.index_scale.merge import merged  # noqa: E402
from experiments.index_scale.part import chunks, rows_of, search  # noqa: E402
from experiments.index_scale.scan import scan  # noqa: E402
from experiments.marked import with_block  # noqa: E402

WIDTH, ROWS, SHARDS = 60, 700, 3


@pytest.fixture(params=["int8", "float16"])
def store(request, tmp_path):
    """The folder of an index of some shards, and all their rows in float64."""
    generator = torch.Generator().manual_seed(0)
    dense = []
    for number in range(SHARDS):
        rows = torch.randn(ROWS + 13 * number, WIDTH, generator=generator)
        codes, scales = rounded(rows, request.param)
        write_shard(tmp_path, sum(map(len, dense)), codes, scales, "")
        dense.append(torch.from_numpy(codes * scales.astype(np.float64)[:, None]))
    return tmp_path, torch.cat(dense)


def expected(dense, queries, k):
    """Values and indices [2, query, k] by one product."""
    scores = queries.double() @ dense.T
    both = [(sign * scores).topk(k, 1) for sign in (1, -1)]
    return [torch.stack(list(pair)) for pair in zip(*both, strict=True)]


def require_same(found, dense, queries, k):
    values, indices = expected(dense, queries, k)
    assert torch.equal(found.indices, indices)
    torch.testing.assert_close(found.values.double(), values, rtol=1e-5, atol=1e-5)


def test_one_pass_finds_the_strongest(store):
    folder, dense = store
    queries = torch.randn(4, WIDTH)
    found = scan(chunks(str(folder), 1, 1), queries, 7)
    require_same(found, dense, queries, 7)
    assert found.rows == len(dense)
    (shard, *_) = sorted(folder.glob("shards/*.h5"))
    with open(shard, "rb", buffering=0) as file:
        rows = rows_of(file)
        found = scan(rows.chunks(file, 40_000), queries, 7)
        require_same(found, dense[:ROWS], queries, 7)
        cut = io.BytesIO(shard.read_bytes()[: rows.offset + 9000])
        with pytest.raises(EOFError, match=f"not at {ROWS}"):
            scan(rows.chunks(cut, 40_000), queries, 7)


def test_parts_in_an_object_store_are_merged(store):
    """fsspec's own store in memory stands for one over the network."""
    folder, dense = store
    system = fsspec.filesystem("memory")
    name = folder.name
    system.put(str(folder / "shards"), f"/{name}/shards", recursive=True)
    queries = torch.randn(3, WIDTH)
    with system.open(f"/{name}/queries.npy", "wb") as file:
        np.save(file, queries.numpy())
    asked = {"k": 5, "queries": f"memory://{name}/queries.npy"}
    for part in ("1/2", "2/2"):
        search(f"memory://{name}", f"memory://{name}/found", part, **asked)
        if part == "1/2":
            with pytest.raises(ValueError, match="1 parts of 2"):
                merged(f"memory://{name}/found")
    found, seconds = merged(f"memory://{name}/found")
    require_same(found, dense, queries, 5)
    assert seconds > 0 and found.rows == len(dense)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "plugin"),
    [("joblib", "joblib"), ("submitit_local", "submitit"), ("ray", "ray")],
)
def test_hydra_s_launchers_share_a_search(launcher, plugin, store, tmp_path):
    """``part=1/2,2/2`` as two jobs. Submitit's local ones take the way of Slurm's, but for the
    queue."""
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
    if plugin == "ray":
        pytest.importorskip("ray")
    folder, dense = store
    queries = torch.randn(3, WIDTH)
    np.save(tmp_path / "queries.npy", queries.numpy())
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "experiments.index_scale.part", "--multirun", "part=1/2,2/2"]
    command += [f"hydra/launcher={launcher}", f"shards={folder}", "k=5"]
    command += [f"queries={tmp_path}/queries.npy", f"output={tmp_path}/found"]
    command += [f"hydra.sweep.dir={tmp_path}/sweep"]
    subprocess.run(command, check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    found, _ = merged(f"{tmp_path}/found")
    require_same(found, dense, queries, 5)


def test_the_readme_has_the_kept_rates():
    rows = json.loads((table.HERE / "results" / "rates.json").read_text())["rows"]
    text = (table.HERE / "README.md").read_text(encoding="utf-8")
    for name, block in (("rates", table.rates(rows)), ("machines", table.machines(rows))):
        assert with_block(text, name, block) == text
