"""Damaged files of an index: our error, or numbers that are as they were. TDA_MUTATIONS is a larger
run by hand."""

import os
import random
import shutil

from tda_lightning.index import AttributionIndex
from tda_lightning.records.errors import TrajectoryFormatError
from tests.index.test_attribution_index import build, run_of

MUTATIONS = int(os.environ.get("TDA_MUTATIONS", "120"))


def mutated(content, draw):
    """Some bytes flipped, set, cut off, or copied elsewhere."""
    changed, size = bytearray(content), len(content)
    kind, at = draw.randrange(4), draw.randrange(size)
    if kind == 0:
        for _ in range(draw.choice([1, 1, 4, 64])):
            changed[draw.randrange(size)] ^= 1 << draw.randrange(8)
    elif kind == 1:
        changed[at : at + 8] = draw.choice([b"\x00", b"\xff", b"\x7f"]) * len(changed[at : at + 8])
    elif kind == 2:
        del changed[at:]
    else:
        other = draw.randrange(size)
        changed[at : at + 64] = changed[other : other + 64]
    return bytes(changed)


def test_damaged_files_are_refused_or_harmless(tmp_path):
    attribution, train_set, queries = run_of()
    index = build(attribution, train_set, tmp_path / "index", bytes_per_example=24, dtype="int8")
    asked = index.encode(queries)
    expected = index.search_encoded(asked, 10).values
    files = sorted(file for file in index.path.rglob("*.h5"))
    outcomes = {"refused": 0, "accepted": 0, "named": 0}
    for seed in range(MUTATIONS):
        draw = random.Random(seed)
        victim = draw.choice(files)
        content = victim.read_bytes()
        victim.write_bytes(mutated(content, draw))
        try:
            opened = AttributionIndex.open(index.path)
            if opened.damages() or opened.missing():
                outcomes["named"] += 1
            else:
                found = opened.search_encoded(asked, min(10, opened.num_examples)).values
                assert found.shape == expected.shape and (found == expected).all(), (seed, victim)
                outcomes["accepted"] += 1
        except (TrajectoryFormatError, FileNotFoundError):
            outcomes["refused"] += 1
        finally:
            victim.write_bytes(content)
    assert outcomes["refused"] and outcomes["named"], outcomes
    shutil.rmtree(index.path)
