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

import fsspec
import hydra
import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from experiments.index_scale.scan import chunks_of, scan
from tda_lightning.cli.retraining_cache import parse_part

CONF = str(Path(__file__).parent / "conf")


@hydra.main(version_base="1.3", config_path=CONF, config_name="part")
def main(config: DictConfig) -> None:
    """Search this part of the shards and write what was found."""
    torch.set_num_threads(config.threads)
    search(config.shards, config.output, config.part, config.queries, config.kind, config.k)


def search(shards: str, output: str, part: str, queries: str, kind: str, k: int) -> None:
    """Search a part of the shards; the arguments are the settings of ``conf/part.yaml``."""
    with fsspec.open(queries, "rb") as file:
        asked = torch.from_numpy(np.load(io.BytesIO(file.read()))).float()
    number, count = parse_part(part) or (1, 1)
    type_ = getattr(torch, kind)
    began = time.perf_counter()
    found = scan(chunks(shards, asked.shape[1], type_, number, count), asked, k)
    seconds = time.perf_counter() - began
    written = io.BytesIO()
    np.savez(
        written,
        values=found.values.numpy(),
        indices=found.indices.numpy(),
        seconds=seconds,
        bytes=found.rows * row_bytes(asked.shape[1], type_),
    )
    system, root = fsspec.core.url_to_fs(output)
    system.makedirs(root, exist_ok=True)
    system.pipe(f"{root}/part-{number}-of-{count}.npz", written.getvalue())
    print(f"Part {number} of {count}: {found.rows} rows in {seconds:.2f} s")


def row_bytes(width: int, kind: torch.dtype) -> int:
    """Bytes of one example: its coordinates, and a scale where they are int8."""
    return width * kind.itemsize + 4 * (kind == torch.int8)


def chunks(
    folder: str, width: int, kind: torch.dtype, number: int, count: int
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """The rows of every ``count``-th shard of a folder, from the ``number``-th on.

    Shards are named by the index of their first row: ``00000000.rows``.
    """
    system, root = fsspec.core.url_to_fs(folder)
    names = sorted(system.glob(f"{root}/*.rows"))
    size = row_bytes(width, kind)
    for name in names[number - 1 :: count]:
        first = int(Path(name).stem)
        rows = system.size(name) // size
        with system.open(name, "rb", block_size=1 << 24, cache_type="readahead") as file:
            # On a local disk past Python's own buffer, which would copy everything once more.
            raw = getattr(file, "raw", file)
            for start, own, scales in chunks_of(raw, width, kind, (0, rows)):
                yield first + start, own, scales


if __name__ == "__main__":
    main()
