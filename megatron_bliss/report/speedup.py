"""How much sooner one arm is where another gets: pure functions of loss curves and of scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Speedup:
    """How many times the steps the other arm needs, or has not been enough for."""

    value: float
    lower_bound: bool


def iteration_of_loss(curve: Sequence[tuple[int, float]], loss: float) -> float | None:
    """Where a loss is first reached, or None.

    The curve is made monotone (the best loss so far) and is taken as straight between its points. A loss that its first
    point is already below counts as reached there.

    :param curve: (iteration, loss), iterations ascending.
    """
    best = float("inf")
    previous: tuple[int, float] | None = None
    for iteration, value in curve:
        best = min(best, value)
        if best <= loss:
            if previous is None:
                return float(iteration)
            share = (previous[1] - loss) / (previous[1] - best)
            return previous[0] + share * (iteration - previous[0])
        previous = iteration, best
    return None


def speedup(curve: Sequence[tuple[int, float]], loss: float, reached_at: int, start: int) -> Speedup:
    """Steps of the arm with `curve` until `loss`, divided by the steps of the arm that is there at `reached_at`.

    :param curve: (iteration, loss) of the slower arm, iterations ascending, not empty.
    :param start: iteration from which both are counted, the end of their common warm-up.
    """
    assert curve
    assert reached_at > start
    needed = iteration_of_loss(curve, loss)
    last = curve[-1][0]
    value = ((last if needed is None else needed) - start) / (reached_at - start)
    return Speedup(value, needed is None)


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive outranks a negative, ties counting half (the area under the ROC curve).

    :param positive: scores [n], finite; n and m above 0.
    :param negative: scores [m], finite.
    """
    assert len(positive)
    assert len(negative)
    _, places, counts = np.unique(np.concatenate([positive, negative]), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean_ranks = ends - (counts - 1) / 2  # 1-based
    wins = mean_ranks[places[: len(positive)]].sum() - len(positive) * (len(positive) + 1) / 2
    return float(wins / (len(positive) * len(negative)))
