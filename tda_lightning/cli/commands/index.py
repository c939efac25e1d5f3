"""``tda index``."""

from __future__ import annotations

import time
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from tda_lightning.attribution.module import AttributionModule
from tda_lightning.cli.command import (
    clear_errors,
    estimator_name,
    require_usable_solver,
    required,
)
from tda_lightning.cli.recorded_run import load_parts, load_recorded, pool_of, sources
from tda_lightning.cli.run_config import run_configuration
from tda_lightning.cli.trainers import configured_trainer
from tda_lightning.index import AttributionIndex, SearchResult


@clear_errors
def index(config: DictConfig) -> None:
    """Write the index of a recorded run, or add to it, or search it."""
    folder = Path(required(config, "trajectory", "tda index trajectory=FOLDER"))
    target = Path(config.index or folder / "index" / estimator_name())
    require_usable_solver(config)
    trajectory = load_recorded(folder)
    run_config = run_configuration(config, folder)
    data, module, task = load_parts(config, run_config)
    estimator = instantiate(config.estimator, _convert_="all")
    attribution = AttributionModule(module, trajectory, estimator, task)
    train, query = sources(data, config.batch_size)
    began = time.monotonic()
    made = AttributionIndex.build(
        attribution,
        train,
        target,
        bytes_per_example=config.bytes_per_example,
        part=config.part,
        batch_size=config.batch_size,
        dtype=config.dtype,
        trainer=configured_trainer(config.trainer),
    )
    if config.append is not None:
        pool = pool_of(config, run_config, config.append).dataset
        made.append(train.with_dataset(pool), batch_size=config.batch_size)
    seconds = time.monotonic() - began
    print(
        f"Indexed {made.num_examples} examples in {made.bytes_per_example} bytes each "
        f"({made.provenance['compression']}), {seconds:.1f} s: {target}"
    )
    if missing := made.missing():
        rows = sum(stop - first for first, stop in missing)
        print(f"{rows} of them belong to other parts, which are still to be built.")
    elif config.search:
        k = min(config.k, made.num_examples)
        rerank = min(config.rerank, made.num_examples)
        _show(made.search(query, k, rerank=rerank, batch_size=config.batch_size))


def _show(found: SearchResult) -> None:
    table = Table("query", "proponents", "opponents", title="Best examples, with their scores")
    for query in range(found.num_queries):
        table.add_row(
            str(query),
            _listed(found.indices[query].tolist(), found.values[query].tolist()),
            _listed(found.opponents[query].tolist(), found.opponent_values[query].tolist()),
        )
    Console().print(table)


def _listed(examples: list[int], values: list[float]) -> str:
    return "  ".join(f"{n} ({value:.2g})" for n, value in zip(examples, values, strict=True))
