"""What a page calls scores of either sign, by what was asked and what the columns are about."""

from __future__ import annotations

from dataclasses import dataclass

from tda_lightning.records.provenance import Provenance
from tda_lightning.report.kept import shorten


@dataclass(frozen=True)
class Wording:
    """Of one page.

    Attributes:
        quantity: that the scores are about, such as "the probability of the label".
        sign: measurement = sign x quantity.
        pool: whether columns are examples that were not in training.
        helps: the sign of a score that says that an example helps.
        headings: of the two lists, by "proponent" and "opponent".
        effects: what their scores say.
        totals: what they are called together.
    """

    quantity: str
    sign: int
    pool: bool
    helps: int
    headings: dict[str, str]
    effects: dict[str, str]
    totals: dict[str, str]


def wording(provenance: Provenance) -> Wording:
    """The words that fit some scores."""
    asked, pool = provenance.get("measurement"), "pool" in provenance
    quantity = "the measurement" if asked is None else shorten(asked["quantity"], 200)
    sign = 1 if asked is None else asked["sign"]
    # Losses rise without what helped; a probability falls.
    worse, better = ("raise", "lower") if sign > 0 else ("lower", "raise")
    doing = "adding one" if pool else "removing one"
    helped, hurt = (better, worse) if pool else (worse, better)
    effects = {
        "proponent": f"{doing} is predicted to {helped} {quantity} by its score",
        "opponent": f"{doing} is predicted to {hurt} {quantity} by its score",
    }
    headings = {"proponent": "Strongest proponents", "opponent": "Strongest opponents"}
    totals = {"proponent": "proponents", "opponent": "opponents"}
    if pool:
        headings = {"proponent": "Would help most", "opponent": "Would harm most"}
        totals = {"proponent": "that would help", "opponent": "that would harm"}
    return Wording(quantity, sign, pool, -1 if pool else 1, headings, effects, totals)
