"""The gradient engine against plain autograd, on a user's model and data."""

from __future__ import annotations

from dataclasses import replace

from tda_lightning.attribution.graph_sources import by_node
from tda_lightning.attribution.sessions import open_session, sample_batches
from tda_lightning.attribution.stages import StageSetup
from tda_lightning.gradients.check import largest_errors
from tda_lightning.measurements import Measurement
from tda_lightning.records.data_module import require_data_module
from tda_lightning.records.gradient_errors import GradientErrors
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.tasks import seeded_examples


def check_gradients(
    stage: StageSetup,
    train: object,
    query: object,
    examples: int,
    measurement: Measurement | None,
) -> GradientErrors:
    """The largest relative error of each layer, over batches of ``examples`` training examples
    (training loss) and queries (measurement).

    Raises:
        ValueError: the losses do not make up what the training step returns.
    """
    errors = GradientErrors()
    training = ExampleSource.of(train, examples, "training")
    require_data_module(stage.trajectory.facts, training)
    queries = training.others(query, examples, "query")
    ((stage,),), (training,), queries = by_node([[stage]], [training], queries)
    session = open_session(stage, training, queries, self_influence=False, asked=measurement)
    asked = replace(queries, example=session.examples.example).checked(session.module)
    sides = (session.examples, session.train_loss), (asked, session.measurement)
    for source, loss in sides:
        alone = "partners" not in session.noise
        for batch, indices in sample_batches(source, examples, session.module):
            if source is session.examples:
                with seeded_examples(0, indices):
                    session.task.check_losses(session.module, batch)
            found = largest_errors(session.engine, loss, batch, indices, alone)
            for name, error in found.items():
                errors[name] = max(error, errors.get(name, 0.0))
    return errors
