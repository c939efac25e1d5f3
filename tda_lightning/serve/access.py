"""Who may ask: this machine alone, or those who know a token."""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path

TOKEN_VARIABLE = "TDA_SERVE_TOKEN"
_SHORTEST = 16  # characters: of random letters and digits, 95 bits


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone.

    Example:
        >>> [is_loopback(host) for host in ("localhost", "127.0.0.1", "::1", "0.0.0.0")]
        [True, True, True, False]
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(host: str, file: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """The token that requests must show, from a file or from ``TDA_SERVE_TOKEN``; "" for none.

    Raises:
        ValueError: there is none and the address is not a loopback one; it is too short; it has
            characters that a header cannot hold.
        OSError: the file cannot be read.
    """
    if file is not None:
        token = Path(file).read_text(encoding="utf-8").strip()
    else:
        token = environment.get(TOKEN_VARIABLE, "").strip()
    if not token and file is None:
        if is_loopback(host):
            return ""
        raise ValueError(
            f"host={host} can be reached from other machines, so requests must show a token. Put "
            f"one into the environment variable {TOKEN_VARIABLE} or into a file, token_file=FILE; "
            "python -c 'import secrets; print(secrets.token_urlsafe())' makes one. Or leave host "
            "at 127.0.0.1."
        )
    if len(token) < _SHORTEST:
        raise ValueError(
            f"The token has {len(token)} characters, which could be guessed. Give one of "
            f"{_SHORTEST} or more; python -c 'import secrets; print(secrets.token_urlsafe())' "
            "makes one."
        )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("The token must consist of ASCII letters, digits and marks, no spaces.")
    return token


def token_is_right(given: bytes, token: str) -> bool:
    """Whether the header ``Authorization`` shows the token; takes as long where it does not."""
    kind, _, shown = given.strip().partition(b" ")
    right = hmac.compare_digest(shown.strip(), token.encode("ascii"))
    return right and kind.lower() == b"bearer"


def host_is_local(given: bytes) -> bool:
    """Whether the header ``Host`` names this machine.

    A page from elsewhere whose name was made to point to 127.0.0.1 shows its own name here (DNS
    rebinding), so a service without a token answers only to these.

    Example:
        >>> host_is_local(b"localhost:8000"), host_is_local(b"[::1]:8000"), host_is_local(b"a.com")
        (True, True, False)
    """
    text = given.decode("latin-1").strip().lower()
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::\d*)?", text)
    return found is not None and is_loopback(found[1] or found[2])
