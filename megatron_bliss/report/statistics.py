"""Means, spreads and verdicts over seeds: pure functions."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

BETTER, WORSE, NO_DIFFERENCE, UNKNOWN = "better", "worse", "no difference", "unknown"


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n − 1); None for a single value, which has none."""

    mean: float
    std: float | None
    count: int


def spread(values: Sequence[float]) -> Spread | None:
    """None without values."""
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def verdict(differences: Sequence[float]) -> str:
    """What paired differences of losses say, one a seed, negative where the arm is better than what it is compared to.

    A difference counts if its mean is larger than its spread and all seeds agree on its sign; one seed says nothing.
    """
    found = spread(differences)
    if found is None or found.std is None:
        return UNKNOWN
    agree = all(value < 0 for value in differences) or all(value > 0 for value in differences)
    if not agree or abs(found.mean) <= found.std:
        return NO_DIFFERENCE
    return BETTER if found.mean < 0 else WORSE
