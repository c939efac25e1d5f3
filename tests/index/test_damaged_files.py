"""Damaged files of an index give an error of ours, are named, or leave numbers as they were: no
other exception, no hang, no memory beyond four times the files' size (and a margin).

``TDA_FUZZ_CASES`` and ``TDA_FUZZ_SEED`` are those of ``tests/store/test_fuzz.py``.
"""

import os
import tempfile
import warnings
from pathlib import Path

import pytest

from tda_lightning.index import AttributionIndex
from tda_lightning.records.errors import TrajectoryFormatError
from tests.fuzzing import Case, run_cases
from tests.index.test_attribution_index import build, run_of
from tests.mutations import BYTES, FOLDER
from tests.mutations_hdf5 import CONTENT
from tests.store.test_fuzz import _quick, tell

CASES = int(os.environ.get("TDA_FUZZ_CASES", "136"))
SEED = int(os.environ.get("TDA_FUZZ_SEED", "0"))
MUTATIONS = {**BYTES, **FOLDER, **CONTENT}
REFUSALS = (TrajectoryFormatError, FileNotFoundError, PermissionError)

pytestmark = pytest.mark.filterwarnings("ignore")


def test_damaged_files_are_refused_or_named_or_harmless(tmp_path):
    attribution, train_set, queries = run_of()
    bases, expected = {}, {}
    for kind in ("factors", "leading", "random"):
        options = {"bytes_per_example": 16, "dtype": "int8", "compression": kind}
        index = build(attribution, train_set, tmp_path / kind, **options)
        asked = index.encode(queries)
        bases[kind], expected[kind] = index.path, (asked, index.search_encoded(asked, 10).values)
    for base in bases.values():  # what a lock leaves
        for left in base.glob("recording.*"):
            left.unlink()

    def read(case: Case, folder: Path, victim: Path) -> bool:
        try:
            opened = AttributionIndex.open(folder)
            if opened.damages() or opened.missing():
                return False
            asked, values = expected[case.base]
            found = opened.search_encoded(asked, min(10, opened.num_examples)).values
        except REFUSALS:
            return False
        if case.kind in BYTES:
            assert found.shape == values.shape and (found == values).all()
        return True

    names, folders = list(MUTATIONS), list(bases)
    cases = []
    for number in range(CASES):
        turn, place = divmod(number, len(names))
        kind, base = names[place], folders[(turn + place) % len(folders)]
        cases.append(Case(SEED * 10**6 + number, kind, base, MUTATIONS[kind]))
    with tempfile.TemporaryDirectory(dir=_quick()) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chmod(folder, 0o755)
        outcomes = run_cases(cases, bases, read, Path(folder) / "work")
    print(f"\n{tell(outcomes)}")
    failures = [f"{own.case.name}: {own.verdict}" for own in outcomes if own.failed]
    assert not failures, f"{len(failures)} failed:\n" + "\n".join(failures[:200])
    assert sum(own.verdict == "refused" for own in outcomes) > len(cases) / 3
    assert sum(own.verdict == "accepted" for own in outcomes) > len(cases) / 50
