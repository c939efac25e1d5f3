"""TracIn over the recorded checkpoints by captum's TracInCP, for all layers."""

from __future__ import annotations

import sys
import warnings

from torch import Tensor, nn

from experiments.peers import command
from experiments.peers.recorded import Run, open_run
from tda_lightning.optimizers import applied_rates, rule_of
from tda_lightning.records.errors import UnsupportedTrainingError

# Without gradients of a batch at once captum goes back through the whole batch for each example.
SMALL_BATCH = 8


def checkpoint_weights(run: Run) -> dict[int, float]:
    """By step, the sum of the applied rates since the checkpoint before it.

    Raises:
        UnsupportedTrainingError: parameter groups with rates of their own; captum knows one.
    """
    weights = {}
    for start, step in zip([0, *run.steps[:-1]], run.steps, strict=True):
        sums = applied_rates(run.trajectory, slice(start, step)).sum(0)
        if not bool((sums == sums[0]).all()):
            raise UnsupportedTrainingError(
                "captum multiplies a checkpoint by one learning rate, and the parameter groups of "
                f"this run have several. Expected equal sums, got {sums.tolist()} at step {step}."
            )
        weights[step] = float(sums[0])
    return weights


def has_batch_gradients(module: nn.Module) -> bool:
    """Whether captum can take the gradients of a batch at once: Linear and Conv2d alone."""
    holders = [part for part in module.modules() if list(part.parameters(recurse=False))]
    return all(
        type(part) is nn.Linear
        or (
            type(part) is nn.Conv2d
            and part.groups == 1
            and part.padding_mode == "zeros"
            and not isinstance(part.padding, str)
        )
        for part in holders
    )


def tracin(run: Run, batch_size: int, batch_gradients: bool) -> Tensor:
    """Scores [query, train] in our unit: captum's own are N times as large."""
    from captum.influence import TracInCP

    weights = checkpoint_weights(run)

    def load(module: nn.Module, step: int) -> float:
        run.load(step)
        return weights[step]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = run.losses(outputs, targets) / run.scale
        return losses.sum() if batch_gradients else losses

    loss.reduction = "sum" if batch_gradients else "none"  # type: ignore[attr-defined]
    method = TracInCP(
        run.module,
        run.batches(run.train, batch_size),
        run.steps,
        checkpoints_load_func=load,
        loss_fn=loss,
        sample_wise_grads_per_batch=batch_gradients,
    )
    queries = run.batches(run.query, batch_size)
    found = method.influence(queries, show_progress=sys.stderr.isatty())
    run.load(run.trajectory.last_step)
    return found / run.num_train


def main() -> None:
    arguments = command.parser("captum", __doc__, None).parse_args()
    warnings.filterwarnings("ignore")
    files = command.start(arguments)
    run = open_run(arguments.run, arguments.data_root, arguments.device)
    fast = has_batch_gradients(run.module)
    batch_size = arguments.batch_size if fast else min(arguments.batch_size, SMALL_BATCH)
    began = command.Seconds.now()
    values = tracin(run, batch_size, fast)
    seconds = began.passed()
    settings = {
        "checkpoints": run.steps,
        "learning_rates": list(checkpoint_weights(run).values()),
        "sample_wise_grads_per_batch": fast,
        "batch_size": batch_size,
    }
    notes = []
    if not rule_of(run.trajectory).linear:
        notes.append(f"{run.trajectory.facts.optimizer}'s preconditioner is left out.")
    for file in files.values():
        command.save(
            arguments, file, run, values, "captum", "captum TracInCP", seconds, settings, notes
        )


if __name__ == "__main__":
    main()
