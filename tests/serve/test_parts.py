"""The parts of the service that need no server: forms, questions, tokens, the worker."""

from __future__ import annotations

import json
import math
import threading
import time
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tda_lightning.records.rendered import Rendered
from tda_lightning.serve import Limits
from tda_lightning.serve.access import host_is_local, read_token, token_is_right
from tda_lightning.serve.example_form import form_of, form_of_dataset
from tda_lightning.serve.looks import Looks
from tda_lightning.serve.questions import QuestionReader
from tda_lightning.serve.refusal import Refusal, public_message
from tda_lightning.serve.worker import Stopped, Worker
from tests.serve.serving import class_number, data


class Pair(NamedTuple):
    one: torch.Tensor
    other: int


@dataclass
class Record:
    x: np.ndarray
    label: str


ITEMS = [
    (torch.rand(3, 4), torch.tensor(2)),
    {"input_ids": torch.arange(5), "text": "a", "mask": torch.ones(5, dtype=torch.bool)},
    Pair(torch.rand(2, dtype=torch.float64), 3),
    Record(np.arange(3, dtype=np.int16), "x"),
    ([1.5, 0.1], 1, None, True, 0.1),
    "only a text",
    (np.float32(0.5), np.int64(3)),
]


def same(one, other):
    """Whether two items are equal, types included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, Record):
        return same(vars(one), vars(other))
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: type(item).__name__)
def test_an_item_comes_back_as_it_was(item):
    form = form_of([item, item], "an example")
    read = form.read(json.loads(json.dumps(form.write(item))), "example")
    assert same(read, item), read


REFUSED = [
    ([[[1.0] * 4] * 3], "list"),
    ([[[1.0] * 4] * 2, 2], "shape"),
    ([[[1.0] * 4, [1.0] * 3, [1.0] * 4], 2], "shape"),
    ([[["1"] * 4] * 3, 2], "shape"),
    ([[[True] * 4] * 3, 2], "shape"),
    ([[[1e39] * 4] * 3, 2], "too large for float32"),
    ([[[10**400] * 4] * 3, 2], "shape"),
    ([[[1.0] * 4] * 3, 2.5], "int64"),
    ([[[1.0] * 4] * 3, 2**63], "int64"),
    ([[[1.0] * 4] * 3, [2]], "int64"),
    ([[[1.0] * 4] * 3, 2, 3], "list"),
    ([[], 2], "shape"),
    ({"0": 1}, "list"),
    (None, "list"),
]


@pytest.mark.parametrize(("given", "words"), REFUSED)
def test_another_form_is_refused_in_words(given, words):
    with pytest.raises(Refusal, match=words) as refusal:
        form_of([ITEMS[0]], "an example").read(given, "query.example")
    assert refusal.value.status == 400
    assert refusal.value.message.startswith("query.example")


def test_lengths_that_differ_are_free_up_to_four_times_the_longest():
    form = form_of([(torch.arange(length),) for length in (3, 5)], "an example")
    assert form.words == "a list [numbers (int64) in lists of the shape [1 to 20]]"
    assert form.read([[1, 2, 3, 4]], "example")[0].tolist() == [1, 2, 3, 4]
    assert len(form.read([[1] * 20], "example")[0]) == 20
    for wrong in ([], [1] * 21):
        with pytest.raises(Refusal, match="1 to 20"):
            form.read([wrong], "example")
    words = form_of(["a", "b" * 300], "an example")
    assert words.read("c" * 1200, "example") == "c" * 1200
    with pytest.raises(Refusal, match="at most 1200 letters; got a text of 1201 letters"):
        words.read("c" * 1201, "example")


@pytest.mark.parametrize(
    "items",
    [
        [(torch.zeros(2),), (torch.zeros(2, 2),)],
        [(torch.zeros(2),), torch.zeros(2)],
        [{"a": 1}, {"b": 1}],
        [(object(),)],
        [(torch.zeros(2, dtype=torch.complex64),)],
        [(np.array(["a", "b"]),)],
        [(np.array([object()]),)],
        [(10**70,)],
        [MappingProxyType({"x": torch.zeros(2)})],
    ],
)
def test_items_without_a_form_are_refused(items):
    with pytest.raises(ValueError, match="an example"):
        form_of(items, "an example")


def reader(**limits):
    own = data().query_dataset
    return QuestionReader(Limits(**limits), len(own), 200, form_of_dataset(own), class_number)


def read(request, **limits):
    return reader(**limits).read(json.dumps(request).encode())


def test_a_question():
    question = read(
        {
            "query": {"index": 3},
            "k": 5,
            "rerank": 20,
            "measurement": {"name": "contrast", "target": "class 7", "foil": 2, "of": "logit"},
        }
    )
    assert (question.index, question.k, question.rerank) == (3, 5, 20)
    assert (question.measurement.target, question.measurement.foil) == (7, 2)
    assert question.measurement.of == "logit"
    plain = read({"query": {"index": 3}})
    assert (plain.measurement, plain.asked, plain.k, plain.rerank) == (None, "", 10, 0)
    assert read({"query": {"index": 3}, "k": 900}).k == 200  # there are no more


def test_long_questions_are_told_apart_by_digests():
    def asked(last):
        positions = [*range(20_000), last]
        return read({**INDEX, "measurement": {"name": "loss", "positions": positions}}).asked

    assert asked(3) == asked(3) != asked(4)
    assert len(asked(3)) < 100


def test_looks_are_remembered_up_to_their_size(monkeypatch):
    monkeypatch.setattr("tda_lightning.serve.looks._LETTERS", 1000)
    rendered = []

    def render(split, index):
        rendered.append(index)
        return Rendered(text="x" * 90)

    looks = Looks(render)
    for index in range(30):
        looks.of("train", index)
    looks.of("train", 29)  # is still known
    assert len(rendered) == 30
    assert sum(len(str(look["text"])) for look in looks._known.values()) <= 1000
    looks.of("train", 0)
    assert rendered[30:] == [0]


INDEX = {"query": {"index": 3}}
BAD = [
    ([], "object"),
    ({}, "query must be"),
    ({"query": 3}, "query must be"),
    ({"query": {"index": 3, "example": 1}}, "query must be"),
    ({"query": {"path": "/etc/passwd"}}, "neither index nor example"),
    ({"query": {"index": -1}}, "0 to 79"),
    ({"query": {"index": 80}}, "0 to 79"),
    ({"query": {"index": True}}, "whole number"),
    ({"query": {"index": 1.0}}, "whole number"),
    ({**INDEX, "k": 0}, "k must be"),
    ({**INDEX, "k": 1001}, "from 1 to 1000"),
    ({**INDEX, "rerank": 10**9}, "from 0 to 10000"),
    ({**INDEX, "k": 10, "rerank": 5}, "at least k"),
    ({**INDEX, "trust_config": True}, "no setting 'trust_config'"),
    ({**INDEX, "measurement": "function"}, "no measurement 'function'"),
    ({**INDEX, "measurement": 3}, "must be a name"),
    ({**INDEX, "measurement": {"name": "loss", "outputs": "os.system"}}, "no setting 'outputs'"),
    ({**INDEX, "measurement": {"name": "loss", "_target_": "os.system"}}, "no setting '_target_'"),
    ({**INDEX, "measurement": {"name": "loss", "foil": 3}}, "no setting 'foil'"),
    ({**INDEX, "measurement": {"name": "loss", "target": [1]}}, "whole number"),
    ({**INDEX, "measurement": {"name": "loss", "target": "cat"}}, "not among the 10 words"),
    ({**INDEX, "measurement": {"name": "loss", "span": [0, 10**12]}}, "whole number"),
    ({**INDEX, "measurement": {"name": "loss", "span": [5, 5]}}, "cannot be made"),
    ({**INDEX, "measurement": {"name": "loss", "positions": [[1]]}}, "whole number"),
    ({**INDEX, "measurement": {"name": "loss", "span": [0, 1], "positions": 1}}, "not both"),
    ({**INDEX, "measurement": {"name": "contrast"}}, "foil"),
    ({**INDEX, "measurement": {"name": "contrast", "foil": 1, "of": "x"}}, "probability or logit"),
]


@pytest.mark.parametrize(("given", "words"), BAD)
def test_other_questions_are_refused_in_words(given, words):
    with pytest.raises(Refusal, match=words):
        read(given)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b'{"query": NaN}', b"[" * 100_000, b'{"query":' * 5000, b"1" * 5000],
)
def test_what_is_no_json_is_refused(body):
    with pytest.raises(Refusal):
        reader().read(body)


def test_limits_are_positive():
    for name in ("body_bytes", "k", "seconds", "waiting", "batch"):
        for wrong in (0, "many", None):
            with pytest.raises(ValueError, match=f"limits.{name} must be"):
                Limits(**{name: wrong})
    with pytest.raises(ValueError, match="seconds"):
        Limits(seconds=math.inf)


def test_another_host_needs_a_token(tmp_path):
    assert read_token("127.0.0.1", None, {}) == ""
    with pytest.raises(ValueError, match="TDA_SERVE_TOKEN") as error:
        read_token("0.0.0.0", None, {})
    assert "token_file=FILE" in str(error.value)
    secret = "s" * 20
    assert read_token("0.0.0.0", None, {"TDA_SERVE_TOKEN": f" {secret}\n"}) == secret
    (tmp_path / "token").write_text(f"{secret}\n")
    assert read_token("::", str(tmp_path / "token"), {}) == secret
    (tmp_path / "empty").write_text("\n")
    for environment in ({"TDA_SERVE_TOKEN": "short"}, {"TDA_SERVE_TOKEN": "ä" * 20}):
        with pytest.raises(ValueError, match="characters|ASCII") as error:
            read_token("127.0.0.1", None, environment)
        assert environment["TDA_SERVE_TOKEN"] not in str(error.value)
    with pytest.raises(ValueError, match="0 characters"):
        read_token("127.0.0.1", str(tmp_path / "empty"), {})


def test_the_token_is_compared_whole():
    token = "t" * 16
    assert token_is_right(b"Bearer " + token.encode(), token)
    for wrong in (b"", token.encode(), b"Bearer t", b"Basic " + token.encode(), b"Bearer \xff"):
        assert not token_is_right(wrong, token)


def test_names_of_this_machine():
    assert all(map(host_is_local, (b"localhost", b"127.0.0.1:80", b"[::1]:80", b"LOCALHOST:1")))
    wrong = (
        b"",
        b"[::1",
        b"localhost.evil.com",
        b"evil.com:80",
        b"[::1.evil",
        b"127.0.0.1.evil",
        b"\xff",
    )
    assert not any(map(host_is_local, wrong))


def test_messages_with_paths_are_not_sent():
    for text in ("see /home/a/b.py", r"C:\data\x", r"at \\share\x", 'File "/usr/lib/x.py"', ""):
        assert public_message(ValueError(text)) is None, text
    for text in ("1/2 of them", "https://example.com/a/b", "positions or/and span"):
        assert public_message(ValueError(text)) == text


def test_waiting_jobs_are_answered_together():
    sizes, gate = [], threading.Event()

    def answer(jobs):
        gate.wait(5)
        sizes.append(len(jobs))
        return [job * 2 for job in jobs]

    worker = Worker(answer, lambda job: job % 2, most=4, seconds=10)
    first = worker.submit(0)
    time.sleep(0.05)  # it is being answered
    futures = [worker.submit(job) for job in range(1, 13)]
    assert futures[4].cancel()  # job 5: nobody waits for it any more
    gate.set()
    assert [first.result(5)] == [0]
    assert [one.result(5) for one in futures if not one.cancelled()] == [
        2 * job for job in range(1, 13) if job != 5
    ]
    assert sizes == [1, 4, 4, 2, 1]  # 0; 1 3 7 9; 2 4 6 8; 10 12; 11
    assert worker.stop(5)


def test_one_bad_job_does_not_harm_others():
    def answer(jobs):
        if 3 in jobs:
            raise ValueError("three")
        return list(jobs)

    worker = Worker(answer, lambda job: 0, most=8, seconds=10)
    futures = [worker.submit(job) for job in range(6)]
    with pytest.raises(ValueError, match="three"):
        futures[3].result(5)
    assert [one.result(5) for job, one in enumerate(futures) if job != 3] == [0, 1, 2, 4, 5]
    assert worker.stop(5)


def test_batches_shrink_to_the_time_they_may_take():
    sizes = []

    def answer(jobs):
        sizes.append(len(jobs))
        time.sleep(0.02 * len(jobs))
        return list(jobs)

    worker = Worker(answer, lambda job: 0, most=50, seconds=0.11)
    assert [one.result(9) for one in [worker.submit(job) for job in range(20)]] == list(range(20))
    assert sizes[0] in (1, 8) and max(sizes[2:]) <= 5
    assert worker.stop(5)


def test_those_who_wait_are_told_that_it_stops():
    gate = threading.Event()
    worker = Worker(lambda jobs: [gate.wait(5) for _ in jobs], lambda job: 0, 1, seconds=10)
    first, second = worker.submit(1), worker.submit(2)
    time.sleep(0.05)
    assert not worker.stop(0.05)  # the first still runs
    with pytest.raises(Stopped):
        second.result(1)
    gate.set()
    assert first.result(5)
    with pytest.raises(Stopped):
        worker.submit(3).result(1)
    assert worker.stop(5)


def test_what_cannot_be_opened_is_told():
    def around(work):
        raise OSError("no index")

    worker = Worker(list, lambda job: 0, 1, 10, around)
    with pytest.raises(OSError, match="no index"):
        worker.wait_until_open()
