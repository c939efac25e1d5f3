"""``tda check``."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from tda_lightning.attribution.matching import require_same_data
from tda_lightning.attribution.module import AttributionModule
from tda_lightning.cli.command import clear_errors, required
from tda_lightning.cli.question_guide import question_guide
from tda_lightning.cli.recorded_run import Replayable
from tda_lightning.estimators import Source
from tda_lightning.evaluation import Smoothness, smoothness
from tda_lightning.evaluation.retraining import ROUNDING
from tda_lightning.records.errors import NonFiniteError, UnsupportedTrainingError


@clear_errors
def check(config: DictConfig) -> None:
    """Show whether gradients are exact, the run can be replayed, and derivatives can be trusted."""
    folder = Path(required(config, "trajectory", "tda check trajectory=FOLDER"))
    trajectory, _, _, module, task, train, query = Replayable.load(config, folder)
    AttributionModule(module, trajectory, Source(), task).check(train, query, config.examples)
    try:
        require_same_data(trajectory, train)
        result = smoothness(
            trajectory,
            module,
            task,
            train,
            query,
            directions=config.directions,
            fraction=config.fraction,
            share=config.share,
            seed=config.seed,
            batch_size=config.batch_size,
            together=config.together,
        )
    except (NonFiniteError, UnsupportedTrainingError) as error:
        raise type(error)(
            f"{error} Whether the run is smooth is therefore not known; Source in the averaged "
            "order, influence functions and TracIn need no replay."
        ) from error
    Console().print(
        landing(result.landing_error),
        smoothness_table(result),
        result.advice,
        question_guide(str(folder)),
        sep="\n",
    )


def smoothness_table(result: Smoothness) -> Table:
    """The three agreements with their intervals."""
    table = Table(title=f"Smoothness ({result.replays} replays, {result.seconds:.0f} s)")
    table.add_column("")
    table.add_column("how well the full removal is predicted")
    table.add_column("", justify="right")
    table.add_column("95% interval")
    for name, what, estimate in (
        ("metasmoothness", "signs of weight changes, from half of it", result.metasmoothness),
        ("halfway", "ranks of the queries' changes, from half of it", result.halfway),
        ("near", f"the same, from {result.share:g} of it", result.near),
    ):
        interval = f"{estimate.low:.3f} to {estimate.high:.3f}"
        table.add_row(name, what, f"{estimate.value:.3f}", interval)
    return table


def landing(error: float) -> str:
    """How close a replay with all weights 1 came to the recorded end, in words."""
    if error == 0:
        return "A replay with all weights 1 lands on the recorded end, bit for bit."
    missed = (
        f"A replay with all weights 1 misses the recorded end by {error:.1e} of the way from the "
        "initial weights"
    )
    if error < ROUNDING:
        return (
            f"{missed}. This is rounding error: another device, number of threads or version of "
            "torch, or replays trained together."
        )
    return (
        f"{missed}, so the replay is a different run, and what follows describes that one. Usual "
        "causes: another device than in training, nondeterministic kernels, an unstable run that "
        "amplifies rounding errors, data or transforms that have changed, or random numbers from a "
        "generator other than those of torch, Python and NumPy."
    )
