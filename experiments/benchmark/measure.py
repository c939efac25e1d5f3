"""One job in a process of its own: wall and processor time, peak memory above that before the job,
and the scores.

python -m experiments.benchmark.measure mlp ekfac kronfluence TRAJECTORY OUTPUT
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import torch


def peak_bytes() -> int:
    """The most memory this process has held so far (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work")
    parser.add_argument("job")
    parser.add_argument("library")
    parser.add_argument("trajectory", type=Path)
    parser.add_argument("output", type=Path, help="the scores, written by torch.save")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)

    from experiments.benchmark.libraries import JOBS
    from experiments.benchmark.works import WORKS

    work = WORKS[arguments.work].scaled(arguments.scale)
    with tempfile.TemporaryDirectory() as temporary:
        # A copy, so that curvature kept by an earlier process is not found.
        folder = Path(shutil.copytree(arguments.trajectory, Path(temporary) / "trajectory"))
        job = JOBS[arguments.job, arguments.library](work, folder)
        before = peak_bytes()
        began, busy = time.perf_counter(), time.process_time()
        scores = job()
        found = {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - busy,
            "bytes": peak_bytes() - before,
        }
    torch.save(scores.detach().clone(), arguments.output)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
