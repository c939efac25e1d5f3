"""experiments/index_scale: a search in parts finds what one product of all rows finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experiments.index_scale.scan import chunks_of, scan

WIDTH, ROWS, SHARDS = 60, 700, 3


@pytest.fixture(params=["int8", "float16"])
def store(request):
    """Shards as bytes by the index of their first row, their kind, and all rows in float64."""
    generator = torch.Generator().manual_seed(0)
    shards, dense = {}, []
    for number in range(SHARDS):
        count = ROWS + 13 * number
        first = sum(map(len, dense))
        rows = torch.randn(count, WIDTH, generator=generator)
        if request.param == "float16":
            raw = rows.half()
            dense.append(raw.double())
            shards[first] = raw.numpy().tobytes()
            continue
        scales = rows.abs().amax(1, keepdim=True) / 127
        small = (rows / scales).round().to(torch.int8)
        dense.append(small.double() * scales.double())
        shards[first] = torch.cat([scales.view(torch.int8), small], 1).numpy().tobytes()
    return shards, getattr(torch, request.param), torch.cat(dense)


def expected(dense, queries, k):
    """Values and indices [2, query, k] by one product."""
    scores = queries.double() @ dense.T
    both = [(sign * scores).topk(k, 1) for sign in (1, -1)]
    return [torch.stack(list(pair)) for pair in zip(*both, strict=True)]


def require_same(found, dense, queries, k):
    values, indices = expected(dense, queries, k)
    assert torch.equal(found.indices, indices)
    torch.testing.assert_close(found.values.double(), values, rtol=1e-5, atol=1e-5)


def test_one_pass_finds_the_strongest(store, tmp_path):
    shards, kind, dense = store
    (tmp_path / "rows").write_bytes(b"".join(shards.values()))
    queries = torch.randn(4, WIDTH)
    with open(tmp_path / "rows", "rb", buffering=0) as file:
        found = scan(chunks_of(file, WIDTH, kind, (0, len(dense)), 40_000), queries, 7)
    require_same(found, dense, queries, 7)
    assert found.rows == len(dense)
    with open(tmp_path / "rows", "rb") as file, pytest.raises(EOFError, match="ends at row"):
        scan(chunks_of(file, WIDTH, kind, (0, len(dense) + 1)), queries, 7)


def test_parts_in_an_object_store_are_merged(store):
    """fsspec's own store in memory stands for one over the network."""
    fsspec = pytest.importorskip("fsspec")
    from experiments.index_scale.merge import merged
    from experiments.index_scale.part import search

    shards, kind, dense = store
    name = str(kind).removeprefix("torch.")
    system = fsspec.filesystem("memory")
    for first, raw in shards.items():
        system.pipe(f"/index-{name}/{first:08}.rows", raw)
    queries = torch.randn(3, WIDTH)
    with system.open(f"/index-{name}/queries.npy", "wb") as file:
        np.save(file, queries.numpy())
    asked = {"kind": name, "k": 5, "queries": f"memory://index-{name}/queries.npy"}
    for part in ("1/2", "2/2"):
        search(f"memory://index-{name}", f"memory://found-{name}", part, **asked)
        if part == "1/2":
            with pytest.raises(ValueError, match="1 parts of 2"):
                merged(f"memory://found-{name}")
    found, seconds, size = merged(f"memory://found-{name}")
    require_same(found, dense, queries, 5)
    assert seconds > 0 and size == sum(map(len, shards.values()))
