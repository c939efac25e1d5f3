"""``tda report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tda_lightning.cli.command import clear_errors, not_null, required
from tda_lightning.cli.run_config import FILE_NAME, run_configuration, run_folder
from tda_lightning.records.data_module import Grouped
from tda_lightning.records.provenance import Provenance, well_formed
from tda_lightning.records.scores import Scores
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.report import write_report
from tda_lightning.store.ensemble_file import is_ensemble
from tda_lightning.store.layout import FACTS_FILE


@clear_errors
def report(config: DictConfig) -> None:
    """Write an HTML page that shows a file of scores."""
    source = Path(required(config, "scores", "tda report scores=FILE"))
    scores = Scores.load(source)
    provenance = well_formed(scores.provenance)
    folder = _scored_trajectory(config, source, provenance)
    trajectory = None if folder is None else Trajectory.load(str(folder))
    examples: dict[str, Any] = {}
    given = config.get("config") is not None
    if folder is not None and (given or (folder / FILE_NAME).is_file()):
        # Data modules are Lightning's; scores alone can be shown without it.
        from tda_lightning.cli.recorded_run import load_data, pool_of

        # The queries are those of the attribution, perhaps fewer or others than were recorded.
        asked = provenance.get("config", {}).get("data", {})
        data = load_data(config, run_configuration(config, folder), not_null(asked))
        examples = {
            "train": data.train_dataset,
            "query": data.query_dataset,
            "render": data.render,
        }
        if (asked_pool := provenance.get("config", {}).get("pool")) is not None:
            pool = pool_of(config, run_configuration(config, folder), asked_pool)
            examples["pool"] = lambda index: pool.data.render(pool.split, index)
        if isinstance(data, Grouped):
            examples["columns"] = data.group_columns("train")
            examples["query_columns"] = data.group_columns("query")
    path = write_report(
        scores,
        config.output or source.with_suffix(".html"),
        trajectory=trajectory,
        queries=None if config.queries is None else list(config.queries),
        k=config.k,
        num_suspects=config.num_suspects,
        title=config.title,
        compare=_others(config.compare),
        max_megabytes=config.max_megabytes,
        **examples,
    )
    print(f"Report: {path}")


def _others(paths: Sequence[str] | None) -> dict[str, Scores]:
    """Scores to compare with, by the names of their files."""
    names = [Path(path).stem for path in paths or []]
    alike = len(set(names)) < len(names)
    return {path if alike else Path(path).stem: Scores.load(path) for path in paths or []}


def _scored_trajectory(config: DictConfig, scores: Path, provenance: Provenance) -> Path | None:
    """The folder of the run that was scored; None where it cannot be found."""
    if config.trajectory is not None:
        return run_folder(Path(config.trajectory))
    named = provenance.get("config", {}).get("trajectory") or provenance.get("trajectory")
    # Beside the scores first: folders are moved as a whole.
    for folder in (scores.absolute().parent.parent, Path(str(named))):
        if (folder / FACTS_FILE).is_file() or is_ensemble(folder):
            return run_folder(folder)
    return None
