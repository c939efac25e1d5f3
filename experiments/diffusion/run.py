"""The study of diffusion models: minutes on one core.

python -m experiments.diffusion.run outliers --data-root FOLDER
python -m experiments.diffusion.run retrainings --data-root FOLDER
python -m experiments.diffusion.run pictures --data-root FOLDER --epochs 60
python -m experiments.diffusion.table --write
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.diffusion import outliers, pictures, retrainings

RUNS = Path("runs/diffusion")


def main() -> None:
    """The part that is named, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=("outliers", "retrainings", "pictures"))
    parser.add_argument("--data-root", default="data", help="folder of the data sets")
    parser.add_argument("--epochs", type=int, help="default: 12, of retrainings 150")
    parser.add_argument("--diffusers", action="store_true", help="its UNet2DModel, for outliers")
    options = parser.parse_args()
    if options.part in (None, "outliers"):
        name = "outliers_diffusers" if options.diffusers else "outliers"
        outliers.run(options.data_root, RUNS / name, options.epochs or 12, options.diffusers)
    if options.part in (None, "retrainings"):
        retrainings.run(options.data_root, RUNS / "retrainings", options.epochs or 150)
    if options.part in (None, "pictures"):
        pictures.run(options.data_root, RUNS / "pictures", options.epochs or 12)


if __name__ == "__main__":
    main()
