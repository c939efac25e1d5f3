"""What is measured: which runs, asked what, by which estimators, where the derivative is taken."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.fidelity import studies as fidelity

ESTIMATORS = {
    "unrolled": fidelity.ESTIMATORS["unrolled"],
    "source_recorded": fidelity.ESTIMATORS["source_recorded"],
    "source": fidelity.ESTIMATORS["source"],
    "source_blocks": fidelity.ESTIMATORS["source_blocks"],
    "influence": fidelity.ESTIMATORS["influence-0.1"],
    "tracin": fidelity.ESTIMATORS["tracin"],
}
TITLES = {name: fidelity.TITLES[name] for name in ESTIMATORS}


@dataclass(frozen=True)
class Point:
    """Where the derivative is taken.

    Attributes:
        keep: mean weight of the examples.
        draws: random subsets, their scores averaged; None: every example at weight ``keep``.
    """

    keep: float
    draws: int | None = None

    def __str__(self) -> str:
        return f"{self.keep:g}" + ("" if self.draws is None else f"x{self.draws}")

    @property
    def settings(self) -> list[str]:
        """Of tda attribute."""
        drawn = [] if self.draws is None else [f"draws={self.draws}"]
        return [] if self.keep == 1 else [f"keep={self.keep:g}", *drawn]

    @property
    def title(self) -> str:
        """In a table."""
        if self.draws is None:
            return f"{self.keep:g}"
        return f"{self.keep:g}, {self.draws} draw{'' if self.draws == 1 else 's'}"


WHOLE, HALF = Point(1.0), Point(0.5)


@dataclass(frozen=True)
class Study:
    """One recorded run of experiments/fidelity, and what is asked about it.

    Attributes:
        title: for the tables.
        points: where derivatives are taken, by every estimator.
        others: further points for some of the estimators.
        truths: retrainings, by share kept; those with half kept are in experiments/fidelity.
        subsets: retrained for each share.
        together: replays at once through vmap.
        without: estimators that would take too long.
        averaged: estimators that are asked over ensembles of five members.
        drawn: further points for ensembles of seeds, by influence functions and SOURCE.
    """

    title: str
    points: tuple[Point, ...] = (WHOLE, HALF)
    others: tuple[tuple[str, tuple[Point, ...]], ...] = ()
    truths: tuple[tuple[str, float], ...] = (("single_run", 0.95), ("algorithm", 0.95))
    subsets: int = 100
    together: int = 5
    without: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ("influence", "source", "tracin")
    drawn: tuple[Point, ...] = ()


SHARES = (0.99, 0.95, 0.8, 0.5, 0.2)
# Of ensembles, with the estimators that are asked over them. Nothing was trained under masks, so
# exact unrolling refuses them; of adapters' short trainings the cheap estimators are asked.
KINDS = {
    "seeds": tuple(ESTIMATORS),
    "forks": tuple(ESTIMATORS),
    "dropout": tuple(name for name in ESTIMATORS if name != "unrolled"),
    "lora": ("source", "influence", "tracin"),
}
KEEPS = (Point(0.95), Point(0.8), Point(0.2))
MAPPED = ("unrolled", "source_recorded", "source", "source_blocks", "influence")
DRAWN = tuple((name, (Point(0.5, 4),)) for name in ("source", "influence"))
TITLED = {name: study.title for name, study in fidelity.STUDIES.items()}

STUDIES = {
    "concrete": Study(
        TITLED["concrete"],
        others=tuple((name, (*KEEPS, Point(0.5, 4))) for name in MAPPED),
        truths=(
            *(("single_run", share) for share in SHARES if share != 0.5),
            ("algorithm", 0.95),
        ),
        averaged=("influence", "source", "source_recorded", "unrolled", "tracin"),
        drawn=(Point(0.5, 1), Point(0.5, 4)),
    ),
    "fashion_mnist_noisy_tenth": Study(
        "FashionMNIST, 30% random labels, 3 epochs, a tenth of the rate",
    ),
    "fashion_mnist_noisy_third": Study(
        "FashionMNIST, 30% random labels, 3 epochs, a third of the rate"
    ),
    "fashion_mnist_noisy": Study("FashionMNIST, 30% random labels, 3 epochs"),
    "wikitext2_gpt": Study(
        TITLED["wikitext2_gpt"],
        others=tuple((name, (Point(0.5, 4),)) for name in ("source_blocks", "influence")),
        subsets=50,
        together=1,
    ),
    "mnist": Study(TITLED["mnist"], others=DRAWN),
    "fashion_mnist": Study(TITLED["fashion_mnist"], others=DRAWN),
    "cifar10_resnet9": Study(
        TITLED["cifar10_resnet9"],
        subsets=50,
        together=1,
        without=("source_recorded", "unrolled"),
    ),
}


MEMBERS = 5


@dataclass(frozen=True)
class Row:
    """A file of scores: an estimator, the point of its derivative, and the kind of an ensemble."""

    estimator: str
    point: Point
    ensemble: str | None = None

    def __str__(self) -> str:
        kind = "" if self.ensemble is None else f"+{self.ensemble}"
        return f"{self.estimator}@{self.point}{kind}"


def rows(study: Study) -> dict[str, Row]:
    """Files of scores by name, the cheap ones first."""
    found = [Row(name, point) for point in study.points for name in reversed(ESTIMATORS)]
    found += [Row(name, point) for name, points in study.others for point in points]
    for kind, suited in KINDS.items():
        averaged = [name for name in study.averaged if name in suited]
        found += [Row(name, point, kind) for name in averaged for point in study.points]
    found += [
        Row(name, point, "seeds") for name in ("influence", "source") for point in study.drawn
    ]
    return {str(row): row for row in found if row.estimator not in study.without}
