"""Rank correlation."""

import math
from collections.abc import Sequence

import numpy as np


def spearman(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float | None:
    """Rank correlation (ties share their mean rank); None where a side has fewer than two different values."""
    assert len(first) == len(second)
    if len(np.unique(first)) < 2 or len(np.unique(second)) < 2:
        return None
    one, other = (_ranks(values) for values in (first, second))
    one, other = one - one.mean(), other - other.mean()
    return float((one * other).sum() / math.sqrt((one**2).sum() * (other**2).sum()))


def _ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """From 1, ties at their mean: float64 [n]."""
    _, places, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: np.ndarray = (ends - (counts - 1) / 2)[places]
    return ranks
