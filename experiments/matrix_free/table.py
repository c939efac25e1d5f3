"""LDS, products and processor time of SOURCE with EK-FAC and without a matrix, as markdown.

python experiments/matrix_free/table.py runs/matrix_free/digits_smooth runs/matrix_free/wikitext2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

TITLES = {
    "source_blocks": "EK-FAC blocks",
    "source": "EK-FAC behind 64 leading directions",
    "matrix_free_layer": "matrix-free, layers",
    "matrix_free_full": "matrix-free, full",
}


def main() -> None:
    """One table for each study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="what experiments/lds wrote")
    for folder in parser.parse_args().folders:
        print_study(json.loads((folder / "results.json").read_text()))


def print_study(found: dict[str, Any]) -> None:
    """Estimators down."""
    config = found["config"]
    heads = [
        f"{config['name']}, {config['fraction']:.0%} kept",
        "LDS",
        "processor seconds",
        "products for each query",
        "walks over the training set",
        "largest relative error",
    ]
    print(f"\n| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    for name, title in TITLES.items():
        if name not in found["lds"]:
            continue
        value, low, high = found["lds"][name]
        cells = [f"{value:.3f} [{low:.3f}, {high:.3f}]", f"{found['processor_seconds'][name]:.1f}"]
        about = found["matrix_free"].get(name)
        if about is None:
            cells += ["-"] * 3
        else:
            cells += [
                f"{about['products'] / config['data']['num_query']:.0f}",
                str(about["walks_over_training_set"]),
                f"{about['relative_error']['max']:.1e}",
            ]
        print(f"| {title} | {' | '.join(cells)} |")
    for pair, (value, low, high) in found["gaps"].items():
        first, _, second = pair.partition(" - ")
        if first in TITLES and second in TITLES:
            print(f"\n{TITLES[first]} less {TITLES[second]}: {value:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
