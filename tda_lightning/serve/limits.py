"""What a service does for one request at most, and for all of them together."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """Limits of a service.

    Attributes:
        body_bytes: size of a request.
        k: proponents, and opponents, that a request may ask for.
        rerank: examples that a request may have scored again with exact gradients.
        seconds: for one request, waiting included; it is then answered with status 503.
        waiting: requests that are being received or answered at one time; others get status 429.
        batch: queries that are searched for together.

    Raises:
        ValueError: one is not positive.
    """

    body_bytes: int = 8 << 20
    k: int = 1000
    rerank: int = 10_000
    seconds: float = 30.0
    waiting: int = 256
    batch: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            least, value = int(field.name != "rerank"), getattr(self, field.name)
            if field.name == "seconds":
                if not isinstance(value, int | float) or not 0 < value < float("inf"):
                    raise ValueError(f"limits.seconds must be positive, got {value!r}.")
            elif not isinstance(value, int) or value < least:
                raise ValueError(
                    f"limits.{field.name} must be a whole number of at least {least}, got "
                    f"{value!r}."
                )
