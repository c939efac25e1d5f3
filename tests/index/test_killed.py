"""A process that is killed while it builds or appends leaves an index that the same call completes:
nothing is lost, nothing is there twice. TDA_KILLS=40 is the run by hand."""

import os
import random
import signal
import time

import pytest
from torch.utils.data import TensorDataset

from tda_lightning.index import AttributionIndex
from tests.cases.training import MLP
from tests.index.test_attribution_index import build, folder, run_of

KILLS = int(os.environ.get("TDA_KILLS", "2"))
OPTIONS = {"bytes_per_example": 40, "dtype": "int8", "shard": 1}


def killed(work, seconds):
    """Run ``work`` in a forked child and kill it after so many seconds; whether it had ended."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("what", ["build", "append"])
def test_what_was_killed_is_completed(tmp_path, what):
    attribution, train_set, _ = run_of()
    more = TensorDataset(*MLP.batch(12, seed=3))

    def whole(path):
        index = build(attribution, train_set, path, **OPTIONS)
        if what == "append":
            index.append(more)

    began = time.monotonic()
    whole(tmp_path / "whole")
    duration = time.monotonic() - began
    expected, draw = folder(tmp_path / "whole"), random.Random(0)
    if what == "append":
        build(attribution, train_set, tmp_path / "index", **OPTIONS)
    for number in range(KILLS):
        killed(lambda: whole(tmp_path / "index"), draw.uniform(0, duration))
        if (tmp_path / "index" / "index.h5").exists():
            index = AttributionIndex.open(tmp_path / "index")
            assert not index.damages(), number
            assert index.num_examples in (10, 22)
    whole(tmp_path / "index")
    found = folder(tmp_path / "index")
    left = [name for name in found if name.endswith(".part") or name.startswith("recording.")]
    assert {name: found[name] for name in found if name not in left} == expected
