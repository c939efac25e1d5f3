"""Scores as a pandas table or a Parquet file."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from tda_lightning.exports.long_rows import long_rows, require_positive
from tda_lightning.exports.packages import needed
from tda_lightning.records.scores import Scores
from tda_lightning.store.atomic_write import make_folder, replacing

if TYPE_CHECKING:
    import pandas

_ROWS = 1 << 20  # of a Parquet row group, about


def to_pandas(scores: Scores, k: int | None = None) -> pandas.DataFrame:
    """See :meth:`tda_lightning.Scores.to_pandas`."""
    package = needed("pandas", "pandas", "to_pandas")
    frame: pandas.DataFrame = package.DataFrame(long_rows(scores, range(len(scores)), k))
    frame.attrs.update(scores.provenance)
    return frame


def to_parquet(
    scores: Scores, path: str | PathLike[str], k: int | None = None, overwrite: bool = False
) -> None:
    """See :meth:`tda_lightning.Scores.to_parquet`. The provenance is JSON in the file's metadata,
    under ``tda_lightning``."""
    arrow = needed("pyarrow", "pandas", "to_parquet")
    writing = needed("pyarrow.parquet", "pandas", "to_parquet")
    require_positive(k)
    target = Path(path)
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"{target} exists and is kept. Choose another path, or replace it with overwrite=True."
        )
    each = scores.num_scored if k is None else min(2 * k, scores.num_scored)
    group = max(1, _ROWS // max(1, each))
    schema = arrow.Table.from_pydict(long_rows(scores, range(0), k)).schema.with_metadata(
        {"tda_lightning": json.dumps(scores.provenance, default=str)}
    )
    make_folder(target.absolute().parent)
    with replacing(target) as part, writing.ParquetWriter(part, schema) as file:
        for first in range(0, len(scores), group):
            rows = long_rows(scores, range(first, min(first + group, len(scores))), k)
            file.write_table(arrow.Table.from_pydict(rows, schema=schema))
