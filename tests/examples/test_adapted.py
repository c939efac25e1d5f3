"""GPT-2 with adapters on a frozen base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tda_lightning.examples.models import AdaptedGPT2

SIZES = {"vocabulary_size": 11, "context": 6, "width": 8, "depth": 1, "heads": 2, "rank": 2}


@pytest.mark.filterwarnings("ignore")
def test_only_adapters_are_trained_and_the_base_is_always_the_same(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = AdaptedGPT2(**SIZES)
    second = AdaptedGPT2(**SIZES)
    frozen = {n: p for n, p in first.named_parameters() if not p.requires_grad}
    others = dict(second.named_parameters())
    assert all(torch.equal(others[name], value) for name, value in frozen.items())
    trained = [n for n, p in first.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert first(torch.arange(6)[None]).shape == (1, 6, 11)
    base = first.model.merge_and_unload()
    base.save_pretrained(tmp_path)
    loaded = AdaptedGPT2(folder=str(tmp_path), rank=2, saved=["lm_head"])
    assert any("modules_to_save" in n for n, p in loaded.named_parameters() if p.requires_grad)
    tokens = torch.arange(6)[None]
    assert torch.allclose(loaded(tokens), base(input_ids=tokens).logits, atol=1e-6)
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        AdaptedGPT2(folder=str(tmp_path / "none"))
