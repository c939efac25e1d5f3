"""Requests that nobody means well: mutated JSON, wrong types, damaged HTTP, paths that climb."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

_STRANGE: list[Any] = [
    *(
        None,
        True,
        -1,
        0.5,
        1e308,
        -1e308,
        2**63,
        -(2**70),
        10**300,
        "",
        "\x00",
        "\ud800",
        "../..",
        [],
    ),
    *({}, [[]], [[[]]], {"index": 3}, "Infinity", "__import__('os').system('id')", "A" * 9000),
    *(
        [0] * 3000,
        [[1.0] * 4] * 4,
        {"__class__": "x"},
        {"_target_": "os.system"},
        "file:///etc/passwd",
    ),
]
_EXAMPLE = [[[[0.5] * 4] * 4], 3]
_PATHS = [
    *("/../../etc/passwd", "/examples/../../../etc/shadow", "/examples/%2e%2e%2f%2e%2e", "/.env"),
    *("//etc/passwd", "/examples/-1", "/examples/1e3", "/examples/0x10", "/examples/\u0663", "/%"),
    *("/examples/3/../4", "/static/x", "/examples/99999999999999999999", "/examples/3?split=%00"),
    *("/examples/3?split=train'--", "/search/", "/docs", "/openapi.json", "/redoc", "/examples/"),
    *("/health/../x", "/%zz", "/x?/../"),
]


def _whole(example: Any) -> dict[str, Any]:
    return {
        "query": {"example": copy.deepcopy(example)},
        "k": 3,
        "rerank": 0,
        "measurement": {"name": "contrast", "target": 1, "foil": 2, "of": "logit", "span": [0, 1]},
    }


def _damaged(chance: random.Random, example: Any) -> Any:
    """The whole request with one to three of its parts replaced, renamed or removed."""
    request = _whole(example)
    for _ in range(chance.randint(1, 3)):
        holder: Any = request
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = chance.choice(keys)
            inner = holder[key]
            if isinstance(inner, dict | list) and inner and chance.random() < 0.7:
                holder = inner
                continue
            change = chance.random()
            if change < 0.7:
                holder[key] = copy.deepcopy(chance.choice(_STRANGE))
            elif change < 0.85 and isinstance(holder, dict):
                holder[chance.choice(["", "x", "__class__", "path", "outputs"])] = holder.pop(key)
            else:
                del holder[key]
            break
    # Some damage is none: such as foil left as it is. A key that nobody knows is always refused.
    request[chance.choice(["\u0000", "path", "eval", "config", "trust_config"])] = 1
    if chance.random() < 0.5:
        request.pop("k", None)
    return request


def _bytes(chance: random.Random, example: Any) -> bytes:
    """A body that is no JSON of ours: bits turned, cut, nested, endless numbers."""
    body = bytearray(json.dumps(_damaged(chance, example)).encode())
    kind = chance.randrange(6)
    if kind == 0:
        for _ in range(chance.randint(1, 20)):
            body[chance.randrange(len(body))] = chance.randrange(256)
    elif kind == 1:
        del body[chance.randrange(len(body)) :]
    elif kind == 2:
        body = bytearray(chance.choice([b"[", b'{"query":', b'["']) * chance.randint(100, 1500))
    elif kind == 3:
        body = bytearray(b'{"query": {"index": ' + b"9" * chance.randint(30, 9000) + b"}}")
    elif kind == 4:
        body = bytearray(chance.randbytes(chance.randint(0, 3000)))
    else:
        body = bytearray(
            b'{"query": {"index": 3}, "k": '
            + chance.choice([b"NaN", b"-Infinity", b"1e400"])
            + b"}"
        )
    return bytes(body)


def hostile_requests(
    chance: random.Random, count: int, example: Any = _EXAMPLE
) -> Iterator[tuple[str, str, dict[str, str], bytes]]:
    """(method, path, headers, body) of requests that deserve an answer of 400 to 499.

    Args:
        example: that the service would take.
    """
    own = {"Content-Type": "application/json"}
    for _ in range(count):
        kind = chance.randrange(10)
        if kind < 4:
            yield "POST", "/search", own, json.dumps(_damaged(chance, example)).encode()
        elif kind < 7:
            yield "POST", "/search", own, _bytes(chance, example)
        elif kind < 8:
            yield "GET", chance.choice(_PATHS), {}, b""
        elif kind < 9:
            method = chance.choice(["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW", "get"])
            yield method, chance.choice(["/search", "/health", "/examples/3"]), own, b""
        else:
            yield "POST", "/search", _headers(chance), json.dumps(_whole(example)).encode()


def _headers(chance: random.Random) -> dict[str, str]:
    """Headers that make a good request a bad one."""
    good = {"Content-Type": "application/json"}
    bad = [
        {"Content-Type": "application/x-python-pickle"},
        {"Content-Type": ""},
        {**good, "Host": chance.choice(["evil.example", "127.0.0.1.evil", "", "\xff", "[::1"])},
        {**good, "Content-Length": chance.choice(["-1", "abc", "9" * 30, "1e3", "5, 6"])},
        {**good, "Transfer-Encoding": chance.choice(["gzip", "chunked, chunked", "x"])},
        {**good, "X" * 10: "y" * 100_000},
        {**good, "Content-Length": "99999999"},
    ]
    return chance.choice(bad)


def send_raw(
    address: str, method: str, path: str, headers: dict[str, str], body: bytes
) -> tuple[int, bytes]:
    """Send a request as it is, without what a client would correct; the status and the answer."""
    to = urlsplit(address)
    lines = [f"{method} {path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in {"Host": to.netloc, **headers}.items()]
    if not {"Content-Length", "Transfer-Encoding"} & headers.keys():
        lines.append(f"Content-Length: {len(body)}")
    lines.append("Connection: close")
    text = "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body
    with socket.create_connection((to.hostname, to.port), timeout=20) as connection:
        with contextlib.suppress(OSError):  # refused before all was sent
            connection.sendall(text)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 16):
                answer += part
    status = answer.split(b" ", 2)[1:2]
    assert status and status[0].isdigit(), (method, path, headers, body[:200], answer[:200])
    return int(status[0]), answer
