"""An index says what it was built with, and nothing that it says is run."""

import pytest

from tda_lightning.estimators import InfluenceFunction, Source, TracIn
from tda_lightning.index.estimator_record import estimator_of
from tda_lightning.solvers import ConjugateGradients

MADE = [
    TracIn(),
    Source(num_segments=2, curvature="kfac", segment_steps=(3, 5)),
    InfluenceFunction(damping=1e-3, solver=ConjugateGradients(tolerance=1e-6)),
]


@pytest.mark.parametrize("estimator", MADE, ids=lambda own: type(own).__name__)
def test_an_estimator_is_made_again(estimator):
    assert repr(estimator_of(repr(estimator))) == repr(estimator)


@pytest.mark.parametrize(
    "text",
    [
        *("", "Source", "3", "os.system('id')", "Source(**{'seed': 1})", "Source(1)", "Source("),
        *("Source(seed=__import__('os'))", "Source(sed=1)", "Removal(index=3)", "(" * 5000),
        "ConjugateGradients()",
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="no estimator of this library"):
        estimator_of(text)
