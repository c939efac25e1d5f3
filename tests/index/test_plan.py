"""The plan of an index says what building it then takes."""

import pytest

from tda_lightning.index import AttributionIndex
from tda_lightning.index.plan import IndexPlan, plan_index
from tests.index.test_attribution_index import run_of
from tests.quick import quick


def written(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("size", "dtype"), quick([(64, "int8"), (40, "float16")], [(64, "int8")]))
def test_bytes_are_those_that_are_written(tmp_path, size, dtype):
    attribution, train_set, _ = run_of()
    options = {"bytes_per_example": size, "dtype": dtype, "batch_size": 4}
    plan = plan_index(attribution, train_set, tmp_path, read_bytes_per_second=1e9, **options)
    assert not list(tmp_path.iterdir())  # what was built for it is gone
    AttributionIndex.build(attribution, train_set, tmp_path / "index", **options)
    assert plan.disk_bytes == pytest.approx(written(tmp_path / "index"), rel=0.05)
    assert plan.examples == len(train_set)
    assert plan.example_seconds >= 0 and plan.begin_seconds > 0
    assert plan.multiply_bytes_per_second > 0


def test_the_disk_is_measured(tmp_path):
    attribution, train_set, _ = run_of()
    plan = plan_index(attribution, train_set, tmp_path, batch_size=4, examples=10**9, machines=8)
    assert plan.read_bytes_per_second > 1e6
    assert plan.disk_bytes > 10**9 * plan.row_bytes
    with pytest.raises(ValueError, match="machines must be positive"):
        plan_index(attribution, train_set, tmp_path, machines=0)


def test_what_follows_from_the_measured():
    plan = IndexPlan(
        examples=10**9,
        row_bytes=1000,
        shard_bytes=4096,
        fixed_bytes=10**6,
        shard=4096,
        begin_seconds=60.0,
        example_seconds=1e-3,
        read_bytes_per_second=2e9,
        multiply_bytes_per_second=5e9,
        machines=10,
        price_per_hour=3.6,
    )
    assert plan.disk_bytes == 10**12 + 244141 * 4096 + 10**6
    assert plan.build_seconds == 60 + 1e5
    assert plan.build_price == pytest.approx(10 * (60 + 1e5) / 1000)
    assert plan.search_seconds == pytest.approx(50.05, abs=0.01)
    assert plan.machines_for_a_second == 501
