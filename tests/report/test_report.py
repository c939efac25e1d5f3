"""The report: complete in itself, true to the scores, and deaf to what the data tells it to do."""

import dataclasses
import hashlib
import json
import struct
import zlib
from base64 import b64decode, b64encode
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning.records.scores import Scores
from tda_lightning.records.trajectory import Facts, Steps, Trajectory
from tda_lightning.report import DatasetRenderer, Rendered, write_report
from tda_lightning.report.charts import bar_chart, line_chart, number, ticks
from tda_lightning.report.page import page_script
from tda_lightning.report.pictures import picture
from tests.quick import quick

HOSTILE = (
    "</title></style></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\ud800\0"
)
DATA = ("data:image/png;base64,", "data:audio/wav;base64,", "#")
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; checks that what opens is closed."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.attributes, self.ids, self.text = [], [], [], ""
        self.scripts, self._open = [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "script" in self._open:
            self.scripts.append(data)
        elif "style" not in self._open:
            self.text += data

    @property
    def numbers(self):
        """What the page's script works with."""
        return json.loads(self.scripts[0])

    def require_harmless(self):
        """No script but its own, no handler, nothing fetched from anywhere."""
        assert len(self.scripts) == self.elements.count("script") == 2
        assert isinstance(self.numbers, dict)
        assert self.scripts[1] == page_script()
        digest = b64encode(hashlib.sha256(page_script().encode()).digest()).decode()
        (policy,) = (value for name, value in self.attributes if "default-src" in str(value))
        assert f"script-src 'sha256-{digest}';" in policy
        banned = {"iframe", "object", "embed", "link", "base", "form", "foreignobject"}
        assert banned.isdisjoint(self.elements)
        assert all(not name.startswith("on") for name, _ in self.attributes)
        for name, value in self.attributes:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                assert value.startswith(DATA), value
        style = self.source.split("<style>")[1].split("</style>")[0]
        assert "url(" not in style
        assert "@import" not in style


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    parts = 1e-3 * torch.randn(3, 4, 30, generator=generator)
    provenance = {
        "estimator": {"name": "Source", "order": "average"},
        "segments": [[0, 10], [10, 20], [20, 30]],
        "notes": ["a note"],
        "predictions": ["seven", "eight", "nine", "ten"],
        "measurements": [0.125, 0.25, 0.5, 1.0],
    }
    return Scores(parts.sum(0), parts, torch.rand(30, generator=generator), provenance)


@pytest.fixture
def trajectory():
    count = torch.arange(30)
    steps = Steps(
        epoch=count // 10,
        learning_rate=torch.linspace(0.1, 0, 30, dtype=torch.float64)[:, None].expand(-1, 2),
        hyperparameters={},
        loss=torch.ones(30),
        gradient_norm=torch.ones(30),
        batch_offsets=torch.arange(31),
        example_offsets=torch.arange(31),
        examples=count,
        accumulation=torch.ones(30),
    )
    return Trajectory(Facts({}, "SGD", 30), steps, dict.fromkeys((0, 10, 20, 30)))


class TestPage:
    def test_shows_what_was_asked(self, scores, trajectory, tmp_path):
        train = TensorDataset(torch.rand(30, 1, 8, 8), torch.arange(30) % 10)
        query = TensorDataset(torch.rand(4, 1, 8, 8), torch.arange(4))
        path = write_report(
            scores,
            tmp_path / "new" / "report.html",
            train=DataLoader(train, batch_size=7),
            query=query,
            trajectory=trajectory,
            k=5,
            num_suspects=6,
        )
        page = Page(path)
        page.require_harmless()
        # For each query itself, its proponents and its opponents, and the suspects.
        assert page.elements.count("img") == 4 * (1 + 5 + 5) + 6
        for row in range(4):
            for indices, values in (scores.proponents(row, 5), scores.opponents(row, 5)):
                for index, value in zip(indices.tolist(), values.tolist(), strict=True):
                    assert f"#{index}" in page.text
                    assert number(value, signed=True, among=1e-3) in page.text
        for text in ("seven", "0.125", "10–20", "segment 3", "a note", "checkpoint at step 20"):
            assert text in page.text
        assert f"#{int(scores.self_influence.argmax())}" in page.text
        assert {"query-0", "query-3", "self-influence", "provenance"} <= set(page.ids)
        assert len(page.ids) == len(set(page.ids))
        assert [file.name for file in path.parent.iterdir()] == ["report.html"]

    def test_says_how_to_read_a_score(self, scores, tmp_path):
        text = " ".join(Page(write_report(scores, tmp_path / "report.html")).text.split())
        for phrase in ("if this one training example were removed", "proponent", "1/N", "weight 0"):
            assert phrase in text

    def test_scores_alone(self, tmp_path):
        page = Page(write_report(Scores(torch.tensor([[0.5, -0.25, 0.0]])), tmp_path / "r.html"))
        page.require_harmless()
        assert "img" not in page.elements
        assert "svg" not in page.elements
        assert "+0.500" in page.text
        assert "\N{MINUS SIGN}0.250" in page.text
        assert "#2" not in page.text  # neither proponent nor opponent
        assert "no record of how they were made" in page.text

    def test_a_query_without_opponents(self, tmp_path):
        page = Page(write_report(Scores(torch.ones(1, 3)), tmp_path / "report.html"))
        assert "No training example has a negative score" in page.text

    def test_part_of_the_queries(self, scores, tmp_path):
        page = Page(write_report(scores, tmp_path / "report.html", queries=[2]))
        assert "(1 shown)" in " ".join(page.text.split())
        assert "query-2" in page.ids
        assert "query-0" not in page.ids

    def test_a_part_loaded_from_a_file_keeps_its_numbers(self, scores, tmp_path):
        scores.save(tmp_path / "scores.h5")
        part = Scores.load(tmp_path / "scores.h5", queries=slice(2, 4))
        page = Page(
            write_report(part, tmp_path / "r.html", query=["a", "b", "the third", "the fourth"])
        )
        assert "Query 3" in page.text
        assert "the fourth" in page.text
        assert "ten" in page.text

    @pytest.mark.parametrize("megabytes", [1.0, 3.0])
    def test_keeps_to_its_size(self, megabytes, tmp_path):
        scores = Scores(torch.randn(8, 40), self_influence=torch.rand(40))
        noise = torch.randint(0, 256, (40, 3, 300, 200), dtype=torch.uint8)
        path = write_report(
            scores, tmp_path / "r.html", train=noise, query=noise[:8], max_megabytes=megabytes
        )
        assert megabytes / 3 < path.stat().st_size / 2**20 < megabytes
        assert Page(path).numbers["leftOut"] == (megabytes < 2)

    def test_provenance_in_no_agreed_form(self, scores, tmp_path):
        scores.provenance.update(
            segments="early, late", predictions=3, measurements=["a", None, {}, []], notes="one"
        )
        scores.provenance["query_indices"] = [7]
        page = Page(write_report(scores, tmp_path / "report.html"))
        assert "segment 1" in page.text

    def test_many_steps_are_thinned(self):
        steps = range(1, 100_001)
        rates = [0.1] * 100_000
        rates[54_321] = 0.9
        drawn = line_chart([(steps, rates)], height=200).lines[0]
        assert len(drawn) < 20_000
        assert min(float(point.split()[1]) for point in drawn[1:].split("L")) < 40


NAN = float("nan")
SOME = ["x", None, {}, 10**400]  # for make test


CERTIFICATE = {
    "bit_equal": True,
    "largest_difference": 0.0,
    "relative_difference": 0.0,
    "checkpoints": 3,
    "tolerance": 1e-3,
}


class TestTrust:
    """What the scores answer and how exactly, where they say so."""

    def text(self, scores, tmp_path, **provenance):
        scores.provenance.update(provenance)
        page = Page(write_report(scores, tmp_path / "report.html"))
        page.require_harmless()
        return " ".join(page.text.split()), page

    def test_bit_for_bit(self, scores, tmp_path):
        text, page = self.text(
            scores,
            tmp_path,
            question="what this very run did",
            checkpoints=[0, 10, 20, 30],
            certificate=CERTIFICATE,
            replayed_steps=[0, 30],
        )
        assert "What this very run did." in text
        assert "The replay lands on all 3 recorded checkpoints bit for bit." in text
        assert "Truncated" not in text
        assert {"trust", "provenance"} <= set(page.ids)

    def test_a_solver(self, scores, tmp_path):
        residual = {"max": 0.25, "median": 0.125}
        solver = {"name": "LiSSA", "tolerance": 0.1, "relative_residual": residual}
        text, _ = self.text(scores, tmp_path, solver={**solver, "reached": False})
        assert "LiSSA leaves a relative residual of at most 0.250, 0.125 for the median" in text
        assert "did not reach its tolerance" in text
        text, _ = self.text(scores, tmp_path, solver={**solver, "tolerance": 0.5, "reached": True})
        assert "(0.500 was asked for)" in text
        assert "did not reach" not in text
        for odd in (HOSTILE, {**solver, "relative_residual": HOSTILE}, {**solver, "name": [1]}):
            text, _ = self.text(scores, tmp_path, solver=odd)
            assert "Inverse curvature" not in text

    def test_a_part_of_the_run(self, scores, tmp_path):
        text, _ = self.text(
            scores,
            tmp_path,
            checkpoints=[0, 10, 20, 30],
            certificate={**CERTIFICATE, "checkpoints": 1},
            replayed_steps=[25, 30],
        )
        assert "lands on the recorded checkpoint that it passes bit for bit." in text
        assert "Only the effect of an example on the last 5 of 30 steps is counted" in text
        assert "effect on the steps up to 25 is missing" in text

    def test_near(self, scores, tmp_path):
        near = {"bit_equal": False, "largest_difference": 1.25e-7, "relative_difference": 3e-6}
        text, _ = self.text(
            scores, tmp_path, checkpoints=[0, 9, 18, 30], certificate={**CERTIFICATE, **near}
        )
        assert "lands near all 3 recorded checkpoints, but not on them bit for bit" in text
        assert "off by up to 1.25·10⁻⁷, all weights together by 3.00·10⁻⁶ of the dist" in text
        assert "(0.00100 was allowed)" in text

    def test_no_claim_that_its_own_numbers_refute(self, scores, tmp_path):
        text, _ = self.text(
            scores, tmp_path, certificate={**CERTIFICATE, "largest_difference": 0.5}
        )
        assert "lands near" in text

    def test_other_labels(self, scores, tmp_path):
        best = int(scores.proponents(0, 1)[0])
        text, _ = self.text(scores, tmp_path, relabel={str(best): 7, "29": "cat"})
        assert f"a different label, not of removal: {best} as 7, 29 as cat." in text
        assert f"#{best} with label 7" in text
        many = {str(index): 0 for index in range(30)}
        assert "11 as 0 and 18 more." in self.text(scores, tmp_path, relabel=many)[0]

    def test_edits(self, scores, tmp_path):
        best = int(scores.proponents(0, 1)[0])
        edits = [{"kind": "Removal", "index": n} for n in range(scores.num_train)]
        edits[best] = {"kind": "Relabel", "index": 1, "label": 7}
        edits[0] = {"kind": "Addition"}
        text, _ = self.text(scores, tmp_path, edits=edits)
        assert "The scores are about these edits of the training set" in text
        assert "0, addition; 1, removal of example 1; 2, removal of example 2" in text
        assert f"#{best} with label 7" in text

    @pytest.mark.parametrize(
        "odd", quick(["x", 3, None, [], {}, [1, 2, 3], ["a", "b"], 10**400, True], SOME)
    )
    def test_in_no_agreed_form(self, scores, tmp_path, odd):
        self.text(scores, tmp_path, certificate=odd, replayed_steps=odd, relabel=odd, question=odd)
        self.text(scores, tmp_path, edits=odd)
        for name in CERTIFICATE:
            found = {**CERTIFICATE, name: odd}
            self.text(scores, tmp_path, certificate=found, checkpoints=odd, replayed_steps=[odd, 5])

    def test_without(self, scores, tmp_path):
        text, page = self.text(scores, tmp_path)
        assert "trust" not in page.ids
        assert "how accurately" not in text


SPOT_CHECK = {
    "lds": 0.456,
    "over_queries": [0.3, 0.6],
    "over_subsets": [-0.125, 0.8],
    "protocol": "single_run",
    "num_subsets": 8,
    "alpha": 0.5,
    "num_seeds": 1,
    "num_queries": 4,
}
FOUND = {
    "spot_check": SPOT_CHECK,
    "pbrf": {
        "lds": 0.91,
        "over_queries": [0.8, 0.99],
        "num_subsets": 12,
        "num_queries": 4,
        "damping": 0.01,
        "slope": 1.25,
    },
    "agreement": {"source": 0.75, "tracin": -0.25},
    "damping": {"setting": "relative_damping", "value": 0.1, "0.1": 0.5, "10": 0.875},
    "seed_variance_share": 0.4,
    "command": "tda evaluate",
    "created": "2026-01-01",
}


class TestSpotCheck:
    """What retraining said of the scores, in plain words."""

    text = TestTrust.text

    def test_everything_that_is_known(self, scores, tmp_path):
        text, page = self.text(scores, tmp_path, trust=FOUND)
        assert "trust" in page.ids
        for said in (
            "rank 8 models retrained on a random 50% of the training examples (the recorded run "
            "replayed, with what is left out at weight 0) with a correlation of 0.46, averaged "
            "over 4 queries",
            "95% interval: \N{MINUS SIGN}0.12 to 0.80 over subsets, 0.30 to 0.60 over queries.",
            "These are too few retrainings to tell the scores from chance.",
            "of 12 random training examples rank their proximal Bregman responses",
            "at damping 0.0100) with a correlation of 0.91",
            "On average, a response is 1.25 times its score.",
            "With a tenth of the relative damping (0.1), the rank correlation with these scores is "
            "0.50; with ten times as much it is 0.88.",
            "with other scores: source 0.75, tracin \N{MINUS SIGN}0.25.",
            "40% of the variance between retrained models comes from their seeds",
        ):
            assert said in text, said

    def test_other_spot_checks(self, scores, tmp_path):
        sure = {**SPOT_CHECK, "over_subsets": [0.1, 0.8], "protocol": "algorithm", "num_seeds": 3}
        sure["limit_by_seeds"] = 0.789
        text, _ = self.text(scores, tmp_path, trust={"spot_check": sure})
        assert "from scratch on the smaller training set, with fresh seeds, 3 seeds each" in text
        assert "Noise between seeds allows no more than 0.79." in text
        assert "from chance" not in text
        unknown = {**SPOT_CHECK, "over_subsets": [None, None]}
        text, _ = self.text(scores, tmp_path, trust={"spot_check": unknown})
        assert "95% interval: 0.30 to 0.60 over queries." in text
        nothing = {**SPOT_CHECK, "lds": None, "reason": "undefined: all <b>constant</b>."}
        text, _ = self.text(scores, tmp_path, trust={"spot_check": nothing})
        assert "weight 0): undefined: all <b>constant</b>." in text
        singly = {**SPOT_CHECK, "alpha": 0.999}
        assert "a random 99.9% of" in self.text(scores, tmp_path, trust={"spot_check": singly})[0]

    @pytest.mark.parametrize(
        "odd", quick(["x", 3, None, [], {}, [1, 2, 3], ["a"], 10**400, True, NAN, -2.0], SOME)
    )
    def test_in_no_agreed_form(self, scores, tmp_path, odd):
        text, page = self.text(scores, tmp_path, trust=odd)
        assert "trust" not in page.ids
        for name, part in FOUND.items():
            self.text(scores, tmp_path, trust={**FOUND, name: odd})
            if isinstance(part, dict):
                for inner in part:
                    self.text(scores, tmp_path, trust={**FOUND, name: {**part, inner: odd}})
        text, _ = self.text(scores, tmp_path, trust={"damping": {**FOUND["damping"], "10": odd}})
        assert "With a tenth" not in text


class TestTokens:
    """Texts are shaded where scores tell their terms apart and the text tells its pieces."""

    def scores(self, tokens):
        tokens = torch.tensor([tokens])
        return Scores(tokens.sum(2), by_token=tokens)

    def render(self, *pieces):
        text = "".join(text for text, _ in pieces)
        return lambda split, index: Rendered(text=text, pieces=pieces)

    def page(self, scores, render, tmp_path):
        page = Page(write_report(scores, tmp_path / "report.html", render=render))
        page.require_harmless()
        spans = [value for name, value in page.attributes if name == "style"]
        return page, [
            value for value in spans if value.startswith("--share") and "70%" not in value
        ]

    def test_shares_of_the_strongest(self, tmp_path):
        scores = self.scores([[2.0, -1.0, 0.0], [0.0, 0.0, 4.0]])
        render = self.render(("It", None), (" was", 0), (" <b>", 1), (" here", 2))
        page, shares = self.page(scores, render, tmp_path)
        assert shares == ["--share: 100.0%", "--share: 100.0%", "--share: 50.0%"]
        assert "It was <b> here" in page.text  # without spaces of the template's
        titles = [value for name, value in page.attributes if name == "title"]
        assert titles == ["+4.00", "+2.00", "\N{MINUS SIGN}1.00"]
        assert "Words are shaded" in " ".join(page.text.split())

    @pytest.mark.parametrize("position", [3, -1])
    def test_pieces_that_do_not_fit(self, position, tmp_path):
        scores = self.scores([[2.0, -1.0, 0.0]])
        page, shares = self.page(scores, self.render(("a", 0), ("b", position)), tmp_path)
        assert shares == []
        assert "ab" in page.text
        assert "Words are shaded" not in page.text

    def test_without_scores_of_tokens(self, tmp_path):
        _, shares = self.page(Scores(torch.ones(1, 2)), self.render(("a", 0)), tmp_path)
        assert shares == []

    def test_long_texts_are_cut(self, tmp_path):
        scores = self.scores([[1.0, 1.0]])
        page, shares = self.page(scores, self.render(("a" * 1000, 0), ("b" * 999, 1)), tmp_path)
        assert shares == ["--share: 100.0%"]
        assert "a…" in page.text


class TestHostileText:
    """Whatever the data says stays text."""

    @pytest.mark.parametrize("form", ["text", "pieces", "row", "image", "nothing"])
    def test_stays_text(self, scores, form, tmp_path):
        content = {
            "text": {"text": HOSTILE},
            "pieces": {"text": HOSTILE, "pieces": ((HOSTILE, 0), (HOSTILE, None))},
            "row": {"row": {HOSTILE: HOSTILE, "size": 1.5}},
            "image": {"image": np.zeros((4, 4)), "text": HOSTILE},
            "nothing": {},
        }[form]
        scores.provenance.update(
            estimator={"name": HOSTILE},
            trajectory=HOSTILE,
            notes=[HOSTILE],
            predictions=[HOSTILE] * 4,
            measurements=[HOSTILE] * 4,
            versions={HOSTILE: HOSTILE},
            command=HOSTILE * 9,
            question=HOSTILE,
            certificate={**CERTIFICATE, "tolerance": HOSTILE},
            trust={
                "spot_check": {**SPOT_CHECK, "lds": None, "reason": HOSTILE},
                "agreement": {HOSTILE: 0.5},
            },
            relabel={HOSTILE: HOSTILE, str(int(scores.proponents(0, 1)[0])): HOSTILE},
        )
        tokens = scores.values[:, :, None].expand(-1, -1, 3)
        scores = dataclasses.replace(scores, by_token=tokens)
        scores.provenance[HOSTILE] = [HOSTILE]
        page = Page(
            write_report(
                scores,
                tmp_path / "report.html",
                render=lambda split, index: Rendered(HOSTILE, **content),
                title=HOSTILE,
            )
        )
        page.require_harmless()
        assert "<script>alert(1)</script>" in page.text
        assert "\0" not in page.source

    def test_class_names_and_columns(self, scores, tmp_path):
        items = TensorDataset(torch.rand(30, 2), torch.zeros(30, dtype=torch.int64))
        render = DatasetRenderer(items, items, class_names=[HOSTILE], columns=[HOSTILE, "<b>"])
        page = Page(write_report(scores, tmp_path / "report.html", render=render))
        page.require_harmless()
        assert "<b>" in page.text


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"train": list(range(29))}, ValueError, "training set has 29 .* have 30 columns"),
            ({"query": list(range(3))}, ValueError, "query set has 3 .* about query 3"),
            ({"predictions": ["a"]}, ValueError, "each of the 4 queries, got 1"),
            ({"queries": [4]}, IndexError, r"0 to 3, the rows of the scores; got \[4\]"),
            ({"k": 0}, ValueError, "must be positive, got 0, 24 and 10.0"),
            ({"render": lambda split, index: "a"}, TypeError, "must return a .*Rendered, got str"),
        ],
    )
    def test_says_what_is_wrong_and_writes_nothing(
        self, scores, tmp_path, arguments, error, message
    ):
        with pytest.raises(error, match=message):
            write_report(scores, tmp_path / "report.html", **arguments)
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_in_place_of_a_file(self, scores, tmp_path):
        with pytest.raises(IsADirectoryError, match="Give the name of the HTML file"):
            write_report(scores, tmp_path)


