"""An index with room for everything answers as ``attribute`` does; parts, appends and resumption
make the same index as one build."""

from dataclasses import replace

import h5py
import pytest
import torch
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule
from tda_lightning.estimators import FastInfluence, InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.index import AttributionIndex
from tda_lightning.measurements import Contrast
from tda_lightning.records.errors import NonFiniteError, UnsupportedTrainingError
from tests.attributing import CaseTask, quiet, relative
from tests.cases.training import CLASSIFIER, MLP, OPTIMIZERS, queries_of, train

ESTIMATORS = {
    "tracin": TracIn(),
    "influence": InfluenceFunction(),
    "influence_exact": InfluenceFunction(curvature="exact"),
    "source": Source(num_segments=2, leading_directions=0),
    "source_leading": Source(num_segments=2, leading_directions=3),
    "source_exact": Source(num_segments=2, curvature="exact"),
}
ALL = 1 << 16  # bytes: more than all coordinates take


def run_of(case=MLP, optimizer="momentum", estimator=None):
    run, module, data = train(case, OPTIMIZERS[optimizer], checkpoints=(0, 3, 6, 9))
    estimator = estimator or ESTIMATORS["source"]
    attribution = AttributionModule(module, run, estimator, CaseTask(case.kind))
    return attribution, TensorDataset(*data), TensorDataset(*queries_of(case))


def build(attribution, train_set, path, **options):
    options = {"bytes_per_example": ALL, "dtype": "float64", "shard": 4, **options}
    return AttributionIndex.build(attribution, train_set, path, batch_size=4, **options)


def everything(index, queries, **options):
    """All values, [query, example], from a search for as many as there are."""
    found = index.search(queries, index.num_examples, **options)
    values = torch.empty_like(found.values).scatter(1, found.indices, found.values)
    others = torch.empty_like(values).scatter(1, found.opponents, found.opponent_values)
    assert torch.equal(values, others)
    return values


def scores(attribution, train_set, queries, **options):
    return attribution.attribute(
        train_set, queries, batch_size=4, trainer=quiet(), self_influence=False, **options
    ).values


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_with_room_for_everything_it_is_attribute(tmp_path, name, optimizer):
    attribution, train_set, queries = run_of(optimizer=optimizer, estimator=ESTIMATORS[name])
    index = build(attribution, train_set, tmp_path / "index")
    expected = scores(attribution, train_set, queries)
    assert relative(everything(index, queries), expected) < 1e-12


def test_measurements_are_those_of_attribute(tmp_path):
    attribution, train_set, queries = run_of(CLASSIFIER)
    index = build(attribution, train_set, tmp_path / "index")
    asked = Contrast(0, 1)
    expected = scores(attribution, train_set, queries, measurement=asked)
    assert relative(everything(index, queries, measurement=asked), expected) < 1e-12


def test_reranked_values_are_exact(tmp_path):
    attribution, train_set, queries = run_of()
    index = build(attribution, train_set, tmp_path / "index", bytes_per_example=16, dtype="int8")
    expected = scores(attribution, train_set, queries)
    found = index.search(queries, 3, rerank=10)
    best = expected.topk(3, dim=1)
    assert torch.equal(found.indices, best.indices)
    assert relative(found.values, best.values) < 1e-12
    worst = (-expected).topk(3, dim=1)
    assert torch.equal(found.opponents, worst.indices)


def test_what_was_appended_is_reranked_too(tmp_path):
    """Nothing but appended examples among the best: no exact score is asked for."""
    attribution, train_set, queries = run_of()
    index = build(attribution, train_set, tmp_path / "index")
    index.append(TensorDataset(*(100 * own for own in MLP.batch(6, seed=3))))
    plain, found = index.search(queries, 1), index.search(queries, 1, rerank=1)
    assert (plain.indices >= 10).all() and (plain.opponents >= 10).all()
    assert torch.equal(found.indices, plain.indices) and torch.equal(found.values, plain.values)
    with pytest.raises(ValueError, match="from k = 3 to the number of examples, 16; got 17"):
        index.search(queries, 3, rerank=17)


def test_parts_resumption_and_merging_make_the_same_index(tmp_path):
    attribution, train_set, queries = run_of()
    options = {"bytes_per_example": 40, "dtype": "int8", "shard": 2}
    whole = build(attribution, train_set, tmp_path / "whole", **options)
    for part in ("3/3", "1/3", "2/3"):
        parts = build(attribution, train_set, tmp_path / "parts", part=part, **options)
    assert folder(tmp_path / "parts") == folder(tmp_path / "whole")
    (tmp_path / "parts" / "shards" / "000000000002-000000000004.h5").unlink()
    assert parts.missing() == [(2, 4)]
    with pytest.raises(FileNotFoundError, match="rows 2 to 3"):
        parts.search(queries, 1)
    build(attribution, train_set, tmp_path / "parts", **options)
    assert folder(tmp_path / "parts") == folder(tmp_path / "whole")
    assert torch.equal(everything(parts, queries), everything(whole, queries))


def test_an_index_that_claims_more_than_it_has_keeps_nobody_waiting(tmp_path):
    attribution, train_set, _ = run_of()
    index = build(attribution, train_set, tmp_path / "index", bytes_per_example=40, shard=2)
    replace(index.facts, num_train=10**11, shard=1).write(index.path)
    claims = AttributionIndex.open(index.path)
    assert claims.missing() == [(0, 10**11)]
    assert claims.damages() == []
    more = replace(index.facts, num_train=10**11)
    more.write(index.path)
    claims = AttributionIndex.open(index.path)
    assert claims.missing() == [(10, 10**11)]


