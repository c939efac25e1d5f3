"""Classes and tokens that are named by words."""

from __future__ import annotations

from collections.abc import Mapping

from tda_lightning.records.data_module import AttributedData


def class_number(name: str, word: str, data: AttributedData) -> int:
    """The number of a class or token.

    Args:
        name: of the setting that names it, for messages.
        data: whose vocabulary or classes are looked up.

    Raises:
        ValueError: the data have neither, or not this one.
    """
    data.query_dataset  # noqa: B018 (the vocabulary is known once the data are read)
    names = getattr(data, "vocabulary", None) or getattr(data, "classes", None)
    if not names:
        raise ValueError(
            f"measurement.{name}={word!r} is a word, and the data module has neither a vocabulary "
            "nor classes: give the number of the class or token."
        )
    numbers: Mapping[str, int] = {str(word): number for number, word in enumerate(names)}
    if word not in numbers:
        raise ValueError(
            f"measurement.{name}={word!r} is not among the {len(numbers)} words that the model "
            "knows. Give another one, or a number."
        )
    return numbers[word]