class TestDatasetRenderer:
    @pytest.mark.parametrize(
        ("item", "expected"),
        [
            ("a text", Rendered(text="a text")),
            ((torch.tensor([5, 6, 7]), torch.tensor([6, 7, 8])), Rendered(text="5 6 7")),
            ({"input_ids": [1, 2], "label": 1}, Rendered("label 1", text="1 2")),
            ({"text": "hello", "labels": 0}, Rendered("label 0", text="hello")),
            ((torch.tensor([0.5, 2.0]), 1.5), Rendered("target 1.5", row={"x0": 0.5, "x1": 2.0})),
            ({"age": 4, "size": 2.5}, Rendered(row={"age": 4, "size": 2.5})),
            (torch.zeros(2, 3, 4, 5), Rendered(text="array of shape [2, 3, 4, 5]")),
        ],
    )
    def test_guesses(self, item, expected):
        assert DatasetRenderer().render(item) == expected

    @pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (8, 8, 3), (8, 8)])
    def test_pictures(self, shape):
        rendered = DatasetRenderer(class_names=["cat"]).render((torch.rand(shape), 0))
        assert rendered.caption == "cat"
        assert rendered.image.shape == shape

    def test_decodes_tokens(self):
        render = DatasetRenderer(decode=lambda tokens: "".join(chr(97 + t) for t in tokens))
        assert render.render((torch.tensor([2, 0, 1]), 0)).text == "cab"