def test_parts_in_folders_of_their_own_are_merged(tmp_path):
    attribution, train_set, queries = run_of()
    options = {"bytes_per_example": 40, "dtype": "int8", "shard": 2}
    whole = build(attribution, train_set, tmp_path / "whole", **options)
    places = [tmp_path / f"part-{number}" for number in (1, 2)]
    build(attribution, train_set, places[0], part="1/2", **options)
    build(attribution, train_set, places[1], part="2/2", like=places[0], **options)
    merged = AttributionIndex.merge(places, tmp_path / "merged")
    assert folder(merged.path) == folder(whole.path)
    bound = AttributionIndex.open(merged.path, attribution, train_set)
    assert torch.equal(everything(bound, queries), everything(whole, queries))
    AttributionIndex.merge(places, tmp_path / "merged")  # again: nothing changes
    assert folder(merged.path) == folder(whole.path)
    bound.append(TensorDataset(*MLP.batch(5, seed=3)))
    appended = folder(merged.path)
    AttributionIndex.merge(places, tmp_path / "merged")  # once more: what was appended stays
    assert folder(merged.path) == appended


def test_parts_of_other_coordinates_are_not_merged(tmp_path):
    attribution, train_set, _ = run_of()
    options = {"bytes_per_example": 16, "dtype": "int8", "shard": 2}
    build(attribution, train_set, tmp_path / "one", part="1/2", **options)
    build(attribution, train_set, tmp_path / "two", part="2/2", seed=1, **options)
    with pytest.raises(ValueError, match="not parts of one index"):
        AttributionIndex.merge([tmp_path / "one", tmp_path / "two"], tmp_path / "merged")
    with pytest.raises(ValueError, match="at least one index"):
        AttributionIndex.merge([], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    for other, error in (("one", ValueError), ("none", FileNotFoundError)):
        like = tmp_path / other
        with pytest.raises(error, match=f"like=.*{other} .*leave like away"):
            build(attribution, train_set, tmp_path / "new", seed=1, like=like, **options)
        assert not (tmp_path / "new" / "index.h5").exists()


def folder(path):
    return {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


def test_appended_examples_are_minus_their_additions(tmp_path):
    attribution, train_set, queries = run_of()
    index = build(attribution, train_set, tmp_path / "index")
    more = TensorDataset(*MLP.batch(5, seed=3))
    index.append(more)
    index.append(more)  # the same again: nothing happens
    assert index.num_examples == 15
    expected = -scores(attribution, train_set, queries, pool=more)
    found = everything(AttributionIndex.open(index.path, attribution, train_set), queries)
    assert relative(found[:, 10:], expected) < 1e-12
    assert relative(found[:, :10], scores(attribution, train_set, queries)) < 1e-12


class Noisy(TensorDataset):
    """Its examples are others at every reading."""

    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        return inputs + torch.rand(()), target


def test_examples_that_nothing_tells_apart_are_not_passed_over(tmp_path):
    attribution, train_set, _ = run_of(estimator=TracIn())
    index = build(attribution, train_set, tmp_path / "index")
    index.append(Noisy(*MLP.batch(5, seed=3)))
    with pytest.raises(ValueError, match="differ from one reading to the next"):
        index.append(Noisy(*MLP.batch(5, seed=4)))
    index.append(Noisy(*MLP.batch(6, seed=4)))
    assert index.num_examples == 21


def test_other_estimators_are_refused(tmp_path):
    for estimator in (Unrolled(), FastInfluence(), Source(order="recorded")):
        attribution, train_set, _ = run_of(estimator=estimator)
        with pytest.raises(UnsupportedTrainingError, match="An index holds"):
            build(attribution, train_set, tmp_path / "index")


def test_a_damaged_shard_is_named_and_made_again_alone(tmp_path):
    attribution, train_set, _ = run_of()
    index = build(attribution, train_set, tmp_path / "index")
    before = folder(index.path)
    victim = index.path / "shards" / "000000000004-000000000008.h5"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    (damage,) = index.damages()
    assert victim.name in damage
    others = [file for file in victim.parent.iterdir() if file != victim]
    stamps = {file: file.stat().st_mtime_ns for file in others}
    build(attribution, train_set, tmp_path / "index")
    assert folder(index.path) == before
    assert stamps == {file: file.stat().st_mtime_ns for file in others}


def test_a_damaged_shard_of_appended_examples_is_made_again(tmp_path):
    attribution, train_set, _ = run_of(estimator=TracIn())
    index = build(attribution, train_set, tmp_path / "index")
    one, other = (TensorDataset(*MLP.batch(5, seed=seed)) for seed in (3, 4))
    index.append(one)
    index.append(other)
    before = folder(index.path)
    victim = index.path / "shards" / "000000000010-000000000014.h5"
    victim.write_bytes(victim.read_bytes()[:-9])
    assert victim.name in str(index.damages())
    index.append(one)  # nothing is appended twice
    assert folder(index.path) == before
    assert index.num_examples == 20


def test_a_query_that_is_not_finite_is_refused(tmp_path):
    attribution, train_set, queries = run_of()
    index = build(attribution, train_set, tmp_path / "index")
    asked = index.encode(queries)
    asked[1, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="query 1 is NaN or infinite"):
        index.search_encoded(asked, 1)


def test_a_shard_of_an_earlier_format_is_named_and_built_again(tmp_path):
    attribution, train_set, queries = run_of()
    index = build(attribution, train_set, tmp_path / "index")
    expected = everything(index, queries)
    (path, *_) = sorted((tmp_path / "index" / "shards").iterdir())
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 2
    (damage,) = index.damages()
    assert path.name in damage and "expected version 3. Build the index again" in damage
    again = build(attribution, train_set, tmp_path / "index")
    assert not again.damages() and torch.equal(everything(again, queries), expected)
