"""``measurement=`` of the commands: what is asked about the queries, words made into numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from tda_lightning.cli.command import not_null
from tda_lightning.measurements import Measurement
from tda_lightning.measurements.words import class_number
from tda_lightning.records.data_module import AttributedData
from tda_lightning.records.provenance import well_formed
from tda_lightning.records.scores import Scores


def measurement_of(node: DictConfig | None, data: AttributedData) -> Measurement | None:
    """The measurement that a command asks for; None: the task's own.

    Args:
        node: of the group ``measurement``.
        data: whose vocabulary, classes and texts words are looked up in.

    Raises:
        ValueError: a setting is missing, or a word is nowhere to be found.
    """
    if node is None:
        return None
    missing = [str(name) for name in node if OmegaConf.is_missing(node, str(name))]
    if missing:
        raise ValueError(f"This measurement needs measurement.{missing[0]}=..., got none.")
    settings: Any = OmegaConf.to_container(node, resolve=True)
    for name in ("target", "foil"):
        if settings.get(name) is not None:
            settings[name] = _tokens(name, settings[name], data)
    if (text := settings.pop("text", None)) is not None:
        if settings.get("positions") is not None or settings.get("span") is not None:
            raise ValueError("Give one of measurement.text, .positions and .span.")
        settings["positions"] = text_positions(str(text), data)
    return instantiate(settings, _convert_="all")  # type: ignore[no-any-return]


def ask_about_scored_queries(config: DictConfig, scores: Scores) -> None:
    """Take the data settings of the attribution, where the command gives no others: the queries
    are those that were scored, perhaps fewer or others than were recorded."""
    asked = well_formed(scores.provenance).get("config", {}).get("data", {})
    config.data = {**config.data, **not_null(asked), **not_null(config.data)}


def require_harmless(node: Mapping[str, Any], trust: bool) -> None:
    """Refuse a measurement from a file of scores that would run code from elsewhere.

    Raises:
        ValueError: it would, without ``trust``.
    """
    target = str(node.get("_target_", ""))
    ours = target.startswith("tda_lightning.measurements.") and target.count(".") == 2
    if trust or (ours and node.get("function") is None and node.get("outputs") is None):
        return
    raise ValueError(
        f"The scores were asked by {target}, which runs code from outside this library. If you "
        "know where they come from, give measurement=... as in tda attribute, or trust_config=true."
    )


def _tokens(name: str, given: Any, data: AttributedData) -> Any:
    """Numbers of classes or tokens, of which some may be words."""
    if isinstance(given, Sequence) and not isinstance(given, str):
        return [_tokens(name, one, data) for one in given]
    return class_number(name, given, data) if isinstance(given, str) else given


def text_positions(text: str, data: AttributedData) -> list[list[int]]:
    """Of each query, the positions of the tokens that first spell ``text``.

    Raises:
        ValueError: a query does not hold it, or its texts are not known by token.
    """
    wanted = text.split()
    chosen = []
    for query in range(len(data.query_dataset)):
        pieces = data.render("query", query).pieces
        if pieces is None:
            raise ValueError(
                "measurement.text chooses tokens by what they spell, and the data module does not "
                "say that (Rendered.pieces). Give measurement.positions or .span."
            )
        words = [(piece.strip(" \n\u2039\u203a"), position) for piece, position in pieces]
        spelled = [(word, position) for word, position in words if word]
        chosen.append(_spelled(wanted, spelled, query, text))
    return chosen


def _spelled(
    wanted: Sequence[str], spelled: Sequence[tuple[str, int | None]], query: int, text: str
) -> list[int]:
    words = [word for word, _ in spelled]
    count = len(wanted)
    for start in range(len(words) - count + 1):
        if not wanted or words[start : start + count] != list(wanted):
            continue
        positions = [position for _, position in spelled[start : start + count]]
        if None not in positions:  # the first token of a text is predicted by none
            return [position for position in positions if position is not None]
    raise ValueError(
        f"Query {query} does not hold {text!r} where the model predicts it. Choose queries that "
        "do, or give measurement.positions (a list for each query)."
    )
