"""DATE-LM's application tasks (Jiao et al., 2025): their data, their references, their measures.

python -m experiments.judges.date_lm scores.h5 --task filtering --data FOLDER --subset NAME

judges a file of scores, with a row for each reference and a column for each training example, as
DATE-LM does. Data are its published sets (https://huggingface.co/DataAttributionEval) by name, or a
folder with a copy that ``datasets`` wrote, with the splits ``train`` and ``ref``. Its checkpoints
(``DataAttributionEval/Pythia-1b-XSTest-response-Het``, ...) are adapters or models of transformers:
:func:`checkpoint` opens them, from the hub or a folder. Neither is run here: there is no network.
Fields are those that DATE-LM's own evaluation reads.

References:
    | DATE-LM: Data Attribution Evaluation for Large Language Models (Jiao et al., 2025)
    | https://arxiv.org/abs/2507.09424
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tda_lightning import Scores
from tda_lightning.evaluation import average_precision, recall_within, reciprocal_rank

RECALLED, RESAMPLES = 50, 1000


def filtering(values: Tensor, unsafe: Tensor) -> list[float]:
    """Average precision of finding the ``unsafe`` training examples by their mean score over the
    references, its 95% bootstrap interval over references, and the share of unsafe examples.

    DATE-LM joins the points of the curve by straight lines instead, which differs in the third
    digit.

    Args:
        values: scores [reference, train].
        unsafe: bool [train].
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = torch.stack([values.mean(0), *(values[rows].mean(0) for rows in drawn)])
    found = average_precision(means, unsafe).per_query
    low, high = found[1:].quantile(torch.tensor([0.025, 0.975], dtype=found.dtype)).tolist()
    return [float(found[0]), low, high, float(unsafe.double().mean())]


def factual_attribution(values: Tensor, sought: Tensor) -> dict[str, list[float]]:
    """Recall@50 and MRR, with 95% intervals over queries.

    Args:
        values: scores [query, train].
        sought: which training examples hold each query's fact, bool [query, train].
    """
    k = min(RECALLED, values.shape[1])
    measures = {
        f"recall@{RECALLED}": recall_within(values, sought, k),
        "MRR": reciprocal_rank(values, sought),
    }
    return {name: [one.value, one.low, one.high] for name, one in measures.items()}


def load_sets(name: str, subset: str | None) -> tuple[Sequence[Any], Sequence[Any]]:
    """Training examples and references of a published set.

    Args:
        name: on the Hugging Face hub, or a folder written by ``datasets``.
        subset: such as ``XSTest-response-Het``.
    """
    import datasets

    if Path(name).is_dir() and (Path(name) / "dataset_dict.json").is_file():
        found = datasets.load_from_disk(name)
    else:
        found = datasets.load_dataset(name, subset)
    if not {"train", "ref"} <= set(found):
        raise ValueError(f"{name} should have the splits train and ref, it has {', '.join(found)}.")
    return found["train"], found["ref"]


def checkpoint(name: str) -> Any:
    """A published checkpoint with its adapter apart, from the hub or a folder."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    try:
        return AutoPeftModelForCausalLM.from_pretrained(name)
    except ValueError:  # no adapter_config.json: a whole model
        return AutoModelForCausalLM.from_pretrained(name)


def unsafe_examples(train: Sequence[Mapping[str, Any]]) -> Tensor:
    """Which training examples of a toxicity or bias set are unsafe: bool [train]."""
    return torch.tensor([row["type"] == "Unsafe" for row in train])


def stating_the_fact(
    train: Sequence[Mapping[str, Any]], asked: Sequence[Mapping[str, Any]]
) -> Tensor:
    """Which training examples hold each reference's fact: bool [reference, train].

    Of Counterfact those with the reference's true and counterfactual entity, of ftrace those that
    list its first fact.
    """
    if "facts" in asked[0]:
        return torch.tensor([[row["facts"][0] in own["facts"] for own in train] for row in asked])
    keys = ("counterfactual_entity", "true_entity")
    facts = [tuple(row[key] for key in keys) for row in train]
    return torch.tensor(
        [[tuple(row[key] for key in keys) == own for own in facts] for row in asked]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scores", type=Path, help="written by an attribution of the references")
    parser.add_argument("--task", choices=("filtering", "facts"), required=True)
    parser.add_argument("--data", required=True, help="name on the hub, or a folder")
    parser.add_argument("--subset", help="such as XSTest-response-Het")
    options = parser.parse_args()
    train, asked = load_sets(options.data, options.subset)
    values = Scores.load(options.scores).values
    if options.task == "filtering":
        value, low, high, share = filtering(values, unsafe_examples(train))
        print(f"AUPRC {value:.4f} [{low:.4f}, {high:.4f}] (by chance {share:.4f})")
    else:
        for name, (value, low, high) in factual_attribution(
            values, stating_the_fact(train, asked)
        ).items():
            print(f"{name} {value:.4f} [{low:.4f}, {high:.4f}]")


if __name__ == "__main__":
    main()
