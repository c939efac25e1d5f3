"""A search finds the best rows, in order, whatever the blocks."""

import numpy as np
import torch

from tda_lightning.index.best import Best


def test_of_equal_rows_the_first_is_named():
    """Every score is there five times."""
    values = torch.arange(40.0).repeat_interleave(5)[None] % 17
    for block in (1, 3, 64, 200):
        best = Best(1, 7, torch.float32)
        for first in range(0, 200, block):
            best.add(values[:, first : first + block], first)
        order = np.lexsort((np.arange(200), -values[0].numpy()))[:7]
        assert best.helping[1][0].tolist() == order.tolist()
        order = np.lexsort((np.arange(200), values[0].numpy()))[:7]
        assert best.hurting[1][0].tolist() == order.tolist()
