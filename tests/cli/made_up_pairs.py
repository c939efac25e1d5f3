"""A few made-up pairs of sentences, and a tiny encoder on them."""

import gzip
import random
from pathlib import Path

TINY = [
    "experiment=mnli_encoder",
    "name=pairs",
    "data.root=.",
    "data.holdout=6",
    "data.num_query=null",
    "data.num_train=20",
    "data.sequence_length=8",
    "data.min_count=1",
    "data.batch_size=8",
    "model.network.width=8",
    "model.network.depth=1",
    "model.network.heads=2",
    "recorder.num_checkpoints=2",
]


def write_pairs(folder: Path) -> None:
    """46 pairs in ``folder``, 6 of which are held out."""
    draw = random.Random(0)
    words = ["cat", "dog", "bird", "sat", "ran", "saw", "the", "a", "mat", "rug"]
    rows = ["premise\thypothesis\tgold_label"]
    for _ in range(46):
        sides = [" ".join(draw.choices(words, k=3)) for _ in range(2)]
        rows.append("\t".join([*sides, draw.choice(["entailment", "neutral"])]))
    (folder / "mnli").mkdir()
    with gzip.open(folder / "mnli" / "dev_matched.tsv.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(rows) + "\n")
