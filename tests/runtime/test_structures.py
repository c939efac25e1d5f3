"""Batches on their way to a GPU, for which a stand-in is enough."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tda_lightning.runtime.structures import moved


def test_batches_go_to_a_gpu_from_page_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda own: calls.append(("pinned", own)) or own)

    def to(own: Tensor, *place: Any, **options: Any) -> Tensor:
        calls.append(("to", (*place, options)))
        return own

    monkeypatch.setattr(Tensor, "to", to)
    inputs, labels, gpu = torch.randn(3, 2), torch.arange(3), torch.device("cuda", 0)
    batch = moved({"inputs": inputs, "more": [labels], "name": "x"}, gpu)
    assert batch["inputs"] is inputs and batch["more"][0] is labels and batch["name"] == "x"
    across = ("to", (gpu, {"non_blocking": True}))
    assert [what for what, _ in calls] == ["pinned", "to"] * 2
    assert calls[1] == calls[3] == across and calls[2][1] is labels
    calls.clear()
    moved(inputs, torch.device("cpu"))
    assert calls == [("to", (torch.device("cpu"), {}))]