def decoded(uri: str) -> np.ndarray:
    """Pixels of an unfiltered PNG, read by hand: [height, width, channels]."""
    data, place, body = b64decode(uri.partition(",")[2]), 8, b""
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        name, content = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        check = struct.unpack(">I", data[place + 8 + length : place + 12 + length])[0]
        assert check == zlib.crc32(name + content)
        if name == b"IHDR":
            width, height, _, kind = struct.unpack(">IIBB", content[:10])
        body += content if name == b"IDAT" else b""
        place += 12 + length
    lines = np.frombuffer(zlib.decompress(body), np.uint8).reshape(height, -1)
    return lines[:, 1:].reshape(height, width, 3 if kind == 2 else 1)


class TestPictures:
    def test_bytes_are_kept(self):
        pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        uri, width, height = picture(pixels, 64)
        assert (width, height) == (7, 5)
        assert np.array_equal(decoded(uri), pixels)

    def test_floats_are_stretched(self):
        grey = decoded(picture(torch.tensor([[-1.0, 3.0], [1.0, torch.nan]]), 64)[0])
        assert grey[:, :, 0].tolist() == [[0, 255], [128, 64]]

    def test_channels_first_and_large(self):
        image = torch.zeros(3, 100, 50)
        image[0] = 1
        uri, width, height = picture(image, 20)
        assert (width, height) == (10, 20)
        assert (decoded(uri) == np.array([255, 0, 0])).all()

    def test_no_picture(self):
        with pytest.raises(ValueError, match=r"An image must have the shape .* got \[2, 2, 2, 2\]"):
            picture(np.zeros((2, 2, 2, 2)), 20)


