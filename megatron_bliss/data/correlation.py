"""Rank correlation, and how far it is to be trusted."""

import math
from collections.abc import Sequence

import numpy as np

from megatron_bliss.data.seeds import hash_positions, uniform


def spearman(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float | None:
    """Rank correlation (ties share their mean rank); None where a side has fewer than two different values."""
    assert len(first) == len(second)
    if len(np.unique(first)) < 2 or len(np.unique(second)) < 2:
        return None
    one, other = (_ranks(values) for values in (first, second))
    one, other = one - one.mean(), other - other.mean()
    return float((one * other).sum() / math.sqrt((one**2).sum() * (other**2).sum()))


def spearman_interval(
    first: np.ndarray, second: np.ndarray, seed: int, level: float = 0.95, num_resamples: int = 1000
) -> tuple[float, float] | None:
    """Where the rank correlation of n pairs lies with probability `level`, by the percentile bootstrap: pairs are drawn
    with replacement, n at a time. None where hardly any draw has one."""
    size = len(first)
    draws = uniform(hash_positions(seed, np.arange(num_resamples * size))).reshape(num_resamples, size)
    chosen = (draws * size).astype(np.int64)
    known = [found for rows in chosen if (found := spearman(first[rows], second[rows])) is not None]
    if len(known) < num_resamples / 2:
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high


def _ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """From 1, ties at their mean: float64 [n]."""
    _, places, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: np.ndarray = (ends - (counts - 1) / 2)[places]
    return ranks
