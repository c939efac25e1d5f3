"""How often a batch would make the host wait for a GPU, counted on a CPU that is taken for one."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule
from tda_lightning.estimators import InfluenceFunction, Source, TracIn
from tda_lightning.records.errors import NonFiniteError
from tda_lightning.runtime import conditions
from tda_lightning.tasks import ClassificationTask
from tests import oracles
from tests.attributing import quiet
from tests.cases.training import CLASSIFIER, OPTIMIZERS

# Read tensors; what the records do they do to the host's copy of the scores.
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}
ON_HOST = "tda_lightning/records/"


class Reads(TorchDispatchMode):
    """Counts reads of tensors by the line of the package that asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in READS:
            own = [f for f in traceback.extract_stack() if "tda_lightning/" in f.filename]
            if own and ON_HOST not in own[-1].filename:
                path = Path(own[-1].filename)
                self.lines[f"{path.parent.name}/{path.name}:{own[-1].lineno}"] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Copies of tensors to the host, in order."""
    found: list[str] = []
    cpu, to = Tensor.cpu, Tensor.to

    def counted_to(self: Tensor, *args: Any, **options: Any) -> Tensor:
        if "cpu" in args:
            found.append("to")
        return to(self, *args, **options)

    def counted_cpu(self: Tensor, *args: Any) -> Tensor:
        if self.is_floating_point():  # indices are on the host from the start
            found.append("cpu")
        return cpu(self, *args)

    monkeypatch.setattr(Tensor, "to", counted_to)
    monkeypatch.setattr(Tensor, "cpu", counted_cpu)
    return found


def attributed(estimator: Any, count: int, broken: int | None = None) -> int:
    """Attribute in batches of 8; how many batches a walk has."""
    module, data = CLASSIFIER.build(), CLASSIFIER.batch(count, 0)
    batches = oracles.cut_batches(count, 8, epochs=1)
    run = oracles.record_run(module, CLASSIFIER.loss, data, OPTIMIZERS["sgd"], batches, (2,))
    if broken is not None:
        data[0][broken] = torch.nan
    attribution = AttributionModule(module, run, estimator, ClassificationTask())
    query = TensorDataset(*(part[:3] for part in CLASSIFIER.batch(3, 1)))
    attribution.attribute(
        TensorDataset(*data), query, batch_size=8, self_influence=False, trainer=quiet()
    )
    return count // 8


@pytest.mark.parametrize(
    ("estimator", "sampled", "checkpoints"),
    [
        (TracIn(), 0, 2),
        (InfluenceFunction(), 1, 1),
        (Source(1, leading_directions=2), 2, 2),
    ],
    ids=["tracin", "ekfac", "source"],
)
def test_a_batch_waits_once_at_most(estimator, sampled, checkpoints, monkeypatch, copies) -> None:
    """A batch that is scored copies its scores to the host; one under sampled labels asks whether
    the loss has a closed form. Nothing else grows with the number of batches."""
    monkeypatch.setattr(conditions, "waits", lambda tensor: True)
    lines, copied, walked = [], [], []
    for count in (32, 64):
        copies.clear()
        with Reads() as reads:
            walked.append(attributed(estimator, count))
        lines.append(reads.lines)
        copied.append(len(copies))
    more = walked[1] - walked[0]
    growth = {line: n - lines[0][line] for line, n in lines[1].items() if n > lines[0][line]}
    assert sum(growth.values()) == sampled * more, growth
    assert copied[1] - copied[0] == checkpoints * more


def test_a_loss_that_is_not_finite_is_named_all_the_same(monkeypatch) -> None:
    monkeypatch.setattr(conditions, "waits", lambda tensor: True)
    with pytest.raises(NonFiniteError, match="The loss of example 21 is nan"):
        attributed(TracIn(), 32, broken=21)
    assert not conditions._noted and not conditions._open
