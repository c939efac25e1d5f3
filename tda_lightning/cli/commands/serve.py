"""``tda serve``."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from tda_lightning.attribution.module import AttributionModule
from tda_lightning.cli.command import clear_errors, required
from tda_lightning.cli.recorded_run import load_parts, load_recorded, sources
from tda_lightning.cli.run_config import run_configuration
from tda_lightning.cli.trainers import configured_trainer
from tda_lightning.exports.packages import needed
from tda_lightning.index import AttributionIndex
from tda_lightning.index.estimator_record import estimator_of
from tda_lightning.measurements.words import class_number
from tda_lightning.serve import Limits
from tda_lightning.serve.access import read_token
from tda_lightning.serve.application import EXTRA
from tda_lightning.serve.searching import IndexSearcher
from tda_lightning.serve.server import serve as serve_until_stopped
from tda_lightning.serve.service import Service
from tda_lightning.store.layout import INDEX_FILE


@clear_errors
def serve(config: DictConfig) -> None:
    """Answer over HTTP which training examples caused what a model does."""
    for package in ("fastapi", "uvicorn"):
        needed(package, EXTRA, "tda serve")
    folder = Path(required(config, "trajectory", "tda serve FOLDER"))
    limits = Limits(**OmegaConf.to_container(config.limits, resolve=True))  # type: ignore[arg-type]
    token = read_token(config.host, config.token_file)
    path = _index_folder(folder, config.index)
    built_with = estimator_of(str(AttributionIndex.open(path).provenance.get("estimator")))
    run = load_recorded(folder)
    data, module, task = load_parts(config, run_configuration(config, folder))
    attribution = AttributionModule(module, run, built_with, task)
    train, queries = sources(data, config.batch_size)
    index = AttributionIndex.open(path, attribution, train)
    trainer = configured_trainer(config.trainer)
    service = Service(
        folder.absolute().name,
        data,
        IndexSearcher(index, queries, config.batch_size, trainer),
        {"index": f"{type(built_with).__name__}, {index.bytes_per_example} bytes an example"},
        limits,
        lambda name, word: class_number(name, word, data),
    )
    serve_until_stopped(service, config.host, config.port, token)


def _index_folder(run: Path, given: str | None) -> Path:
    """The index that is served: the one that is named, or the only one of the run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.
    """
    if given is not None:
        return Path(given)
    found = sorted(path.parent for path in (run / "index").glob(f"**/{INDEX_FILE}"))
    if not found:
        raise FileNotFoundError(
            f"{run} has no index. Build one first: tda index {run}; or say where it is with "
            "index=FOLDER."
        )
    if len(found) > 1:
        raise ValueError(
            f"{run} has {len(found)} indices. Choose one with index=FOLDER: "
            f"{', '.join(map(str, found))}."
        )
    return found[0]
