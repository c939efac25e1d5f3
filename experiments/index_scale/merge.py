"""What all parts of a search found, as one: the strongest of their strongest.

python -m experiments.index_scale.merge FOLDER_OR_URL
"""

from __future__ import annotations

import argparse
import io

import fsspec
import numpy as np
import torch

from experiments.index_scale.scan import Strongest


def main() -> None:
    """Print the strongest of each query, and how fast the parts were."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="that the parts were written to")
    options = parser.parse_args()
    found, seconds = merged(options.folder)
    for query, (values, indices) in enumerate(zip(found.values[0], found.indices[0], strict=True)):
        best = ", ".join(f"{i} ({v:.4g})" for i, v in zip(indices.tolist(), values, strict=True))
        print(f"query {query}: {best}")
    print(f"{found.rows:,} rows; the slowest part took {seconds:.2f} s")


def merged(folder: str) -> tuple[Strongest, float]:
    """The strongest of all parts, and the seconds of the slowest one.

    Raises:
        ValueError: a part is missing.
    """
    system, root = fsspec.core.url_to_fs(folder)
    names = sorted(system.glob(f"{root}/part-*-of-*.npz"))
    counts = {name.rpartition("-of-")[2].removesuffix(".npz") for name in names}
    if len(counts) != 1 or len(names) != int(counts.copy().pop()):
        raise ValueError(
            f"{folder} has {len(names)} parts of {' or '.join(sorted(counts)) or 'none'}. Search "
            "all parts of one sweep first."
        )
    parts = []
    for name in names:
        with np.load(io.BytesIO(system.cat(name))) as file:
            parts.append({key: file[key] for key in file})
    _, queries, k = parts[0]["values"].shape
    found = Strongest(queries, k)
    for part in parts:
        found.merge(torch.from_numpy(part["values"]), torch.from_numpy(part["indices"]))
        found.rows += int(part["rows"])
    return found, max(float(part["seconds"]) for part in parts)


if __name__ == "__main__":
    main()
