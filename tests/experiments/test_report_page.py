"""experiments/report_page at toy size."""

from __future__ import annotations

import json
import sys

import pytest

from experiments.report_page import run
from tests.report.browser import opened


def test_a_page_is_opened_and_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened():  # skips where there is no browser
        pass
    monkeypatch.setattr(sys, "argv", ["run", "--examples=50", "--queries=12", "--rounds=1"])
    run.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["examples"] == 50
    assert 0 < found["opens_seconds"] <= found["opens_slowest"]
    assert 0 < found["key_milliseconds"] <= found["key_slowest"]
