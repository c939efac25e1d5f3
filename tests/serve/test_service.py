"""The service in a process of its own, asked by a real client."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from pathlib import Path

import pytest

from tda_lightning.serve import Limits
from tda_lightning.serve.server import serve
from tda_lightning.serve.service import Service
from tests.serve.hostile import hostile_requests, send_raw
from tests.serve.serving import NUM_QUERY, Known, class_number, data, known, reader, running

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

HERE = str(Path(__file__).parents[2]).encode()  # no answer names a folder of the server
TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def address():
    with running(known(limits=Limits(body_bytes=20_000, seconds=5))) as service:
        yield service.url
        status, _, errors = service.end(signal.SIGTERM)
        assert status == 0
        assert "Traceback" not in errors


@pytest.fixture
def client(address):
    with httpx.Client(base_url=address, timeout=20) as client:
        yield client


def expected(request):
    """The proponents and opponents of a request, without any service."""
    question = reader().read(httpx.Request("POST", "http://a", json=request).content)
    found = Known().found(question, question.k)
    return {
        name: [{"index": index, "score": score} for index, score in listed]
        for name, listed in (("proponents", found.proponents), ("opponents", found.opponents))
    }


def test_a_search_is_the_index_s_own(client):
    asked = {"query": {"index": 3}, "k": 4, "measurement": {"name": "margin", "target": "class 2"}}
    answer = client.post("/search", json=asked).json()
    assert answer["query"] == {"index": 3}
    assert answer["measurement"] == "the log-odds of class 2"
    assert {name: answer[name] for name in ("proponents", "opponents")} == expected(asked)


def test_an_example_of_ones_own(client):
    shown = client.get("/examples/5?split=query&form=true").json()
    asked = {"query": {"example": shown["example"]}, "k": 4}
    answer = client.post("/search", json=asked).json()
    own = client.post("/search", json={"query": {"index": 5}, "k": 4}).json()
    assert answer["proponents"] == own["proponents"]
    assert set(answer["query"]) == {"digest"}
    shown["example"][0][0][0][0] += 1
    other = client.post("/search", json={"query": {"example": shown["example"]}}).json()
    assert other["query"] != answer["query"] and other["proponents"] != answer["proponents"]


def test_examples_and_health(client):
    shown = client.get("/examples/7").json()
    assert (shown["split"], shown["index"], shown["caption"]) == ("train", 7, "class 7")
    assert shown["image"].startswith("data:image/png;base64,")
    health = client.get("/health").json()
    assert (health["train"], health["queries"]) == (200, 80)
    assert "contrast" in health["measurements"] and "function" not in health["measurements"]


def test_the_page_loads_nothing_and_runs_its_own_script_alone(client):
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    assert "src=" not in page.text and "http" not in page.text.replace("http-equiv", "")


STATUS = [
    ("GET", "/nothing", {}, 404),
    ("GET", "/examples/200", {}, 404),
    ("GET", "/examples/3?split=../../etc", {}, 400),
    ("GET", "/examples/..%2f..%2fetc%2fpasswd", {}, 404),
    ("GET", "/examples/%00", {}, 404),
    ("GET", "/examples/" + "9" * 5000, {}, 404),
    ("GET", "/search", {}, 405),
    ("DELETE", "/", {}, 405),
    ("POST", "/search", {"content": b"{}"}, 415),
    ("POST", "/search", {"json": {"query": {"index": 3}, "text": "x" * 30_000}}, 413),
    ("POST", "/search", {"json": {"query": {"example": [[[[9e6] * 4] * 4], 1]}}}, 400),
    ("POST", "/search", {"json": {"query": {"example": [[[[0.0] * 4] * 4], 12]}}}, 400),
    ("GET", "/health", {"headers": {"host": "evil.example"}}, 403),
]


@pytest.mark.parametrize(("method", "path", "more", "status"), STATUS)
def test_errors_are_sentences(client, method, path, more, status):
    answer = client.request(method, path, **more)
    assert answer.status_code == status
    message = answer.json()["error"]
    assert message.endswith(".") and "/home" not in message and "Traceback" not in message


def test_a_body_without_an_announced_length_is_limited_too(client):
    parts = (b"x" * 1000 for _ in range(1000))
    headers = {"content-type": "application/json"}
    # The service may close the connection before all was sent.
    with contextlib.suppress(httpx.WriteError):
        assert client.post("/search", content=parts, headers=headers).status_code == 413


def test_no_answer_of_50_clients_is_lost_or_mixed_up():
    asked = [
        {"query": {"index": number % NUM_QUERY}, "k": 1 + number % 7, "measurement": measurement}
        for number, measurement in enumerate([None, "loss", {"name": "margin", "target": 3}] * 50)
    ]

    async def ask(client, request):
        return (await client.post("/search", json=request)).json()

    async def ask_all(url):
        async with httpx.AsyncClient(
            base_url=url, timeout=30, limits=httpx.Limits(max_connections=50)
        ) as client:
            return await asyncio.gather(*(ask(client, request) for request in asked))

    with running(known(seconds=0.02)) as service:
        answers = asyncio.run(ask_all(service.url))
        searches = httpx.get(f"{service.url}/health").json()["searches"]
    for request, answer in zip(asked, answers, strict=True):
        assert answer["query"] == request["query"], answer
        assert {name: answer[name] for name in ("proponents", "opponents")} == expected(request)
    assert searches < len(asked)  # those that waited were answered together


def test_hostile_requests_are_refused(address, client):
    statuses = [send_raw(address, *request) for request in hostile_requests(random.Random(0), 300)]
    assert all(400 <= status < 500 for status, _ in statuses), statuses
    assert not any(b"Traceback" in body or HERE in body for _, body in statuses)
    assert client.post("/search", json={"query": {"index": 3}}).status_code == 200


@pytest.mark.slow
def test_ten_thousand_hostile_requests(address, client):
    for seed in range(20):
        for request in hostile_requests(random.Random(1000 + seed), 500):
            status, body = send_raw(address, *request)
            assert 400 <= status < 500, (seed, request, body)
            assert b"Traceback" not in body and HERE not in body
    assert client.post("/search", json={"query": {"index": 3}}).status_code == 200


def test_time_room_and_a_graceful_stop():
    """Of a service whose searches take long."""
    run = known(seconds=0.6, limits=Limits(seconds=1.2, waiting=3, batch=1))
    searches = [{"query": {"index": number}} for number in range(5)]

    @contextlib.asynccontextmanager
    async def connected(url):
        """A client whose connections are open, so that requests arrive together."""
        async with httpx.AsyncClient(base_url=url, timeout=20) as client:
            await asyncio.gather(*(client.get("/health") for _ in searches))
            yield client

    async def ask(client, request):
        answer = await client.post("/search", json=request)
        return answer.status_code, answer.json()

    async def crowd(url):
        async with connected(url) as client:
            return await asyncio.gather(*(ask(client, request) for request in searches))

    async def alone(url):
        async with connected(url) as client:
            return await ask(client, searches[4])

    async def until_the_end(service):
        async with connected(service.url) as client:
            asked = [asyncio.create_task(ask(client, request)) for request in searches[:2]]
            await asyncio.sleep(0.3)
            ended = asyncio.to_thread(service.end, signal.SIGTERM)
            return await asyncio.gather(ended, *asked)

    with running(run) as service:
        answers = asyncio.run(crowd(service.url))
        statuses = sorted(status for status, _ in answers)
        assert statuses.count(429) >= 1  # three are inside at one time
        assert statuses.count(503) >= 1  # the third would have taken 1.8 s
        assert statuses.count(200) >= 1
        time.sleep(0.7)
        status, answer = asyncio.run(alone(service.url))  # the worker is well
        assert status == 200 and answer["query"] == {"index": 4}
        unsent = {"Content-Type": "application/json", "Content-Length": "99"}
        status, body = send_raw(service.url, "POST", "/search", unsent, b'{"query"')
        assert status == 408 and b"not sent in time" in body
        (status, output, errors), *ended = asyncio.run(until_the_end(service))
    assert ended[0][0] == 200
    assert {status for status, _ in ended} <= {200, 503}
    assert status == 0 and output.endswith("Stopped.\n")
    assert "Traceback" not in errors


class Broken(Known):
    """Fails at every query of its own accord."""

    def search(self, questions, k):
        raise KeyError("/secret/path")


def test_a_fault_of_the_service_is_told_to_its_log_alone():
    def run():
        service = Service("broken", data(), Broken(), {}, Limits(), class_number)
        serve(service, "127.0.0.1", 0, "")

    with running(run) as service:
        answer = httpx.post(f"{service.url}/search", json={"query": {"index": 3}})
        assert answer.status_code == 500
        assert answer.json() == {"error": "The service failed at this request. Its log says why."}
        assert httpx.get(f"{service.url}/examples/3").status_code == 200  # it goes on
        status, _, errors = service.end(signal.SIGTERM)
    assert status == 0 and "KeyError: '/secret/path'" in errors


def test_a_token_is_demanded_and_never_told():
    with running(known(token=TOKEN)) as service:
        url = service.url
        assert httpx.get(url).status_code == 200  # the page, which asks for the token
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}):
            for path in ("/health", "/examples/3", "/nothing"):
                answer = httpx.get(url + path, headers=headers)
                assert answer.status_code == 401 and TOKEN not in answer.text
        right = {"authorization": f"Bearer {TOKEN}"}
        assert httpx.get(f"{url}/health", headers=right).status_code == 200
        # Who knows the token may come by any name.
        assert httpx.get(f"{url}/health", headers={**right, "host": "a.com"}).status_code == 200
        status, output, errors = service.end(signal.SIGINT)
    assert status == 0 and TOKEN not in output + errors
