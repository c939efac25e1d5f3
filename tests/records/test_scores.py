"""Scores: asked, grouped, streamed, saved, loaded, and refused when damaged."""

import json

import h5py
import numpy as np
import pytest
import torch

from tda_lightning.records.errors import NonFiniteError, TrajectoryFormatError
from tda_lightning.records.score_sinks import MemorySink
from tda_lightning.records.scores import Scores
from tda_lightning.store.scores_file import ScoreFile


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(3, 4, 9, generator=generator)
    provenance = {"estimator": "Source", "segments": [[0, 3], [3, 6], [6, 9]], "notes": ["ä <b>"]}
    own, tokens = torch.rand(9, generator=generator), torch.randn(4, 9, 5, generator=generator)
    return Scores(parts.sum(0), parts, own, provenance, tokens)


@pytest.fixture
def partial():
    """Scores of three candidates of five examples for each of two queries."""
    values = torch.tensor([[2.0, torch.nan, -1.0, 2.0, torch.nan], [torch.nan] * 2 + [3.0, 0, -4]])
    return Scores(values, candidates=torch.tensor([[3, 0, 2], [4, 2, 3]]))


def equal(first: Scores, second: Scores) -> bool:
    pairs = (
        (first.values, second.values),
        (first.by_segment, second.by_segment),
        (first.self_influence, second.self_influence),
        (first.by_token, second.by_token),
        (first.candidates, second.candidates),
    )
    return first.provenance == second.provenance and all(
        (a is None and b is None)
        or (a.dtype == b.dtype and torch.allclose(a, b, 0, 0, equal_nan=True))
        for a, b in pairs
    )


class TestAsking:
    def test_proponents_are_the_largest_scores(self):
        scores = Scores(torch.tensor([[0.5, -2.0, 3.0, 0.0]]))
        indices, values = scores.proponents(query=0, k=2)
        assert indices.tolist() == [2, 0]
        assert values.tolist() == [3.0, 0.5]

    def test_opponents_are_the_smallest_scores(self):
        scores = Scores(torch.tensor([[0.5, -2.0, 3.0, 0.0]]))
        indices, values = scores.opponents(query=0, k=2)
        assert indices.tolist() == [1, 3]
        assert values.tolist() == [-2.0, 0.0]

    def test_ties_keep_the_order_of_the_training_set(self):
        scores = Scores(torch.zeros(1, 5))
        assert scores.proponents(0, 3)[0].tolist() == [0, 1, 2]
        assert scores.opponents(0, 3)[0].tolist() == [0, 1, 2]

    def test_k_larger_than_the_training_set(self, scores):
        with pytest.raises(ValueError, match=r"k must be between 1 and .* 9; got 10"):
            scores.proponents(0)

    @pytest.mark.parametrize("query", [4, -1])
    def test_no_such_query(self, scores, query):
        with pytest.raises(IndexError, match=f"Query {query} does not exist.* 4 queries"):
            scores.opponents(query, 2)

    def test_examples_without_a_score_are_in_no_ranking(self, partial):
        assert partial.num_scored == 3
        indices, values = partial.proponents(0, 3)
        assert indices.tolist() == [0, 3, 2]  # of equal scores the lower index first
        assert values.tolist() == [2.0, 2.0, -1.0]
        assert partial.opponents(1, 3)[0].tolist() == [4, 3, 2]
        for ask in (partial.proponents, partial.opponents):
            with pytest.raises(ValueError, match="candidates of a query, 3; got 4. The other"):
                ask(0, 4)

    def test_groups_of_examples_without_a_score(self, partial):
        with pytest.raises(ValueError, match="Only 3 of 5 training examples were scored"):
            partial.by_group("ababa")

    def test_groups_sum_columns(self, scores):
        labels, values = scores.by_group(torch.tensor([1, 0, 1, 2, 2, 0, 0, 1, 1]))
        assert labels == [0, 1, 2]
        torch.testing.assert_close(values[:, 2], scores.values[:, [3, 4]].sum(1))
        torch.testing.assert_close(values.sum(1), scores.values.sum(1))

    def test_groups_of_mixed_labels_keep_their_order(self):
        labels, values = Scores(torch.ones(1, 3)).by_group([("a", 1), None, ("a", 1)])
        assert labels == [("a", 1), None]
        assert values.tolist() == [[2.0, 1.0]]

    def test_groups_of_the_wrong_length(self, scores):
        with pytest.raises(ValueError, match="each of the 9 training examples, got 2"):
            scores.by_group(["a", "b"])


