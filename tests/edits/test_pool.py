"""A pool of examples that were not in training: each as its own addition."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from tda_lightning.edits import Addition
from tda_lightning.estimators import Source, TracIn
from tda_lightning.measurements import Probability
from tda_lightning.records.errors import UnsupportedTrainingError
from tests.attributing import attribute, relative
from tests.cases.training import CLASSIFIER, OPTIMIZERS, train


@pytest.fixture(scope="module")
def work():
    return train(CLASSIFIER, OPTIMIZERS["momentum"], checkpoints=(3, 6, 9))


def unseen(data):
    """Two others, and training examples 6 and 2."""
    inputs = torch.cat([data[0][:2] * 0.5 + 0.1, data[0][[6, 2]]])
    return TensorDataset(inputs, torch.cat([data[1][:2], data[1][[6, 2]]]))


@pytest.mark.parametrize("estimator", [TracIn(), Source(2)], ids=["tracin", "source"])
def test_a_pool_is_scored_as_additions(work, estimator):
    run, module, data = work
    pool = unseen(data)
    found = attribute(CLASSIFIER, run, module, data, estimator, pool=pool)
    edits = [Addition(pool[index]) for index in range(4)]
    expected = attribute(CLASSIFIER, run, module, data, estimator, edits=edits)
    assert relative(found.values, expected.values) < 1e-12
    removed = attribute(CLASSIFIER, run, module, data, estimator)
    assert relative(found.values[:, 2:], -removed.values[:, [6, 2]]) < 1e-8
    # What would help lowers the loss.
    helpful, score = found.opponents(query=0, k=1)
    assert float(score) == float(found.values[0].min()) == float(found.values[0, helpful])


def test_an_overlap_with_the_training_set_is_counted(work):
    run, module, data = work
    found = attribute(CLASSIFIER, run, module, data, TracIn(), pool=unseen(data))
    assert found.provenance["pool"] == {"size": 4, "in_training": 2, "same": [[2, 6], [3, 2]]}
    assert found.provenance["notes"][0].startswith(
        "2 of the 4 examples of the pool are in the training set already (the first: 2 is training "
        "example 6)"
    )
    others = TensorDataset(*(tensor[:2] for tensor in unseen(data).tensors))
    found = attribute(CLASSIFIER, run, module, data, TracIn(), pool=others)
    assert found.provenance["pool"]["in_training"] == 0
    assert not any("pool" in note for note in found.provenance["notes"])


def test_what_was_asked_holds_for_a_pool(work):
    run, module, data = work
    options = {"pool": unseen(data), "measurement": Probability(target=1), "self_influence": None}
    found = attribute(CLASSIFIER, run, module, data, TracIn(), **options)
    removed = attribute(
        CLASSIFIER,
        run,
        module,
        data,
        TracIn(),
        measurement=Probability(target=1),
        self_influence=None,
    )
    assert relative(found.values[:, 2:], -removed.values[:, [6, 2]]) < 1e-8


def test_what_is_no_pool_is_refused(work):
    run, module, data = work
    given = (CLASSIFIER, run, module, data)
    with pytest.raises(TypeError, match="pool must be a data set that is read by index"):
        attribute(*given, TracIn(), pool=3)
    with pytest.raises(ValueError, match="The pool is empty"):
        attribute(*given, TracIn(), pool=[])
    with pytest.raises(ValueError, match="pool and edits both say what the columns are about"):
        attribute(*given, TracIn(), pool=unseen(data), edits=[Addition(unseen(data)[0])])
    with pytest.raises(ValueError, match="gives an example of another form than those of the"):
        attribute(*given, TracIn(), pool=[(torch.zeros(99), torch.tensor(0))])
    with pytest.raises(UnsupportedTrainingError, match="changes no example of the recorded bat"):
        attribute(*given, Source(2, order="recorded"), pool=unseen(data))
