"""placeholder until the schema lands."""

from typing import Any

Provenance = dict[str, Any]
