"""The best sequences of many shards under a budget of tokens: exact, in two counting passes and without a sort.

The rule. Order all candidates by score, highest first; equal scores by shard digest, then by position in the shard.
Keep the longest beginning of that order whose tokens do not exceed the budget. So either everything is kept, or
kept tokens ≤ budget < kept tokens + tokens of the next sequence. The order the shards are given in does not matter.

A float32 becomes a 32-bit integer of the same order. Tokens are counted by its upper 16 bits, then, inside the one
bucket where the budget runs out, by its lower 16 bits: that gives the score at which it runs out. Memory is two tables
of 65,536 numbers, a chunk, and the answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_CHUNK = 1 << 20
_HALF = 1 << 16


@dataclass(frozen=True)
class Candidates:
    """The candidates of one shard."""

    digest: str  # the shard's
    scores: np.ndarray  # float32 [n], no NaN; ±inf is ordered like a number
    lengths: np.ndarray  # tokens, integers ≥ 0 [n]


@dataclass(frozen=True)
class TopK:
    kept: list[np.ndarray]  # bool [n] for each shard, in the order given
    num_tokens: int
    threshold: float | None  # lowest score that was kept; None: nothing was


def top_k_by_tokens(shards: Sequence[Candidates], budget: int) -> TopK:
    """Keep the highest scores up to `budget` tokens, by the rule above.

    :raises ValueError: if a score is NaN.
    """
    for shard in shards:
        assert shard.scores.dtype == np.float32
        assert shard.scores.shape == shard.lengths.shape
    high, below = _where_budget_ends(_tokens_by_bits(shards, high=None), budget)
    if high is None:
        kept = [np.ones(len(shard.scores), dtype=bool) for shard in shards]
    else:
        low, rest = _where_budget_ends(_tokens_by_bits(shards, high), below)
        assert low is not None, "the budget ends in this bucket"
        kept = _keep(shards, np.uint32(high * _HALF + low), rest)
    return TopK(
        kept,
        sum(int(shard.lengths[mask].sum(dtype=np.int64)) for shard, mask in zip(shards, kept, strict=True)),
        min((float(s.scores[mask].min()) for s, mask in zip(shards, kept, strict=True) if mask.any()), default=None),
    )


def _ordered_bits(scores: np.ndarray) -> np.ndarray:
    """uint32 that compare as the float32 scores do; -0.0 equals 0.0."""
    if np.isnan(scores).any():
        raise ValueError("a score is NaN")
    bits = (scores + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _chunks(shard: Candidates) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    for start in range(0, len(shard.scores), _CHUNK):
        part = slice(start, start + _CHUNK)
        yield part, _ordered_bits(shard.scores[part]), shard.lengths[part]


def _tokens_by_bits(shards: Sequence[Candidates], high: int | None) -> np.ndarray:
    """int64 [65536]: tokens by the upper half of the bits, or, where the upper half is `high`, by the lower half."""
    tokens = np.zeros(_HALF)  # float64 counts exactly up to 2^53 tokens
    for shard in shards:
        for _, bits, lengths in _chunks(shard):
            if high is None:
                tokens += np.bincount(bits >> 16, weights=lengths, minlength=_HALF)
            else:
                inside = bits >> 16 == high
                tokens += np.bincount(bits[inside] & np.uint32(_HALF - 1), weights=lengths[inside], minlength=_HALF)
    return tokens.astype(np.int64)


def _where_budget_ends(tokens: np.ndarray, budget: int) -> tuple[int | None, int]:
    """From the last entry down: the first that does not fit whole (None: all fit), and what is left for it."""
    used = np.cumsum(tokens[::-1])
    place = int(np.searchsorted(used, budget, side="right"))
    if place == len(tokens):
        return None, budget - int(used[-1])
    return len(tokens) - 1 - place, budget - int(used[place] - tokens[::-1][place])


def _keep(shards: Sequence[Candidates], threshold: np.uint32, rest: int) -> list[np.ndarray]:
    """Masks of all above the threshold and, in the order of ties, of those at it that fit into `rest` tokens."""
    kept = [np.zeros(len(shard.scores), dtype=bool) for shard in shards]
    for index in sorted(range(len(shards)), key=lambda index: shards[index].digest):
        for part, bits, lengths in _chunks(shards[index]):
            ties = np.flatnonzero(bits == threshold)
            used = np.cumsum(lengths[ties], dtype=np.int64)
            num_fitting = int(np.searchsorted(used, rest, side="right"))
            mask = bits > threshold
            mask[ties[:num_fitting]] = True
            kept[index][part] = mask
            if num_fitting < len(ties):
                rest = -1  # the order ends here: a shorter tie further on is not kept
            elif len(ties):
                rest -= int(used[-1])
    return kept
