"""The tables and pictures of the README, from the kept results, within seconds.

python -m experiments.question.table            # print
python -m experiments.question.table --write    # and put them into README.md, map.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from experiments.fidelity import kept as fidelity
from experiments.question import additive, tiny_table, trainings_figure
from experiments.question.heat_map import Map, heat_maps
from experiments.question.kept import COUNTS, RESULTS, Kept, load
from experiments.question.studies import (
    ESTIMATORS,
    KINDS,
    MEMBERS,
    STUDIES,
    TITLES,
    Row,
    Study,
    rows,
)
from experiments.question.tiny_table import interval
from tda_lightning.evaluation import Interval
from tda_lightning.evaluation.ceilings import seed_ceiling
from tda_lightning.evaluation.linear_datamodeling import bootstrap, rank_correlation

HERE = Path(__file__).parent
BEGIN, END = "<!-- by table.py, from here -->", "<!-- to here -->"
ASKED = (("single_run", 0.95), ("single_run", 0.5), ("algorithm", 0.95), ("algorithm", 0.5))
WORDS = {"single_run": "single run", "algorithm": "algorithm", "fresh": "algorithm"}
WORDS |= {"seeds": "seeds", "forks": "forks", "dropout": "dropout masks", "lora": "adapters"}
MAPPED = ("0.95", "0.8", "0.5", "0.2")
WHY_MISSING = (
    "Not run for want of processor time. Minutes are those of the same estimator's kept rows, "
    "times draws and members; trainings of the members come on top. Seconds of retrainings are by "
    "the clock. Training anew with 95% kept would take, by the kept retrainings at half of the "
    "data, at most 24 min on the GPT, 67 on FashionMNIST and two hours on ResNet-9. (MNIST took 19 "
    "where this said 53.) On ResNet-9 the recorded order was not measured, and exact unrolling was "
    "stopped after 45 min."
)


def main() -> None:
    """Print the tables; write them where the README has them."""
    parser = argparse.ArgumentParser(description="The tables, from the kept results.")
    parser.add_argument("--write", action="store_true", help="put them into README.md")
    options = parser.parse_args()
    found = {name: load(name) for name in STUDIES if (RESULTS / f"{name}.npz").exists()}
    files = {name: RESULTS / f"adamw_{name}.npz" for name in tiny_table.TITLES}
    tiny = {name: tiny_table.load(file) for name, file in files.items() if file.exists()}
    text = tables(found, tiny)
    print(text)
    if options.write:
        readme = HERE / "README.md"
        before, _, rest = readme.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
        (HERE / "map.svg").write_text(heat_maps(maps(found, tiny), MAPPED, ("1", *MAPPED)))
        if series := trainings_figure.found():
            top = ceiling(found["mnist"], 0.5).value
            (HERE / "trainings.svg").write_text(trainings_figure.picture(series, top))


def tables(found: Mapping[str, Kept], tiny: Mapping[str, tiny_table.Tiny]) -> str:
    """All of them, in markdown."""
    parts = []
    for name, kept in found.items():
        parts.append(f"### {STUDIES[name].title}\n\n{estimators(name, STUDIES[name], kept)}")
    for name, results in tiny.items():
        title = tiny_table.TITLES[name]
        parts.append(f"### AdamW, exact derivatives: {title}\n\n{tiny_table.table(results)}")
    said = (
        "Training anew, half kept: how far predictions of the same kind are the luck of one seed."
    )
    parts.append(f"### AdamW, the luck of a seed\n\n{said}\n\n{tiny_table.luck(tiny)}")
    parts.append(f"### By number of trainings\n\n{by_members(found)}")
    if series := trainings_figure.found():
        said = (
            "LDS for training anew, half kept; behind the comma the trainings paid for.\n\n"
            "![LDS by trainings paid for](trainings.svg)"
        )
        parts.append(f"### MNIST: what members cost\n\n{said}\n\n{trainings_figure.table(series)}")
    if (datamodels := additive.load("concrete")) is not None:
        parts.append(f"### Concrete: what any sum can predict\n\n{datamodel_table(datamodels)}")
    parts.append(f"### Sizes\n\n{slopes(found, tiny)}")
    parts.append(f"### Missing\n\n{WHY_MISSING}\n\n{missing(found, tiny)}")
    return "\n\n".join(parts)


def estimators(name: str, study: Study, kept: Kept) -> str:
    """A line for each estimator and point."""
    asked = [key for key in ASKED if key in kept.truth]
    heads = [f"{WORDS[p]}, {share:.0%} kept" for p, share in asked]
    lines = [
        f"| estimator | keep | {' | '.join(heads)} | processor time |",
        "|---" * (len(heads) + 3) + "|",
    ]
    old = fidelity.load(name)
    table: list[tuple[str, str, list[Interval | None], float | None]] = []
    for asked_row in ordered(study):
        row = str(asked_row)
        values = [lds(kept, row, *key) for key in asked]
        seconds = kept.about["seconds"].get(row)
        if row.endswith("@1") and all(value is None for value in values):
            values, seconds = _of_fidelity(old, asked_row.estimator, asked)
        if any(value is not None for value in values):
            at = asked_row.point.title
            if asked_row.ensemble is not None:
                at += f", {MEMBERS} {WORDS[asked_row.ensemble]}"
            table.append((TITLES[asked_row.estimator], at, values, seconds))
    best = [
        max((row[2][k].value for row in table if row[2][k] is not None), default=None)  # type: ignore[union-attr]
        for k in range(len(asked))
    ]
    for title, at, values, seconds in table:
        cells = []
        for value, top in zip(values, best, strict=True):
            text = "" if value is None else interval(value)
            cells.append(f"**{text}**" if value is not None and value.value == top else text)
        time = "" if seconds is None else f"{seconds:.1f} s"
        lines.append(f"| {title} | {at} | {' | '.join(cells)} | {time} |")
    anew = [share if protocol == "algorithm" else None for protocol, share in asked]
    own = ["" if share is None else replayed(kept, share) for share in anew]
    tops = ["" if share is None else interval(ceiling(kept, share)) for share in anew]
    lines.append(f"| *the recorded run, retrained* | | {' | '.join(own)} | |")
    lines.append(f"| *ceiling of the truth* | | {' | '.join(tops)} | |")
    return "\n".join(lines)


def replayed(kept: Kept, share: float) -> str:
    """How well training anew on a subset is predicted by what the recorded run itself would have
    become on it: the most that a perfect answer about this one run says of others."""
    if ("single_run", share) not in kept.truth:
        return ""
    own, anew = kept.truth["single_run", share], kept.truth["algorithm", share]
    common = min(own.shape[1], anew.shape[1])
    return interval(bootstrap(rank_correlation(own[:, :common], anew[:, :common])))


def ceiling(kept: Kept, share: float) -> Interval:
    """The most that the truth of training anew lets a prediction reach; every retraining has a
    seed of its own."""
    return seed_ceiling(kept.seeds[share].permute(2, 0, 1)).over_queries


def datamodel_table(found: additive.Additive) -> str:
    """LDS of datamodels, half kept, by the replays that they were fitted to."""
    asked = ("single_run", "algorithm")
    lines = [
        f"| datamodel fitted to | {' | '.join(WORDS[protocol] for protocol in asked)} |",
        "|---" * (len(asked) + 1) + "|",
    ]
    for number, count in enumerate(found.counts):
        cells = [interval(found.interval(protocol, number)) for protocol in asked]
        lines.append(f"| {count} replays | {' | '.join(cells)} |")
    return "\n".join(lines)


def ordered(study: Study) -> list[Row]:
    """The rows of a study by estimator, from single runs to ensembles, by falling weights."""

    def place(row: Row) -> tuple[object, ...]:
        kind = -1 if row.ensemble is None else [*KINDS].index(row.ensemble)
        return [*ESTIMATORS].index(row.estimator), kind, -row.point.keep, row.point.draws or 0

    return sorted(rows(study).values(), key=place)


def lds(kept: Kept, row: str, protocol: str, share: float) -> Interval | None:
    """None where the row or the truth is missing."""
    if row not in kept.removed.get(share, {}) or (protocol, share) not in kept.truth:
        return None
    truth = kept.truth[protocol, share]
    predicted = kept.removed[share][row][:, : truth.shape[1]]
    return bootstrap(rank_correlation(predicted, truth))


def _of_fidelity(
    old: fidelity.Kept, estimator: str, asked: Sequence[tuple[str, float]]
) -> tuple[list[Interval | None], float | None]:
    """The row at weights of 1, which experiments/fidelity has for half kept."""
    name = {"influence": "influence-0.1"}.get(estimator, estimator)
    if name not in old.predicted:
        return [None] * len(asked), None
    found = [
        bootstrap(rank_correlation(old.predicted[name], -old.truth[p].T)) if share == 0.5 else None
        for p, share in asked
    ]
    return found, old.about["seconds"][name]


def by_members(found: Mapping[str, Kept]) -> str:
    """LDS of means over the first members of each ensemble, half kept."""
    asked = ("single_run", "algorithm")
    heads = [f"{WORDS[p]}, {k} trained" for p in asked for k in COUNTS]
    lines = [f"| study | scores | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for name, kept in found.items():
        for row in rows(STUDIES[name]).values():
            if (str(row), asked[0]) not in kept.first:
                continue
            cells = [interval(bootstrap(lds)) for p in asked for lds in kept.first[str(row), p]]
            said = f"{TITLES[row.estimator]}, keep={row.point}, {WORDS[row.ensemble]}"
            lines.append(f"| {STUDIES[name].title} | {said} | {' | '.join(cells)} |")
    return "\n".join(lines)


def maps(found: Mapping[str, Kept], tiny: Mapping[str, tiny_table.Tiny]) -> dict[str, Map]:
    """LDS, single run, by share kept and by keep."""
    made: dict[str, Map] = {}
    if "concrete" in found:
        kept = found["concrete"]
        for estimator in ("unrolled", "source_recorded", "source", "influence"):
            cells = {
                (share, keep): value.value
                for share in MAPPED
                for keep in ("1", *MAPPED)
                if (value := lds(kept, f"{estimator}@{keep}", "single_run", float(share)))
            }
            if len(cells) > len(MAPPED) * 2:
                made[f"Concrete, SGD: {TITLES[estimator]}"] = cells
    for name, results in tiny.items():
        if "0.2" in results.removed and any(p.startswith("draw0.2-") for p in results.points):
            for protocol, said in (("single_run", "single run"), ("fresh", "fresh seeds")):
                title = f"{name}, AdamW, exact, {said}"
                made[title[0].upper() + title[1:]] = _tiny_map(results, protocol)
    return made


def _tiny_map(results: tiny_table.Tiny, protocol: str) -> Map:
    """Four draws at each keep below 1."""
    some = {"1": ["whole"]}
    for keep in MAPPED:
        name = "draw" if keep == "0.5" else f"draw{keep}"
        some[keep] = [f"{name}-{k}" for k in range(4)]
    return {
        (share, keep): float(tiny_table.lds(results, [names], protocol, share)[0].nanmean())
        for share in MAPPED
        for keep, names in some.items()
        if set(names) <= set(results.points)
    }


def slopes(found: Mapping[str, Kept], tiny: Mapping[str, tiny_table.Tiny]) -> str:
    """Measured changes on predicted ones, single run, by share left out."""
    shares = (0.99, 0.95, 0.8, 0.5)
    lines = [
        "| problem | scores | " + " | ".join(f"{1 - s:.0%} left out" for s in shares) + " |",
        "|---" * (len(shares) + 2) + "|",
    ]
    for name, kept in found.items():
        if kept.recorded is None:
            continue
        for row in kept.about["rows"]:
            estimator, _, point = row.partition("@")
            if point not in ("1", "0.5", "0.5x4") or estimator not in TITLES:
                continue
            cells = []
            for share in shares:
                known = ("single_run", share) in kept.truth and row in kept.removed.get(share, {})
                cells.append(
                    slope(
                        kept.removed[share][row],
                        kept.truth["single_run", share],
                        kept.recorded,
                    )
                    if known
                    else ""
                )
            lines.append(
                f"| {STUDIES[name].title} | {TITLES[estimator]}, keep={point} | "
                f"{' | '.join(cells)} |"
            )
    for name, results in tiny.items():
        ways = {
            "all weights 1": ["whole"],
            "half the rate": ["rate0.5"],
            "expected second moments": ["spread"],
            "random halves, 8": [f"draw-{k}" for k in range(8)],
        }
        for said, names in ways.items():
            if not set(names) <= set(results.points):
                continue
            cells = [
                slope(
                    torch.stack([results.removed[f"{share:g}"][n] for n in names]).mean(0),
                    results.truth["single_run", f"{share:g}"],
                    results.recorded,
                )
                if f"{share:g}" in results.removed
                else ""
                for share in shares
            ]
            lines.append(
                f"| {tiny_table.TITLES[name]}, AdamW | exact, {said} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def slope(predicted: Tensor, truth: Tensor, recorded: Tensor) -> str:
    """Of the regression through the origin over all queries, with a bootstrap over them."""
    truth = truth - recorded[:, None]
    predicted = predicted[:, : truth.shape[1]]
    above, below = (predicted * truth).sum(1), predicted.square().sum(1)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(above), (2000, len(above)), generator=generator)
    drawn = above[draws].sum(1) / below[draws].sum(1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return f"{float(above.sum() / below.sum()):.2f} [{low:.2f}, {high:.2f}]"


def price(row: Row, seconds: Mapping[str, float], old: fidelity.Kept) -> float:
    """About how many processor seconds a row takes: those of the estimator at the nearest point
    that was run, for each draw and each member of an ensemble."""
    known = {"influence": "influence-0.1"}.get(row.estimator, row.estimator)
    names = [f"{row.estimator}@{row.point.keep:g}", f"{row.estimator}@0.5", f"{row.estimator}@1"]
    of_one = next((seconds[name] for name in names if name in seconds), None)
    if of_one is None:
        of_one = old.about["seconds"][known]
    times = (row.point.draws or 1) * (1 if row.ensemble is None else MEMBERS)
    return float(of_one) * times


def missing(found: Mapping[str, Kept], tiny: Mapping[str, tiny_table.Tiny]) -> str:
    """What was planned and is not there yet, with about what it would take."""
    lines = []
    for name, study in STUDIES.items():
        have = set(found[name].about["rows"]) if name in found else set()
        old = fidelity.load(name).predicted
        gone, cost = [], 0.0
        for estimator in ESTIMATORS:
            known = {"influence": "influence-0.1"}.get(estimator, estimator) in old
            at = []
            for row in ordered(study):
                if row.estimator != estimator or str(row) in have:
                    continue
                said = str(row).partition("@")[2]
                at.append(said + (" (half kept is there)" if said == "1" and known else ""))
                cost += price(row, found[name].about["seconds"], fidelity.load(name))
            if at:
                gone.append(f"{TITLES[estimator]} at keep {', '.join(at)}")
        truths = found[name].truth if name in found else {}
        untrained = [
            f"{WORDS[p]} {share:.0%} kept" for p, share in study.truths if (p, share) not in truths
        ]
        if untrained:
            gone.append(f"retraining: {', '.join(untrained)}")
        for (p, share), truth in truths.items():
            took = found[name].about.get("retraining_seconds", {}).get(f"{p}-{share:g}")
            if took is not None and truth.shape[1] < study.subsets:
                done = truth.shape[1]
                gone.append(
                    f"retraining: {study.subsets - done} of {study.subsets} for {WORDS[p]} "
                    f"{share:.0%} kept ({took / done:.0f} s each)"
                )
        if study.without:
            gone.append(f"not planned: {', '.join(TITLES[e] for e in study.without)}")
        if gone:
            taken = f" About {cost / 60:.0f} min." if cost > 30 else ""
            lines.append(f"- {study.title}: {'; '.join(gone)}.{taken}")
    for name in tiny_table.TITLES:
        if name not in tiny:
            lines.append(f"- AdamW, exact derivatives: {tiny_table.TITLES[name]}.")
    gone = [str(s) for s in trainings_figure.ORDER if s not in trainings_figure.found()]
    if gone:
        lines.append(f"- MNIST, what members cost (trainings.py): {', '.join(gone)}.")
    return "\n".join(lines) or "Nothing."


if __name__ == "__main__":
    main()