class TestChecks:
    def test_nan_names_query_and_example(self):
        values = torch.zeros(3, 5)
        values[1, 4] = torch.nan
        with pytest.raises(NonFiniteError, match="query 1 for training example 4 is nan"):
            Scores(values)

    def test_large_scores_whose_sum_overflows_are_finite(self):
        assert Scores(torch.full((1, 4), 3e38)).num_train == 4

    def test_self_influence_nan_names_the_example(self):
        with pytest.raises(NonFiniteError, match="self-influence of training example 1 is inf"):
            Scores(torch.zeros(1, 2), self_influence=torch.tensor([0.0, torch.inf]))

    def test_nan_of_a_token_names_it(self):
        tokens = torch.zeros(2, 3, 4)
        tokens[1, 2, 3] = torch.nan
        message = "query 1 for position 3 of training example 2 is nan"
        with pytest.raises(NonFiniteError, match=message):
            Scores(torch.zeros(2, 3), by_token=tokens)
        with pytest.raises(NonFiniteError, match=message):
            MemorySink(2, 3).set_by_token(tokens)

    @pytest.mark.parametrize(
        ("candidates", "message"),
        [
            ([[3, 0, 1], [4, 2, 3]], "query 0 for training example 1 is nan"),
            ([[3, 0], [4, 2]], "NaN where an example is no candidate, got other scores of query 0"),
            ([[3, 0, 2], [4, 2, 5]], "lie in 0 to 4, got 0 to 5"),
            ([[3, 0, 2], [4, 2, -1]], "lie in 0 to 4, got -1 to 4"),
            ([[3, 0, 0], [4, 2, 3]], "must be different"),
            ([[3, 0, 2]], r"int64 \[2, k\], got torch.int64 of shape \[1, 3\]"),
            ([[3.0, 0, 2], [4, 2, 3]], "got torch.float32"),
        ],
    )
    def test_candidates_are_the_examples_with_a_score(self, partial, candidates, message):
        with pytest.raises((NonFiniteError, ValueError), match=message):
            Scores(partial.values, candidates=torch.tensor(candidates))

    def test_a_score_that_is_infinite_is_none_of_a_candidate(self, partial):
        partial.values[0, 1] = torch.inf
        with pytest.raises(ValueError, match="NaN where an example is no candidate"):
            Scores(partial.values, candidates=partial.candidates)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"values": torch.zeros(3)}, r"\[query, train\]"),
            ({"values": torch.zeros(2, 3, dtype=torch.int64)}, "floating-point"),
            ({"values": torch.zeros(2, 3), "by_segment": torch.zeros(2, 3)}, "by_segment"),
            ({"values": torch.zeros(2, 3), "by_segment": torch.zeros(0, 2, 3)}, "at least"),
            ({"values": torch.zeros(2, 3), "self_influence": torch.zeros(2)}, "3 training"),
            ({"values": torch.zeros(2, 3), "by_token": torch.zeros(2, 3)}, r"\[2, 3, position\]"),
            ({"values": torch.zeros(2, 3), "by_token": torch.zeros(2, 4, 5)}, "by_token"),
            ({"values": torch.zeros(2, 3), "by_token": torch.zeros(3, 3, 5)}, "by_token"),
        ],
    )
    def test_shapes(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Scores(**arguments)


SINKS = [
    pytest.param(lambda path, *sizes, **options: MemorySink(*sizes, **options), id="memory"),
    pytest.param(ScoreFile, id="file"),
]


@pytest.mark.parametrize("make", SINKS)
class TestSinks:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_blocks_add_up(self, make, dtype, tmp_path):
        expected = torch.zeros(2, 3, 8, dtype=dtype)
        sink = make(tmp_path / "scores.h5", 3, 8, 2, dtype=dtype)
        for segment, columns in ((0, [0, 1, 2]), (1, [7, 2, 5]), (0, [2, 4, 2]), (1, [0])):
            block = torch.randn(3, len(columns), dtype=dtype)
            sink.add(segment, torch.tensor(columns), block)
            for place, column in enumerate(columns):
                expected[segment, :, column] += block[:, place]
        sink.add(0, torch.empty(0, dtype=torch.int64), torch.empty(3, 0, dtype=dtype))
        sink.set_self_influence(torch.arange(8.0))
        tokens = torch.randn(2, 3, 8).movedim(0, 2)  # in any layout
        sink.set_by_token(tokens)
        scores = sink.finish({"estimator": "TracIn"})
        torch.testing.assert_close(scores.by_segment, expected)
        assert torch.equal(scores.values, scores.by_segment.sum(0))
        assert scores.values.dtype == dtype
        assert scores.self_influence.tolist() == list(range(8))
        assert torch.equal(scores.by_token, tokens.to(dtype))
        assert scores.provenance == {"estimator": "TracIn"}

    def test_without_segments(self, make, tmp_path):
        sink = make(tmp_path / "scores.h5", 1, 3)
        sink.add(None, torch.tensor([2, 0]), torch.tensor([[1.0, 2.0]]))
        scores = sink.finish({})
        assert scores.values.tolist() == [[2.0, 0.0, 1.0]]
        assert scores.by_segment is None
        assert scores.self_influence is None
        assert scores.by_token is None

    def test_what_is_added_to_no_candidate_is_forgotten(self, make, tmp_path, partial):
        sink = make(tmp_path / "scores.h5", 2, 5)
        sink.set_candidates(partial.candidates)
        everything = torch.tensor([[2.0, 9, -1, 2, 9], [9, 9, 3, 0, -4]])
        sink.add(None, torch.tensor([4, 2]), everything[:, [4, 2]])
        sink.add(None, torch.tensor([0, 1, 3]), everything[:1, [0, 1, 3]])
        sink.add(None, torch.tensor([0, 1, 3]), everything[1:, [0, 1, 3]], first_query=1)
        assert equal(sink.finish({}), partial)

    def test_candidates_that_are_none(self, make, tmp_path):
        sink = make(tmp_path / "scores.h5", 2, 5)
        with pytest.raises(ValueError, match="must be different"):
            sink.set_candidates(torch.tensor([[1, 1], [0, 1]]))
        with pytest.raises(ValueError, match="have no segments"):
            make(tmp_path / "other.h5", 2, 5, 3).set_candidates(torch.tensor([[1], [0]]))

    @pytest.mark.parametrize(
        ("segment", "columns", "shape", "error", "message"),
        [
            (None, [0], (2, 1), ValueError, "by segment, got segment=None"),
            (3, [0], (2, 1), IndexError, "Segment 3 does not exist"),
            (0, [0, 1], (2, 1), ValueError, r"up to 2 queries, 2 training"),
            (0, [0, 4], (2, 2), ValueError, "0 to 3, got 0 to 4"),
        ],
    )
    def test_wrong_blocks(self, make, tmp_path, segment, columns, shape, error, message):
        sink = make(tmp_path / "scores.h5", 2, 4, 3)
        with pytest.raises(error, match=message):
            sink.add(segment, torch.tensor(columns), torch.zeros(shape))

    @pytest.mark.parametrize("shape", [(2, 4), (2, 5, 3), (1, 4, 3)])
    def test_wrong_scores_of_tokens(self, make, tmp_path, shape):
        sink = make(tmp_path / "scores.h5", 2, 4)
        with pytest.raises(ValueError, match=r"by_token must have the shape \[2, 4, position\]"):
            sink.set_by_token(torch.zeros(shape))

    def test_nan_names_query_and_example(self, make, tmp_path):
        sink = make(tmp_path / "scores.h5", 2, 9)
        block = torch.tensor([[0.0, 0.0], [0.0, torch.inf]])
        with pytest.raises(NonFiniteError, match="query 1 for training example 6 is inf"):
            sink.add(None, torch.tensor([8, 6]), block)


class TestFile:
    def test_round_trip(self, scores, tmp_path):
        scores.save(tmp_path / "new" / "scores.h5")
        assert equal(Scores.load(tmp_path / "new" / "scores.h5"), scores)
        assert equal(Scores.load(tmp_path / "new" / "scores.h5", mapped=True), scores)
        assert [file.name for file in (tmp_path / "new").iterdir()] == ["scores.h5"]

    @pytest.mark.parametrize("mapped", [False, True])
    def test_round_trip_of_candidates(self, partial, tmp_path, mapped):
        path = tmp_path / "scores.h5"
        partial.save(path)
        assert equal(Scores.load(path, mapped=mapped), partial)
        part = Scores.load(path, queries=slice(1, 2), mapped=mapped)
        assert part.candidates.tolist() == [[4, 2, 3]]
        assert part.proponents(0, 1)[0].tolist() == [2]
        with h5py.File(path) as file:
            assert file["candidates"][...].tolist() == partial.candidates.tolist()
            assert file.attrs["format_version"] == 2  # earlier releases know no missing scores

    def test_round_trip_of_plain_float64(self, tmp_path):
        scores = Scores(torch.randn(2, 5, dtype=torch.float64))
        scores.save(tmp_path / "scores.h5")
        assert equal(Scores.load(tmp_path / "scores.h5"), scores)

    def test_an_empty_query_set(self, tmp_path):
        scores = Scores(torch.zeros(0, 5), by_token=torch.zeros(0, 5, 3))
        scores.save(tmp_path / "scores.h5")
        assert equal(Scores.load(tmp_path / "scores.h5"), scores)
        assert equal(Scores.load(tmp_path / "scores.h5", mapped=True), scores)

    @pytest.mark.parametrize("mapped", [False, True])
    def test_a_part_of_the_queries(self, scores, tmp_path, mapped):
        scores.provenance["predictions"] = ["a", "b", "c", "d"]
        scores.save(tmp_path / "scores.h5")
        part = Scores.load(tmp_path / "scores.h5", queries=slice(1, 3), mapped=mapped)
        assert torch.equal(part.values, scores.values[1:3])
        assert torch.equal(part.by_segment, scores.by_segment[:, 1:3])
        assert torch.equal(part.by_token, scores.by_token[1:3])
        assert part.provenance["query_indices"] == [1, 2]
        assert part.provenance["predictions"] == ["b", "c"]
        with pytest.raises(ValueError, match="positive step"):
            Scores.load(tmp_path / "scores.h5", queries=slice(None, None, -1))

    def test_readable_with_h5py_alone(self, scores, tmp_path):
        scores.save(tmp_path / "scores.h5")
        with h5py.File(tmp_path / "scores.h5") as file:
            assert np.array_equal(file["values"][...], scores.values.numpy())
            assert np.array_equal(file["by_segment"][...], scores.by_segment.numpy())
            assert np.array_equal(file["by_token"][...], scores.by_token.numpy())
            assert json.loads(file["provenance"][()]) == scores.provenance
            assert file.attrs["format_version"] == 1

    def test_never_overwritten_unasked(self, scores, tmp_path):
        path = tmp_path / "scores.h5"
        path.write_text("mine")
        with pytest.raises(FileExistsError, match=r"scores\.h5 exists and is kept.*overwrite=True"):
            scores.save(path)
        assert path.read_text() == "mine"
        assert list(tmp_path.iterdir()) == [path]
        scores.save(path, overwrite=True)
        assert equal(Scores.load(path), scores)

    def test_changing_mapped_scores_leaves_the_file(self, scores, tmp_path):
        scores.save(tmp_path / "scores.h5")
        Scores.load(tmp_path / "scores.h5", mapped=True).values.zero_()
        assert equal(Scores.load(tmp_path / "scores.h5"), scores)

    def test_an_unfinished_file_leaves_nothing(self, tmp_path):
        with ScoreFile(tmp_path / "scores.h5", 2, 3) as file:
            file.add(None, torch.tensor([0]), torch.ones(2, 1))
        assert list(tmp_path.iterdir()) == []

    def test_provenance_must_be_json(self, tmp_path):
        scores = Scores(torch.zeros(1, 2), provenance={"model": torch.zeros(1)})
        with pytest.raises(TypeError, match="provenance must hold only what JSON can hold"):
            scores.save(tmp_path / "scores.h5")
        assert list(tmp_path.iterdir()) == []


class TestBadFiles:
    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no scores file at .*none\.h5"):
            Scores.load(tmp_path / "none.h5")

    def test_a_folder(self, tmp_path):
        with pytest.raises(TrajectoryFormatError, match="is a folder, expected a file"):
            Scores.load(tmp_path)

    def test_not_hdf5(self, tmp_path):
        (tmp_path / "scores.h5").write_bytes(b"something else")
        with pytest.raises(TrajectoryFormatError, match=r"scores\.h5 is damaged"):
            Scores.load(tmp_path / "scores.h5")

    def test_another_hdf5_file(self, tmp_path):
        with h5py.File(tmp_path / "other.h5", "w") as file:
            file["values"] = np.zeros((2, 2))
        with pytest.raises(TrajectoryFormatError, match=r"other\.h5 is not a scores file"):
            Scores.load(tmp_path / "other.h5")

    def test_a_newer_version(self, scores, tmp_path):
        scores.save(tmp_path / "scores.h5")
        with h5py.File(tmp_path / "scores.h5", "r+") as file:
            file.attrs["format_version"] = 3
        with pytest.raises(TrajectoryFormatError, match="version 3, .* to version 2. Upgrade"):
            Scores.load(tmp_path / "scores.h5")

    @pytest.mark.parametrize("mapped", [False, True])
    @pytest.mark.parametrize("kept", [0.1, 0.5, 0.95])
    def test_truncated(self, scores, tmp_path, kept, mapped):
        path = tmp_path / "scores.h5"
        scores.save(path)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(kept * len(whole))])
        with pytest.raises(TrajectoryFormatError, match=r"scores\.h5 is damaged"):
            Scores.load(path, mapped=mapped)

    def test_any_damaged_byte_is_noticed_or_harmless(self, scores, tmp_path):
        path = tmp_path / "scores.h5"
        scores.save(path)
        whole = path.read_bytes()
        noticed = 0
        for place in range(0, len(whole), 23):
            damaged = bytearray(whole)
            damaged[place] ^= 0xFF
            path.write_bytes(damaged)
            try:
                assert equal(Scores.load(path), scores)  # an unused byte
            except TrajectoryFormatError as error:
                assert "scores.h5" in str(error)
                noticed += 1
        assert noticed > 20

    def test_a_flipped_candidate_is_noticed(self, partial, tmp_path):
        path = tmp_path / "scores.h5"
        partial.save(path)
        with h5py.File(path, "r+") as file:
            file["candidates"][0, :2] = [0, 3]  # in the other order
        with pytest.raises(TrajectoryFormatError, match="'candidates' does not match its checksum"):
            Scores.load(path)

    @pytest.mark.parametrize("name", ["by_segment", "by_token"])
    def test_a_flipped_score_is_noticed(self, scores, tmp_path, name):
        path = tmp_path / "scores.h5"
        scores.save(path)
        with h5py.File(path, "r+") as file:
            file[name][1, 2, 3] += 1
        with pytest.raises(TrajectoryFormatError, match=f"'{name}' does not match its checksum"):
            Scores.load(path)
