"""95% intervals of shares and of areas under curves, from their values and counts alone."""

from __future__ import annotations

NORMAL = 1.959964  # the 97.5% quantile


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Of a share of ``count`` independent cases (Wilson, 1927).

    Example:
        >>> [round(end, 3) for end in share_interval(0.5, 24)]
        [0.314, 0.686]
        >>> share_interval(0.0, 24)[0]
        0.0
    """
    tail = NORMAL**2 / count
    middle = (share + tail / 2) / (1 + tail)
    half = (tail * share * (1 - share) + tail**2 / 4) ** 0.5 / (1 + tail)
    return max(0.0, middle - half), min(1.0, middle + half)


def area_interval(area: float, positives: int, negatives: int) -> tuple[float, float]:
    """Of an area under the ROC curve (Hanley and McNeil, 1982, Radiology 143:29).

    Example:
        >>> [round(end, 3) for end in area_interval(0.9, 30, 270)]
        [0.825, 0.975]
    """
    above, below = area / (2 - area), 2 * area**2 / (1 + area)
    spread = area * (1 - area) + (positives - 1) * (above - area**2)
    spread += (negatives - 1) * (below - area**2)
    half = NORMAL * (spread / (positives * negatives)) ** 0.5
    return max(0.0, area - half), min(1.0, area + half)
