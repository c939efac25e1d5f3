"""One machine's share of a search over shards, anywhere that fsspec reads.

python -m experiments.index_scale.part shards=FOLDER_OR_URL queries=QUERIES.npy output=FOLDER

By Hydra's launchers this is a search on many machines, with a merge of a few kilobytes at the end;
hydra/launcher is joblib, submitit_slurm or ray:

python -m experiments.index_scale.part --multirun part=1/4,2/4,3/4,4/4 hydra/launcher=ray ...
python -m experiments.index_scale.merge FOLDER
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import h5py
import hydra
import numpy as np
import torch
from omegaconf import DictConfig

from experiments.index_scale.scan import Chunk, Rows, scan
from tda_lightning.cli.retraining_cache import parse_part

CONF = str(Path(__file__).parent / "conf")


@hydra.main(version_base="1.3", config_path=CONF, config_name="part")
def main(config: DictConfig) -> None:
    """Search this part of the shards and write what was found."""
    torch.set_num_threads(config.threads)
    search(config.shards, config.output, config.part, config.queries, config.k)


def search(shards: str, output: str, part: str, queries: str, k: int) -> None:
    """Search a part of the shards; the arguments are the settings of ``conf/part.yaml``."""
    with fsspec.open(queries, "rb") as file:
        asked = torch.from_numpy(np.load(io.BytesIO(file.read()))).float()
    number, count = parse_part(part) or (1, 1)
    began = time.perf_counter()
    found = scan(chunks(shards, number, count), asked, k)
    seconds = time.perf_counter() - began
    written = io.BytesIO()
    np.savez(
        written,
        values=found.values.numpy(),
        indices=found.indices.numpy(),
        seconds=seconds,
        rows=found.rows,
    )
    system, root = fsspec.core.url_to_fs(output)
    system.makedirs(root, exist_ok=True)
    system.pipe(f"{root}/part-{number}-of-{count}.npz", written.getvalue())
    print(f"Part {number} of {count}: {found.rows} rows in {seconds:.2f} s")


def chunks(folder: str, number: int, count: int) -> Iterator[Chunk]:
    """The rows of every ``count``-th shard of an index, from the ``number``-th on."""
    system, root = fsspec.core.url_to_fs(folder)
    for name in sorted(system.glob(f"{root}/shards/*.h5"))[number - 1 :: count]:
        with system.open(name, "rb", block_size=1 << 24, cache_type="readahead") as file:
            # A local file past Python's own buffer, which would copy everything once more.
            yield from rows_of(file).chunks(getattr(file, "raw", file))


def rows_of(file: Any) -> Rows:
    """What an open shard holds (tda_lightning/store/layout.py); its codes are not read yet."""
    with h5py.File(file, "r") as shard:
        codes = shard["codes"]
        return Rows(
            codes.id.get_offset(),
            int(shard.attrs["first"]),
            codes.shape[1],
            {"int8": torch.int8, "float16": torch.float16}[codes.dtype.name],
            torch.from_numpy(shard["scales"][:]),
        )


if __name__ == "__main__":
    main()
