"""Exact nearest neighbours of queries among training examples, by torch or by FAISS."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from tda_lightning.runtime.progress import SlowProgress

Search = Callable[[Tensor], Tensor]  # of queries [query, feature], the neighbours of each

METRICS = ("l2", "cosine")
BACKENDS = ("torch", "faiss")
_CHUNK = 1 << 24  # distances in memory at a time


def check_search(metric: str, backend: str) -> None:
    """Refuse unknown metrics and backends, and FAISS where it is not installed."""
    if metric not in METRICS:
        raise ValueError(f"Unknown metric {metric!r}: expected one of {', '.join(METRICS)}.")
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}: expected one of {', '.join(BACKENDS)}.")
    if backend == "faiss" and find_spec("faiss") is None:
        raise ImportError(
            "backend='faiss' needs FAISS, which is not installed: pip install "
            "'tda-lightning[faiss]', or use backend='torch', which finds the same neighbours."
        )


def nearest(
    queries: Tensor,
    train: Tensor,
    k: int,
    metric: str = "l2",
    backend: str = "torch",
    device: torch.device | str = "cpu",
) -> Tensor:
    """The ``k`` training examples nearest to each query, int64 [query, k], the nearest first.

    Args:
        queries: float32 [query, feature].
        train: float32 [train, feature].
        k: at most the number of training examples.
        metric: ``l2``, the Euclidean distance; or ``cosine``, by the largest cosine, which is 0
            for an example whose features are all 0.
        backend: ``torch`` compares in float64; ``faiss`` in float32 on the processor. Both
            look at every example, so they differ by rounding alone.
        device: where torch compares.
    """
    if metric == "cosine":
        queries, train = F.normalize(queries, dim=1), F.normalize(train, dim=1)
    else:
        # It takes no part in differences, and without it fewer digits cancel.
        centre = train.mean(0, dtype=torch.float64).to(train.dtype)
        queries, train = queries - centre, train - centre
    search = (
        _by_faiss(train, k, metric) if backend == "faiss" else _by_torch(train, k, metric, device)
    )
    found = []
    parts = queries.split(max(1, _CHUNK // len(train)))
    with SlowProgress("Nearest neighbours", len(parts)) as progress:
        for part in parts:
            found.append(search(part))
            progress.advance()
    return torch.cat(found)


def _by_torch(train: Tensor, k: int, metric: str, device: torch.device | str) -> Search:
    blocks = train.to(device).split(max(1, _CHUNK // train.shape[1]))

    def distances(queries: Tensor, block: Tensor) -> Tensor:
        """They grow with the distance: [query, block]."""
        rows = block.double()
        products = queries @ rows.T
        return -products if metric == "cosine" else rows.square().sum(1) - 2 * products

    def search(queries: Tensor) -> Tensor:
        points = queries.to(device).double()
        found = torch.cat([distances(points, block) for block in blocks], dim=1)
        # A stable sort, not topk: of equal examples the choice must not depend on the machine.
        return found.sort(dim=1, stable=True).indices[:, :k].cpu()

    return search


def _by_faiss(train: Tensor, k: int, metric: str) -> Search:
    import faiss

    index = (faiss.IndexFlatIP if metric == "cosine" else faiss.IndexFlatL2)(train.shape[1])
    index.add(train.contiguous().numpy())
    return lambda queries: torch.from_numpy(index.search(queries.contiguous().numpy(), k)[1])
