"""experiments/benchmark/gpu.py at toy size, on the CPU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from experiments.benchmark import gpu


@pytest.mark.slow
def test_every_job_is_measured(tmp_path: Path) -> None:
    gpu.main([str(tmp_path / "gpu.json"), "--toy"])
    report = json.loads((tmp_path / "gpu.json").read_text())
    jobs = {(job["work"], job["estimator"], job["precision"]): job for job in report["jobs"]}
    assert len(jobs) == 8 * 3
    for (_, _, precision), job in jobs.items():
        assert job["seconds"] > 0 and job["useful_flops"] > 0
        # TF32 is a GPU's; the CPU's bf16 rounds to three digits.
        assert job["error"] == 0 if precision != "bf16" else 0 < job["error"] < 0.5
        assert all(math.isfinite(v) for v in job.values() if isinstance(v, float))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_without_a_gpu_nothing_is_timed(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path / "gpu.json")])
    assert "no GPU was found" in capsys.readouterr().err
