"""Groups of examples where the data have no column to group by."""

from __future__ import annotations

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor


def feature_clusters(
    train: Tensor, query: Tensor, count: int, seed: int = 0
) -> tuple[list[str], list[str]]:
    """K-means of the training examples' features, and for each query the nearest cluster, such as
    for :func:`tda_lightning.report.interactions`.

    Args:
        train: features [train, feature], such as the inputs of the last layer.
        query: [query, feature].
        count: number of clusters.
        seed: of their first centres.

    Returns:
        The name of each training example's cluster, ``cluster 1`` for the largest, and of each
        query's.

    Raises:
        ValueError: ``count`` is not between 1 and the number of training examples.
    """
    if not 1 <= count <= len(train):
        raise ValueError(f"count must be between 1 and {len(train)}, got {count}.")
    points = train.double().cpu().numpy()
    centres, members = kmeans2(points, count, minit="++", seed=np.random.default_rng(seed))
    distances = torch.cdist(query.double().cpu(), torch.from_numpy(centres))
    order = np.argsort(-np.bincount(members, minlength=count), kind="stable")
    names = {int(place): f"cluster {rank}" for rank, place in enumerate(order, start=1)}
    nearest = distances.argmin(1).tolist()
    return [names[int(place)] for place in members], [names[place] for place in nearest]
