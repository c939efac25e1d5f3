"""``tda export``."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from tda_lightning.cli.command import clear_errors, required
from tda_lightning.records.scores import Scores

_FORMATS = ("parquet", "csv", "nc")
_TABLES = ("pairs", "training")


@clear_errors
def export(config: DictConfig) -> None:
    """Write a file of scores in a form that other tools read."""
    source = Path(required(config, "scores", "tda export scores=FILE"))
    target = _target(config, source)
    kind = target.suffix.removeprefix(".")
    if config.table not in _TABLES:
        raise ValueError(f"table must be one of {', '.join(_TABLES)}, got {config.table!r}.")
    if kind == "nc" and (config.k is not None or config.table != "pairs"):
        raise ValueError("netCDF holds all tensors: leave out k and table, or choose parquet.")
    if config.table == "training" and config.k is not None:
        raise ValueError("k chooses pairs of a query; table=training has a row for each example.")
    if target.exists() and not config.overwrite:
        raise FileExistsError(
            f"{target} exists and is kept. Choose another file with output=FILE, or replace it "
            "with overwrite=true."
        )
    scores = Scores.load(source, mapped=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if kind == "nc":
        scores.to_xarray().to_netcdf(target)
    elif config.table == "pairs" and kind == "parquet":
        scores.to_parquet(target, config.k, config.overwrite)
    else:
        _write_frame(scores, config, target, kind)
    print(f"Exported {scores.num_queries} queries x {scores.num_train} columns: {target}")


def _write_frame(scores: Scores, config: DictConfig, target: Path, kind: str) -> None:
    from tda_lightning.exports import training_table
    from tda_lightning.exports.packages import needed

    if config.table == "pairs":
        frame = scores.to_pandas(config.k)
    else:
        frame = needed("pandas", "pandas", "tda export").DataFrame(training_table(scores))
    if kind == "csv":
        frame.to_csv(target, index=False)
    else:
        needed("pyarrow", "pandas", "tda export")
        frame.to_parquet(target, index=False)


def _target(config: DictConfig, source: Path) -> Path:
    """The file to write, whose ending is one of the forms.

    Raises:
        ValueError: it is not.
    """
    if config.output is not None:
        target = Path(config.output)
        kind = target.suffix.removeprefix(".")
        if config.format not in (None, kind):
            raise ValueError(
                f"output={target} and format={config.format} say different forms: give one of them."
            )
    else:
        kind = config.format or "parquet"
        name = source.stem if config.table == "pairs" else f"{source.stem}-{config.table}"
        target = source.with_name(f"{name}.{kind}")
    if kind not in _FORMATS:
        forms = ", ".join(_FORMATS)
        raise ValueError(f"Expected a form that can be written, one of {forms}; got {kind!r}.")
    return target
