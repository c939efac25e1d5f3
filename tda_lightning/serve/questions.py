"""What a request asks: parsed from JSON and checked field by field."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from tda_lightning.measurements import (
    Contrast,
    Logit,
    LogProbability,
    Loss,
    Margin,
    Measurement,
    Output,
    Probability,
)
from tda_lightning.runtime.digests import digest
from tda_lightning.serve.example_form import Form
from tda_lightning.serve.limits import Limits
from tda_lightning.serve.refusal import Refusal

# Those that import no function by its name.
MEASUREMENTS: dict[str, type[Measurement]] = {
    "loss": Loss,
    "probability": Probability,
    "log_probability": LogProbability,
    "margin": Margin,
    "logit": Logit,
    "contrast": Contrast,
    "output": Output,
}
_MOST_POSITIONS = 1 << 16
_REMEMBERED = 400  # letters of what was asked
_KEYS = ("query", "k", "rerank", "measurement")
K = 10  # where a request does not say


@dataclass(frozen=True)
class Question:
    """One search.

    Attributes:
        index: of the query in the query set; None: it came with the request.
        item: the query that came with the request.
        name: what the answer calls the query.
        k: proponents, and opponents, to be found.
        rerank: examples to be scored again with exact gradients.
        measurement: what is asked about; None: the task's own.
        asked: the same as canonical JSON, or the digest of a long one: questions with the same one
            can be answered together.
    """

    index: int | None
    item: Any
    name: Mapping[str, object]
    k: int
    rerank: int
    measurement: Measurement | None
    asked: str


@dataclass(frozen=True)
class QuestionReader:
    """Reads requests.

    Args:
        limits: for k, rerank.
        num_query: queries that can be asked about by their index.
        num_rows: examples that are searched.
        form: of a query that comes with the request; or why there is none.
        class_number: the number of a class or token that is named by a word.
    """

    limits: Limits
    num_query: int
    num_rows: int
    form: Form | str
    class_number: Callable[[str, str], int]

    def read(self, body: bytes) -> Question:
        """The question in a request.

        Raises:
            Refusal: it is none; says what was expected.
        """
        try:
            return self._question(parsed(body))
        except RecursionError:
            raise Refusal(400, "The request is nested too deeply.") from None

    def _question(self, given: object) -> Question:
        if not isinstance(given, dict):
            raise Refusal(400, 'The request must be an object such as {"query": {"index": 3}}.')
        if unknown := [key for key in given if key not in _KEYS]:
            raise Refusal(
                400, f"There is no setting {unknown[0]!r:.60}. There are {', '.join(_KEYS)}."
            )
        index, item, name = self._query(given.get("query"))
        k = self._whole("k", given.get("k", K), 1, self.limits.k)
        rerank = self._whole("rerank", given.get("rerank", 0), 0, self.limits.rerank)
        if 0 < rerank < k:
            raise Refusal(
                400, f"rerank must be 0, or at least k = {k} as k examples are taken of them."
            )
        measurement, asked = self._measurement(given.get("measurement"))
        k, rerank = min(k, self.num_rows), min(rerank, self.num_rows)
        return Question(index, item, name, k, rerank, measurement, asked)

    def _query(self, given: object) -> tuple[int | None, Any, dict[str, object]]:
        if not isinstance(given, dict) or len(given) != 1:
            raise Refusal(
                400,
                'query must be {"index": N}, a query of the query set, or {"example": ...}, one in '
                "the form of its items.",
            )
        if "index" in given:
            index = self._whole("query.index", given["index"], 0, self.num_query - 1)
            return index, None, {"index": index}
        if "example" not in given:
            raise Refusal(400, "query has neither index nor example.")
        if isinstance(self.form, str):
            raise Refusal(400, f'{self.form} Ask about queries by their index: {{"index": 3}}.')
        item = self.form.read(given["example"], "query.example")
        text = json.dumps(given["example"], sort_keys=True)
        return None, item, {"digest": digest(text)[:16]}

    def _measurement(self, given: object) -> tuple[Measurement | None, str]:
        if given is None:
            return None, ""
        if isinstance(given, str):
            given = {"name": given}
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            raise Refusal(
                400,
                'measurement must be a name, or a name with its settings such as {"name": '
                '"contrast", "target": 3, "foil": 5}.',
            )
        name = given["name"]
        if name not in MEASUREMENTS:
            raise Refusal(
                400, f"There is no measurement {name!r:.60}. There are {', '.join(MEASUREMENTS)}."
            )
        made = MEASUREMENTS[name]
        known = [field.name for field in fields(made) if field.name in _SETTINGS]  # type: ignore[arg-type]
        settings = {}
        for key, value in given.items():
            if key == "name" or value is None:
                continue
            if key not in known:
                raise Refusal(
                    400,
                    f"The measurement {name} has no setting {key!r:.60}. It has "
                    f"{', '.join(known)}.",
                )
            settings[key] = _SETTINGS[key](self, f"measurement.{key}", value)
        try:
            measurement = made(**settings)
        except (TypeError, ValueError) as error:
            raise Refusal(400, f"The measurement {name} cannot be made: {error}") from error
        asked = json.dumps([name, settings], sort_keys=True)
        # The worker remembers it: of thousands of positions, their digest.
        return measurement, asked if len(asked) < _REMEMBERED else digest(asked)

    def _whole(self, name: str, value: object, least: int, most: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise Refusal(
                400, f"{name} must be a whole number from {least} to {most}; got {value!r:.60}."
            )
        return value

    def _class(self, name: str, value: object) -> int:
        if isinstance(value, str):
            try:
                return self.class_number(name.removeprefix("measurement."), value[:200])
            except ValueError as error:
                raise Refusal(400, str(error)) from error
        return self._whole(name, value, 0, (1 << 31) - 1)

    def _positions(self, name: str, value: object) -> object:
        if isinstance(value, list):
            if not 1 <= len(value) <= _MOST_POSITIONS:
                raise Refusal(400, f"{name} must have 1 to {_MOST_POSITIONS} entries.")
            return [self._whole(name, one, -_MOST_POSITIONS, _MOST_POSITIONS) for one in value]
        return self._whole(name, value, -_MOST_POSITIONS, _MOST_POSITIONS)

    def _span(self, name: str, value: object) -> object:
        if not isinstance(value, list) or len(value) != 2:
            raise Refusal(400, f"{name} must be [start, stop].")
        return [self._whole(name, one, 0, _MOST_POSITIONS) for one in value]

    def _of(self, name: str, value: object) -> object:
        if value not in ("probability", "logit"):
            raise Refusal(400, f"{name} must be probability or logit; got {value!r:.60}.")
        return value

    def _index(self, name: str, value: object) -> object:
        return self._whole(name, value, 0, (1 << 31) - 1)


_SETTINGS: dict[str, Callable[[QuestionReader, str, object], object]] = {
    "target": QuestionReader._class,
    "foil": QuestionReader._class,
    "positions": QuestionReader._positions,
    "span": QuestionReader._span,
    "of": QuestionReader._of,
    "index": QuestionReader._index,
}


def parsed(body: bytes) -> object:
    """JSON as it is, without the constants that Python adds to it.

    Raises:
        Refusal: it is none.
    """
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except ValueError as error:
        raise Refusal(400, f"The request is not JSON: {error!s:.200}.") from error


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no number of JSON")
