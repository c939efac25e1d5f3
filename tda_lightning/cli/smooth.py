"""What ``tda check`` says of the replays of a run."""

from __future__ import annotations

from rich.table import Table

from tda_lightning.evaluation import Smoothness

# Above rounding errors, even amplified over a long run.
_ELSEWHERE = 1e-2


def smoothness_table(found: Smoothness) -> Table:
    """The three numbers with their intervals."""
    table = Table(title=f"Smoothness ({found.replays} replays, {found.seconds:.0f} s)")
    table.add_column("")
    table.add_column("how well the whole removal is foretold")
    table.add_column("", justify="right")
    table.add_column("95% interval")
    for name, what, number in (
        ("metasmoothness", "signs of the weights' changes, from half of it", found.metasmoothness),
        ("halfway", "ranks of the queries' changes, from half of it", found.halfway),
        ("near", f"the same, from {found.share:g} of it", found.near),
    ):
        interval = f"{number.low:.3f} to {number.high:.3f}"
        table.add_row(name, what, f"{number.value:.3f}", interval)
    return table


def landing(error: float) -> str:
    """Where the replay of the run as it was has landed, in plain words."""
    if error == 0:
        return "A replay with all weights 1 lands on the recorded end, bit for bit."
    missed = (
        f"A replay with all weights 1 misses the recorded end by {error:.1e} of the way from the "
        "initial weights"
    )
    if error < _ELSEWHERE:
        return (
            f"{missed}: rounding, as of another device, number of threads or version of torch, or "
            "of replays trained together."
        )
    return (
        f"{missed}, so the replay is another run and what follows is about that one. Usual causes: "
        "another device than in training, kernels that are not deterministic, an unstable run "
        "that amplifies rounding, data or transforms that changed, or random numbers of a "
        "generator other than torch's, Python's and NumPy's own."
    )
