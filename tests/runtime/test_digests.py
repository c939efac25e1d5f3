"""Digests are compared with recorded ones, so what they return is pinned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tda_lightning
from tda_lightning.records.trajectory import ParameterFact
from tda_lightning.runtime.digests import digest, integer_digest, source_digest
from tests.runs import Numbered

RECORDED = [
    (torch.arange(6.0).reshape(2, 3), "dbabb2bd52b2a80e"),
    (torch.tensor([1.5, -2.0], dtype=torch.bfloat16), "14e05b490afb1602"),
    (np.arange(3, dtype=np.int32), "476c04867621e8a6"),
    (["text", b"bytes", 1, 2.5, None, True], "c77c221fdb29bc60"),
    ({"a": (1, 2), "b": {3, 4}}, "904ce70e4647b88c"),
    (ParameterFact((2, 3), "float32", 0), "22370a2336715542"),
]


@pytest.mark.parametrize(("value", "expected"), RECORDED, ids=lambda value: type(value).__name__)
def test_a_digest_is_what_earlier_releases_recorded(value: Any, expected: str) -> None:
    assert digest(value)[:16] == expected
    assert len(digest(value)) == 64


def test_the_digest_of_classes_is_what_ground_truths_recorded() -> None:
    assert integer_digest(torch.tensor([1, 2, 3])) == -5405627362230748553


def test_source_code_has_a_digest() -> None:
    code = source_digest(Numbered)
    assert code is not None
    assert len(code) == 16
    assert code != source_digest(ParameterFact)
    assert source_digest(type("Made", (), {})) is None


def test_no_other_module_hashes() -> None:
    root = Path(tda_lightning.__file__).parent
    hashing = [p.relative_to(root) for p in root.rglob("*.py") if "hashlib" in p.read_text()]
    assert [str(path) for path in hashing] == ["runtime/digests.py"]
