"""Hugging Face checkpoints for classification, read from a local folder.

Needs the extra ``huggingface``. Nothing is downloaded, unpickled or run: weights are safetensors,
the tokenizer is a ``tokenizer.json``, and code in the folder is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Pretrained(nn.Module):
    """A sequence-classification checkpoint, to be trained further as any other network.

    Takes the tokenizer's fields [batch, field, position] of :func:`encode_pairs` and gives logits
    [batch, class].

    Args:
        folder: of the checkpoint: ``config.json``, ``model.safetensors``, ``tokenizer.json``.
        classes: the checkpoint's own labels that make up each class, by their names; None for one
            class per label, in the checkpoint's order. A class of several labels has the sum of
            their probabilities: its logit is the log-sum-exp of theirs.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: no folder is given, the checkpoint has no classification head, or its labels
            are not those in ``classes``.
    """

    def __init__(self, folder: str, classes: Sequence[Sequence[str]] | None = None) -> None:
        super().__init__()
        self.model = load_model(folder)
        self.fields = tuple(load_tokenizer(folder).model_input_names)
        names = self.model.config.id2label
        self.members = None if classes is None else _members(classes, names, folder)

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.dim() != 3 or inputs.shape[1] != len(self.fields):
            raise ValueError(
                f"Expected inputs [batch, field, position] of the fields {', '.join(self.fields)}, "
                f"got the shape {list(inputs.shape)}. Encode with the checkpoint's own tokenizer "
                "(data.tokenizer=FOLDER)."
            )
        given = dict(zip(self.fields, inputs.unbind(1), strict=True))
        logits = self.model(**given).logits
        if self.members is None:
            return logits
        return torch.stack([logits[:, labels].logsumexp(1) for labels in self.members], 1)


def load_model(folder: str) -> Any:
    """The sequence-classification model in ``folder``, in float32 and training mode."""
    place = _folder(folder, ["config.json"])
    if not any((place / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        raise FileNotFoundError(
            f"{place} holds no model.safetensors. Other files of weights are pickles, which are "
            "not read. Convert them once, where you trust them: "
            "model.save_pretrained(FOLDER, safe_serialization=True)."
        )
    model, found = _transformers().AutoModelForSequenceClassification.from_pretrained(
        str(place),
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        # The fused kernels have no second derivative, which Hessian-vector products need.
        attn_implementation="eager",
        output_loading_info=True,
    )
    if found["missing_keys"]:
        raise ValueError(
            f"{place} has no weights for {', '.join(sorted(found['missing_keys']))}, so they would "
            "be random. Expected the checkpoint of a sequence-classification model: fine-tune this "
            "one with a new head first, and save it."
        )
    # A checkpoint comes in its own precision and in eval mode, and Lightning changes neither.
    return model.float().train()


def load_tokenizer(folder: str) -> Any:
    """The tokenizer in ``folder``."""
    place = _folder(folder, ["tokenizer.json"])
    return _transformers().AutoTokenizer.from_pretrained(
        str(place), local_files_only=True, use_fast=True, trust_remote_code=False
    )


def encode_pairs(
    tokenizer: Any, first: Sequence[str], second: Sequence[str], length: int
) -> Tensor:
    """A tokenizer's fields for pairs of sentences, int64 [pair, field, position].

    The fields are those of ``tokenizer.model_input_names``, in this order. Pairs are padded to
    ``length`` tokens; too long ones lose the ends of their sentences, the longer one's first.
    """
    found = tokenizer(
        list(first),
        list(second),
        padding="max_length",
        truncation="longest_first",
        max_length=length,
        return_tensors="pt",
    )
    return torch.stack([found[name] for name in tokenizer.model_input_names], dim=1)


def _members(
    classes: Sequence[Sequence[str]], names: dict[int, str], folder: str
) -> list[list[int]]:
    """Numbers of the checkpoint's labels by class; each label belongs to one."""
    given = [name for labels in classes for name in labels]
    if sorted(given) != sorted(names.values()) or not all(classes):
        raise ValueError(
            f"{folder} has the labels {', '.join(names.values())}. Expected each of them once in "
            f"classes, got {[list(labels) for labels in classes]}."
        )
    number = {name: index for index, name in names.items()}
    return [[number[name] for name in labels] for labels in classes]


def _folder(folder: str, files: Sequence[str]) -> Path:
    if not folder:
        raise ValueError(
            f"Expected the folder of a Hugging Face checkpoint, got {folder!r}. For example: "
            "data.tokenizer=FOLDER"
        )
    place = Path(folder)
    if not place.is_dir():
        raise FileNotFoundError(
            f"{place} is no folder. Expected a Hugging Face checkpoint on this machine; nothing is "
            "downloaded."
        )
    missing = [name for name in files if not (place / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{place} holds no {', '.join(missing)}. Save the checkpoint there with "
            "save_pretrained(FOLDER), of the model and of its (fast) tokenizer."
        )
    return place


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "Hugging Face checkpoints need transformers, which is not installed. "
            "Run: pip install 'tda-lightning[huggingface]'"
        ) from error
    return transformers
