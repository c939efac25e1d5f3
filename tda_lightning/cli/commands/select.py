"""``tda select``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from tda_lightning.attribution.module import AttributionModule
from tda_lightning.cli.command import clear_errors, require_new, require_usable_solver, required
from tda_lightning.cli.recorded_run import Replayable, pool_of
from tda_lightning.index import AttributionIndex
from tda_lightning.selection import Selection
from tda_lightning.selection import select as choose
from tda_lightning.selection.selection import save_chosen


@clear_errors
def select(config: DictConfig) -> None:
    """Choose examples of a pool by training on them, and write which they are."""
    folder = Path(required(config, "trajectory", "tda select trajectory=FOLDER pool={KEY: VALUE}"))
    required(config, "pool", f"tda select {folder} 'pool={{num_train: null}}'")
    require_usable_solver(config)
    base = Path(config.selection or folder / "selection")
    table, chosen = base.with_name(f"{base.name}.csv"), base.with_name(f"{base.name}.json")
    require_new(config, "a selection, which is kept", "selection=NAME", table, chosen)
    run = Replayable.load(config, folder)
    settings: Any = OmegaConf.to_container(config, resolve=True)
    asked = settings["pool"]
    target = run.query
    if config.target is not None:
        wanted = {"split": "query", **settings["target"]}
        target = run.query.with_dataset(pool_of(config, run.config, wanted).dataset)
    estimator = instantiate(config.estimator, _convert_="all")
    attribution = AttributionModule(run.module, run.trajectory, estimator, run.task)
    index = None
    if config.index is not None:
        index = AttributionIndex.open(config.index, attribution, run.train)
    selection = choose(
        attribution,
        run.train,
        pool_of(config, run.config, asked).dataset,
        replace(target, batch_size=config.batch_size),
        k=config.k,
        steps=config.steps,
        anchors=config.anchors,
        neighbours=config.neighbours,
        replicas=config.replicas,
        rate=config.rate,
        layer=config.layer,
        metric=config.metric,
        seed=config.seed,
        batch_size=config.batch_size,
        index=index,
    )
    selection.write_csv(table)
    save_chosen(selection.indices, selection.num_pool, asked, chosen)
    for note in selection.notes:
        print(note)
    Console().print(_replica_table(selection))
    print(
        f"Chose {len(selection.indices)} of {selection.num_pool} examples of the pool: {table}\n"
        f"Train on them too: tda train ... extra={chosen}"
    )


def _replica_table(selection: Selection) -> Table:
    """What training on the chosen examples did to the target."""
    table = Table(title="Mean measurement of the target (smaller is better)")
    for name in ("replica", "before", "after", "steps", "chosen"):
        table.add_column(name, justify="right")
    for replica, row in enumerate(selection.measurements.tolist()):
        own = [choice for choice in selection.choices if choice.replica == replica]
        steps = max((choice.step for choice in own), default=0)
        distinct = len({choice.index for choice in own})
        table.add_row(str(replica), f"{row[0]:.4g}", f"{row[steps]:.4g}", str(steps), str(distinct))
    return table
