"""Record the runs that are attributed: python -m experiments.benchmark.record FOLDER [--scale S]"""

from __future__ import annotations

import argparse
import shutil
import warnings
from pathlib import Path

from experiments.benchmark.works import CHECKPOINTS, WORKS, record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=float, default=1.0)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name, work in WORKS.items():
        for count in CHECKPOINTS:
            path = arguments.folder / f"{name}-{count}"
            shutil.rmtree(path, ignore_errors=True)
            record(work.scaled(arguments.scale), path, count)


if __name__ == "__main__":
    main()
