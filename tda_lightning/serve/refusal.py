"""A request that is not answered, and why, in words that are safe to send."""

from __future__ import annotations

import re

# An absolute path of Linux, macOS or Windows, with at least one folder in it.
_PATH = re.compile(r"(?:(?<![\w.:/])/[\w.~+-]+/|(?<!\w)[A-Za-z]:[\\/]|\\\\\w)")
_LETTERS = 600


class Refusal(Exception):
    """An answer other than 200.

    Args:
        status: of HTTP.
        message: a sentence or two: what was expected, what arrived, what to do.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def public_message(error: BaseException) -> str | None:
    """The message of an error, if it says nothing of the server's files; else None.

    Example:
        >>> public_message(ValueError("target must be 0 to 9; got 12."))
        'target must be 0 to 9; got 12.'
        >>> public_message(ValueError("Cannot read /home/me/data/file.h5")) is None
        True
    """
    text = str(error).strip()
    if not text or len(text) > _LETTERS or "Traceback" in text or _PATH.search(text):
        return None
    return text
