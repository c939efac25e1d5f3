"""Training losses and measurements of single examples."""

from tda_lightning.runtime.silence import silenced
from tda_lightning.tasks.base import AttributionTask
from tda_lightning.tasks.classification import ClassificationTask
from tda_lightning.tasks.diffusion import DiffusionTask
from tda_lightning.tasks.example_seeds import MEASURED_SEED, numbered_draw, seeded_examples
from tda_lightning.tasks.gauss_newton import gauss_newton_losses, sampled_gauss_newton_loss
from tda_lightning.tasks.graphs import GraphTask
from tda_lightning.tasks.language_modeling import LanguageModelingTask
from tda_lightning.tasks.node_batch import NodeBatch, Nodes
from tda_lightning.tasks.nodes import NodeTask
from tda_lightning.tasks.plain_step import run_training_step
from tda_lightning.tasks.regression import RegressionTask
from tda_lightning.tasks.step_noise import noise_of, restarted_by, watching_noise
from tda_lightning.tasks.training_step import TrainingStepTask


def as_task(task: AttributionTask | None) -> AttributionTask:
    """The task itself; None stands for the module's own ``training_step``."""
    if task is None:
        return TrainingStepTask()
    if not isinstance(task, AttributionTask):
        raise TypeError(
            "Expected task to be an AttributionTask or None (the module's own training_step), "
            f"got {type(task).__name__}. Subclass AttributionTask and define train_loss."
        )
    return task


__all__ = [
    "MEASURED_SEED",
    "AttributionTask",
    "ClassificationTask",
    "DiffusionTask",
    "GraphTask",
    "LanguageModelingTask",
    "NodeBatch",
    "NodeTask",
    "Nodes",
    "RegressionTask",
    "TrainingStepTask",
    "as_task",
    "gauss_newton_losses",
    "noise_of",
    "numbered_draw",
    "restarted_by",
    "run_training_step",
    "sampled_gauss_newton_loss",
    "seeded_examples",
    "silenced",
    "watching_noise",
]
