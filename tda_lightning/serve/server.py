"""Runs the service until it is told to stop."""

from __future__ import annotations

import math
import os
import signal
import socket
import sys

from tda_lightning.exports.packages import needed
from tda_lightning.serve.application import EXTRA, application
from tda_lightning.serve.service import Service


def serve(service: Service, host: str, port: int, token: str) -> None:
    """Answer requests until SIGTERM or Ctrl-C; those that wait then get their answers, or status
    503 when their time is up.

    Args:
        port: 0 for any that is free; the address is printed.
        token: that requests must show; "" for none.

    Raises:
        ImportError: FastAPI or uvicorn is not installed.
        OSError: the address cannot be listened at.
    """
    uvicorn = needed("uvicorn", EXTRA, "tda serve")
    app = application(service, token)
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(service.limits.seconds) + 1,
    )
    listening = _listen(host, port)
    address = f"[{host}]" if ":" in host else host
    # uvicorn raises the signal that ended it once more, for whoever handled it before.
    before = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        print(
            f"Serving {service.name} at http://{address}:{listening.getsockname()[1]}"
            f"{' to those who show the token' if token else ''}. Ctrl-C stops it.",
            flush=True,
        )
        uvicorn.Server(config).run([listening])
    finally:
        listening.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    if not service.stop(service.limits.seconds):
        # Nothing is written by a search, so nothing is lost; torch would not let the process end.
        print("Stopped during a search that did not end in time.", file=sys.stderr, flush=True)
        os._exit(0)
    print("Stopped.", flush=True)


def _listen(host: str, port: int) -> socket.socket:
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(kind, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise OSError(
            f"Cannot listen at {host}:{port}: {error.strerror or error}. Choose another port with "
            "port=N, or port=0 for any that is free."
        ) from error
    return listening


def _ignore(number: int, frame: object) -> None:
    """The server has handled it."""
