"""The service's addresses, as a FastAPI application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from concurrent.futures import Future
from http import HTTPStatus
from typing import Any

from tda_lightning.exports.packages import needed
from tda_lightning.serve.front import PAGE, PAGE_POLICY
from tda_lightning.serve.gate import HEADERS, Application, Gate, as_json
from tda_lightning.serve.refusal import Refusal, public_message
from tda_lightning.serve.service import Service
from tda_lightning.serve.worker import Stopped

EXTRA = "serve"
_LOG = logging.getLogger("tda_lightning.serve")
# What a question can be to blame for: a class that there is not, a loss that is infinite.
_OF_THE_QUESTION = (ArithmeticError, ValueError)
# And one that brought its example: tokens out of range, sizes that do not go together.
_OF_THE_EXAMPLE = (*_OF_THE_QUESTION, IndexError, RuntimeError, TypeError)


def application(service: Service, token: str) -> Application:
    """Everything that answers a request (ASGI).

    Raises:
        ImportError: FastAPI is not installed.
    """
    fastapi = needed("fastapi", EXTRA, "tda serve")
    starlette = needed("starlette.exceptions", EXTRA, "tda serve")
    disconnected = needed("starlette.requests", EXTRA, "tda serve").ClientDisconnect
    limits = service.limits

    async def health(request: Any) -> Any:
        return answered(service.health())

    async def page(request: Any) -> Any:
        headers = {**HEADERS, "content-security-policy": PAGE_POLICY}
        return fastapi.Response(PAGE, 200, headers, "text/html; charset=utf-8")

    async def search(request: Any) -> Any:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise Refusal(415, "A search is JSON: send Content-Type: application/json.")
        deadline = asyncio.get_running_loop().time() + limits.seconds
        body = await _in_time(_body(request, limits.body_bytes), deadline, 408)
        # In a thread: a large example takes a while, and others are served in the meantime.
        question = await asyncio.to_thread(service.reader.read, body)
        blamed = _OF_THE_QUESTION if question.item is None else _OF_THE_EXAMPLE
        return answered(await _answer(service.ask(question), deadline, blamed))

    async def example(request: Any) -> Any:
        index, split = request.path_params["index"], request.query_params.get("split", "train")
        if not (index.isascii() and index.isdigit()) or len(index) > 18:
            raise Refusal(404, "Examples have numbers: /examples/3.")
        deadline = asyncio.get_running_loop().time() + limits.seconds
        whole = request.query_params.get("form", "false") == "true"
        return answered(await _answer(service.show(split, int(index), whole), deadline, ()))

    def answered(content: object, status: int = 200) -> Any:
        return fastapi.Response(as_json(content), status, HEADERS, "application/json")

    def refused(request: Any, error: Exception) -> Any:
        status, message = _told(error)  # uvicorn logs the error behind status 500
        return answered({"error": message}, status)

    app = fastapi.FastAPI(openapi_url=None, redirect_slashes=False)
    app.add_route("/", page, ["GET"])
    app.add_route("/health", health, ["GET"])
    app.add_route("/search", search, ["POST"])
    app.add_route("/examples/{index}", example, ["GET"])
    for kind in (Refusal, starlette.HTTPException, disconnected, Exception):
        app.add_exception_handler(kind, refused)
    return Gate(app, token, limits.waiting)


def _told(error: Exception) -> tuple[int, str]:
    """The status and the message that an error is answered with."""
    if isinstance(error, Refusal):
        return error.status, error.message
    if (status := getattr(error, "status_code", None)) is not None:
        there = "There are GET /, /health and /examples/N, and POST /search."
        return status, f"{HTTPStatus(status).phrase}. {there}"
    if type(error).__name__ == "ClientDisconnect":
        return 400, "The request ended early."
    return 500, "The service failed at this request. Its log says why."


async def _body(request: Any, most: int) -> bytes:
    """The body of a request, as long as it is no larger than ``most`` bytes."""
    announced = request.headers.get("content-length", "")
    too_large = Refusal(413, f"A request may have {most} bytes.")
    if announced.isdecimal() and int(announced[:18]) > most:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise too_large
    return bytes(body)


async def _in_time(work: Awaitable[Any], deadline: float, status: int) -> Any:
    left = deadline - asyncio.get_running_loop().time()
    try:
        return await asyncio.wait_for(work, max(left, 0.0))
    except asyncio.TimeoutError:
        told = {408: "The request was not sent in time.", 503: "The answer was not there in time."}
        raise Refusal(status, told[status]) from None


async def _answer(
    future: Future[dict[str, object]], deadline: float, blamed: tuple[type[Exception], ...]
) -> dict[str, object]:
    """The worker's answer; errors that a request is to blame for as refusals."""
    try:
        answer: dict[str, object] = await _in_time(asyncio.wrap_future(future), deadline, 503)
        return answer
    except Refusal:
        raise
    except Stopped:
        raise Refusal(503, "The service is stopping.") from None
    except blamed as error:
        _LOG.warning("A search failed: %s", " ".join(str(error).split()))
        message = public_message(error) or "The model cannot be asked about this query."
        raise Refusal(400, message) from error
