"""The tables of experiments/fidelity: what is kept of a study is enough, and the README has it."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from experiments.fidelity import kept, shampoo, table
from tda_lightning import Scores
from tda_lightning.evaluation import GroundTruth, draw_seeds, draw_subsets
from tda_lightning.evaluation import linear_datamodeling_score as score_of
from tda_lightning.gradients.forms import Outer
from tda_lightning.gradients.moments import FULL

TRAIN, QUERIES, SUBSETS, SEEDS = 30, 7, 12, 2


def _truth(protocol: str, seed: int) -> GroundTruth:
    torch.manual_seed(seed)
    columns = SEEDS if protocol == "algorithm" else 1
    return GroundTruth(
        protocol=protocol,  # type: ignore[arg-type]
        subsets=draw_subsets(TRAIN, 0.5, SUBSETS, seed),
        seeds=draw_seeds(SUBSETS, columns, seed),
        outcomes=torch.randn(SUBSETS, columns, QUERIES).double(),
        done=torch.ones(SUBSETS, columns, dtype=torch.bool),
        seconds=torch.ones(SUBSETS, columns).double(),
        baseline=torch.zeros(QUERIES).double(),
        configuration={},
    )


def test_ranks_are_enough_for_the_score() -> None:
    torch.manual_seed(0)
    scores = {"random": Scores(torch.randn(QUERIES, TRAIN)), "tracin": Scores(torch.ones(7, 30))}
    truth = _truth("algorithm", 0)
    ranks = kept._ranks(scores, {"algorithm": truth})
    assert ranks.dtype == np.uint8
    found = kept.Kept(
        {"algorithm": truth.outcomes.mean(1)},
        {},
        {name: torch.from_numpy(r).double() for name, r in zip(scores, ranks, strict=True)},
        {},
        {},
    )
    for name, item in scores.items():
        expected = score_of(item, truth.subsets, truth.outcomes)
        got = table.lds(found, name)["algorithm"]
        torch.testing.assert_close(got.per_query, expected.per_query)
    # Constant scores say nothing: rounding must not rank their sums.
    assert table.lds(found, "tracin")["algorithm"].value == 0


def test_protocols_share_their_subsets() -> None:
    scores = {"random": Scores(torch.randn(QUERIES, TRAIN))}
    others = {"algorithm": _truth("algorithm", 0), "single_run": _truth("single_run", 1)}
    with pytest.raises(ValueError, match="the same subsets"):
        kept._ranks(scores, others)


def test_a_damping_is_chosen_on_other_subsets() -> None:
    """Whatever does best where it is judged."""
    judged, chosen = torch.randn(9, 4).double(), torch.randn(9, 4).double()
    good, bad = (lambda truth: -truth.T), (lambda truth: truth.T)
    found = kept.Kept(
        {"algorithm": judged},
        {"algorithm": chosen},
        {"influence-0.1": bad(judged), "influence-1": good(judged), "influence-10": bad(judged)},
        {"influence-0.1": bad(chosen), "influence-1": bad(chosen), "influence-10": good(chosen)},
        {"seconds": {}},
    )
    assert table.best(found, "influence", "algorithm") == "influence-10"
    assert table.best(found, "kronfluence", "algorithm") is None
    # Chosen in the other protocol where there is no choice in this one.
    assert table.best(found, "influence", "single_run") == "influence-10"


def test_drawing_subsets_again_ranks_their_copies() -> None:
    generator = np.random.default_rng(0)
    predicted, truth = generator.normal(size=(2, 5, 9)).round(1)
    truth[0, :4] = 0.5  # level ones
    draws = generator.multinomial(9, np.full(9, 1 / 9), size=4)
    found = table.redrawn(predicted, truth, draws)
    for draw, row in zip(draws, found, strict=True):
        copies = np.repeat(np.arange(9), draw)
        for query in range(5):
            expected = spearmanr(predicted[query, copies], truth[query, copies]).statistic
            assert row[query] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", [n for n in table.STUDIES if (kept.RESULTS / f"{n}.npz").exists()])
def test_kept_results_are_whole(name: str) -> None:
    found = kept.load(name)
    for protocol, truth in found.truth.items():
        assert truth.isfinite().all(), protocol
        for ranks in found.predicted.values():
            assert ranks.shape == truth.T.shape
    json.dumps(found.about, allow_nan=False)


def test_the_readme_has_the_sizes_and_a_table_of_the_kept_results() -> None:
    found = {n: kept.load(n) for n in table.STUDIES if (kept.RESULTS / f"{n}.npz").exists()}
    readme = (table.HERE / "README.md").read_text()
    assert table.sizes(found) in readme
    assert table.markdown(table.rows(found["concrete"])) in readme


@pytest.mark.slow  # intervals of all studies, over subsets too: 10 s
def test_the_readme_has_the_tables_of_the_kept_results() -> None:
    found = {n: kept.load(n) for n in table.STUDIES if (kept.RESULTS / f"{n}.npz").exists()}
    readme = (table.HERE / "README.md").read_text()
    assert table.tables(found) in readme


def test_shampoos_sums_are_those_of_whole_gradients() -> None:
    inputs, outputs = torch.randn(5, 1, 2, 3).double(), torch.randn(5, 1, 2, 4).double()
    gradient = Outer(lambda rows: inputs[rows], outputs, columns=3)
    with shampoo.shampoo_bases(True):
        left, right, _ = gradient.covariances((FULL, FULL))
    whole = torch.einsum("nto,nti->noi", outputs[:, 0], inputs[:, 0])
    torch.testing.assert_close(left[0], torch.einsum("noi,npi->op", whole, whole))
    torch.testing.assert_close(right[0], torch.einsum("noi,noj->ij", whole, whole))
    kfac = gradient.covariances((FULL, FULL))[0]
    torch.testing.assert_close(kfac[0], torch.einsum("nto,ntp->op", outputs[:, 0], outputs[:, 0]))
    assert shampoo.table(shampoo.read()) in shampoo.README.read_text()
