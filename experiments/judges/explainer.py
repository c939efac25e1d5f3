"""Scores of a recorded run behind quanda's interface of explainers: ``explain``, and
``self_influence``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from experiments.judges.quanda_modules import enter_quanda
from tda_lightning import AttributionModule, Scores, Trajectory
from tda_lightning.cli.trainers import silent_trainer
from tda_lightning.evaluation import randomised
from tda_lightning.runtime.digests import digest
from tda_lightning.tasks import AttributionTask

enter_quanda()
from quanda.explainers.base import Explainer  # noqa: E402
from quanda.utils.common import cache_result  # noqa: E402


class RecordedExplainer(Explainer):  # type: ignore[misc]
    """One estimator over one recorded run.

    What depends on curvature alone is fitted by the first :meth:`explain`; a further one walks over
    the training set only, and of queries that were explained before it costs nothing. A walk for
    many queries costs little more than one for a few: with ``expected``, the first
    :meth:`explain` scores all of these, and further ones look them up. Scores have quanda's sign: a
    proponent's are positive.

    Args:
        model: as it was trained, whatever its weights.
        train_dataset: the recorded training set.
        task: of quanda: the kind of data.
        checkpoints: not the run's own but one file of weights to put in place of all of them, as
            quanda's test with a randomised model asks for; None: the recorded ones.
        checkpoints_load_func: as quanda passes it; not used.
        trajectory: the recorded run.
        estimator: of ``tda_lightning.estimators``.
        loss: a task of ``tda_lightning.tasks``.
        keep: share of the data that would stay (``AttributionModule.attribute``).
        batch_size: training examples at a time.
        expected: inputs and targets of queries that are going to be explained.
    """

    accepted_tasks: ClassVar[list[str]] = ["image_classification", "text_classification"]

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Dataset,
        task: str = "image_classification",
        checkpoints: Sequence[str] | str | None = None,
        checkpoints_load_func: Any = None,
        *,
        trajectory: Trajectory,
        estimator: Any,
        loss: AttributionTask,
        keep: float = 1.0,
        batch_size: int = 256,
        expected: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(model, train_dataset, task, None, checkpoints_load_func)
        if checkpoints is not None:
            file = checkpoints if isinstance(checkpoints, str) else checkpoints[-1]
            trajectory = with_weights(trajectory, model, torch.load(file, weights_only=True))
        self.recorded = train_dataset
        self.keep, self.batch_size = keep, batch_size
        self.attribution = AttributionModule(model, trajectory, estimator, loss)
        self.expected = [] if expected is None else list(zip(*expected, strict=True))
        self.explained: dict[str, Tensor] = {}

    def explain(self, test_data: Tensor, targets: Tensor | list[int]) -> Tensor:
        """Scores [query, train] for the loss of ``targets``, which need not be the labels."""
        asked = list(zip(test_data.cpu(), torch.as_tensor(targets).cpu(), strict=True))
        if any(digest(query) not in self.explained for query in asked):
            every = {digest(query): query for query in [*asked, *self.expected]}
            new = {key: query for key, query in every.items() if key not in self.explained}
            queries = TensorDataset(
                *(torch.stack(part) for part in zip(*new.values(), strict=True))
            )
            self.explained |= zip(new, self._scores(queries, False).values, strict=True)
        return torch.stack([self.explained[digest(query)] for query in asked])

    @cache_result  # type: ignore[untyped-decorator]
    def self_influence(self, batch_size: int = 32) -> Tensor:
        """Of each training example, for its own label: [train]."""
        one = TensorDataset(*(torch.as_tensor(part)[None] for part in self.recorded[0]))
        found = self._scores(one, self_influence=True).self_influence
        assert found is not None
        return found

    def _scores(self, queries: Dataset, self_influence: bool) -> Scores:
        return self.attribution.attribute(
            self.recorded,
            queries,
            self.batch_size,
            trainer=silent_trainer(),
            self_influence=self_influence,
            keep=self.keep,
        )


def with_weights(
    trajectory: Trajectory, model: nn.Module, weights: dict[str, Tensor]
) -> Trajectory:
    """The run with the same ``weights`` in every checkpoint, and without what it gathered."""
    bare = randomised(trajectory, model)
    put = {
        step: replace(
            checkpoint, parameters={name: weights[name] for name in checkpoint.parameters}
        )
        for step, checkpoint in bare.checkpoints.items()
    }
    return replace(bare, checkpoints=put)