class TestCharts:
    def test_ticks_are_round(self):
        assert ticks(-0.013, 0.02) == [-0.01, 0.0, 0.01, 0.02]
        assert ticks(1, 1) == [1]

    def test_bars_keep_their_proportions(self):
        chart = bar_chart([("proponents", "proponent", [1.0, -2.0])], ["a", "b"])
        up, down = chart.bars
        assert down.height == pytest.approx(2 * up.height)
        assert up.y + up.height == pytest.approx(chart.zero)
        assert down.y == pytest.approx(chart.zero)

    def test_bars_of_zero(self):
        assert bar_chart([("proponents", "proponent", [0.0])], ["a"]).bars[0].height == 0


def test_scores_that_change_their_sign_over_runs_are_marked(tmp_path):
    members = torch.tensor([[[3.0, 2.0, -1.0, 0.0]], [[1.0, -1.0, -1.0, -4.0]], [[2.0, 5, -1, 1]]])
    scores = Scores(members.mean(0), members=members)
    page = Page(write_report(scores, tmp_path / "ensemble.html"))
    page.require_harmless()
    assert "mean over 3 runs" in page.text
    # The legend, and examples 1 and 3: of the last, one run has no sign.
    assert page.source.count('class="unstable') == 3
    assert "±\xa02/3" in page.text and "±\xa01/3" in page.text
    for form in ({"row": {"a": 1}}, {"text": "words"}, {"image": torch.zeros(2, 2)}):
        shown = write_report(
            scores, tmp_path / "form.html", render=lambda *_, form=form: Rendered(**form)
        )
        assert Page(shown).source.count('class="unstable') == 3
    alone = Page(write_report(Scores(members.mean(0)), tmp_path / "alone.html"))
    assert 'class="unstable' not in alone.source and "over 3 runs" not in alone.text
