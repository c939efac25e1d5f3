"""GPT-2 of ``transformers`` with low-rank adapters of peft on frozen weights.

Needs the extras ``huggingface`` and ``lora``. Nothing is downloaded: the base has random weights of
a stated size, or is a checkpoint in a local folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class AdaptedGPT2(nn.Module):
    """Logits [batch, position, token] of the next token from token numbers [batch, position].

    Args:
        vocabulary_size, context, width, depth, heads: of a base with random weights.
        folder: of a checkpoint of GPT-2 (``config.json``, ``model.safetensors``) in their place.
        rank: of the adapters.
        scale: what an adapter's product is multiplied by is ``scale`` / ``rank``.
        targets: layers with an adapter, by the ends of their names.
        saved: modules that are trained as a whole besides (peft's ``modules_to_save``).
        seed: draws the base's random weights: the same whoever builds the model.

    Raises:
        ImportError: transformers or peft is not installed.
        FileNotFoundError: ``folder`` holds no checkpoint.
    """

    def __init__(
        self,
        vocabulary_size: int = 2048,
        context: int = 64,
        width: int = 128,
        depth: int = 3,
        heads: int = 4,
        folder: str | None = None,
        rank: int = 4,
        scale: float = 8.0,
        targets: Sequence[str] = ("c_attn", "c_fc", "c_proj"),
        saved: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, extra in (("transformers", "huggingface"), ("peft", "lora")):
            if find_spec(name) is None:
                raise ImportError(
                    f"GPT-2 with adapters needs {name}, which is not installed. "
                    f"Run: pip install 'tda-lightning[{extra}]'"
                )
        peft: Any = import_module("peft")
        sizes = (vocabulary_size, context, width, depth, heads)
        base = _random_base(*sizes, seed) if folder is None else _saved_base(folder)
        adapters = peft.LoraConfig(
            r=rank,
            lora_alpha=scale,
            target_modules=list(targets),
            modules_to_save=list(saved) or None,
            fan_in_fan_out=True,
        )
        self.model = peft.get_peft_model(base, adapters)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def _random_base(
    vocabulary_size: int, context: int, width: int, depth: int, heads: int, seed: int
) -> Any:
    transformers: Any = import_module("transformers")
    config = transformers.GPT2Config(
        vocab_size=vocabulary_size,
        n_positions=context,
        n_embd=width,
        n_layer=depth,
        n_head=heads,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",  # the fused kernels have no second derivative
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.GPT2LMHeadModel(config)


def _saved_base(folder: str) -> Any:
    transformers: Any = import_module("transformers")
    place = Path(folder)
    if not (place / "config.json").is_file():
        raise FileNotFoundError(
            f"{place} holds no config.json. Expected a checkpoint of GPT-2 on this machine, as "
            "save_pretrained(FOLDER) writes it; nothing is downloaded."
        )
    return transformers.GPT2LMHeadModel.from_pretrained(
        str(place),
        local_files_only=True,
        use_safetensors=True,
        attn_implementation="eager",
    ).float()
