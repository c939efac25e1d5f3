"""Digests of the tokenizers that a training set or a collator holds.

Where texts are tokenized as batches are made, the examples of a data set say nothing of the tokens
that were trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tda_lightning.runtime.digests import digest


def tokenizer_digests(*holders: object) -> list[str]:
    """Digests of the tokenizers among the attributes of ``holders``, the variables that they close
    over and their arguments (``functools.partial``): anything with ``get_vocab``.

    Each is of the vocabulary and the special tokens.
    """
    found: dict[int, Any] = {}
    for holder in holders:
        for value in _held(holder):
            if callable(getattr(value, "get_vocab", None)):
                found[id(value)] = value
    return sorted({_digest(tokenizer) for tokenizer in found.values()})


def _held(holder: Any) -> list[object]:
    values = [holder, *_attributes(holder)]
    owner = getattr(holder, "__self__", None)  # of a bound method
    values += [owner, *_attributes(owner)]
    values += [*getattr(holder, "args", ()), *_values(getattr(holder, "keywords", None))]
    for cell in getattr(holder, "__closure__", None) or ():
        values.append(cell.cell_contents)
    return values


def _attributes(holder: object) -> list[object]:
    return _values(getattr(holder, "__dict__", None))


def _values(mapping: object) -> list[object]:
    return list(mapping.values()) if isinstance(mapping, Mapping) else []


def _digest(tokenizer: Any) -> str:
    special = getattr(tokenizer, "special_tokens_map", {})
    words = sorted((str(word), int(number)) for word, number in tokenizer.get_vocab().items())
    named = sorted((str(name), str(token)) for name, token in dict(special).items())
    return digest([words, named])[:16]
