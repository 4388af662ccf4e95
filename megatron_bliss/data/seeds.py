"""Where every random draw starts: one derivation of seeds, and one hash that numbers are drawn from.

A draw is a pure function of (seed, what it is for, position), so it is the same on any number of ranks and after any
restart.
"""

import numpy as np

from megatron_bliss.artifacts import digest_bytes

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def derive(seed: int, *parts: str | int) -> int:
    """A seed below 2^63 for one purpose, from the run's seed and the purpose's name, for example
    `derive(config.seed, "bilevel", round_number)`. An int and the str of its digits are different parts."""
    words = [f"{type(part).__name__}:{part}".encode() for part in (seed, *parts)]
    return int(digest_bytes(*words)[:16], 16) >> 1


def hash_positions(seed: int, positions: np.ndarray) -> np.ndarray:
    """SplitMix64's output number `position` from the state `seed`: uint64, shaped like `positions` (integers ≥ 0)."""
    state = np.asarray(positions).astype(np.uint64)
    state += np.uint64(1)
    state *= _GOLDEN
    state += np.uint64(seed)
    for shift, factor in zip((30, 27), _MIX, strict=True):
        state ^= state >> np.uint64(shift)
        state *= factor
    state ^= state >> np.uint64(31)
    return state


def uniform(hashes: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from the upper 53 bits of uint64 hashes."""
    return (hashes >> np.uint64(11)) * 2.0**-53
