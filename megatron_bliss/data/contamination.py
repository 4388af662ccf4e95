"""How much of a validation set stands in the pool, word for word: n-grams of token ids that both have.

All n-grams of the set are looked up, in all of the pool or in evenly spaced blocks of it. N-grams are compared by
64-bit hashes: of a million in the set and a billion in the pool, one in 10^4 runs takes one for another.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from megatron_bliss.data.seeds import derive
from megatron_bliss.data.shards import Shard
from megatron_bliss.data.validation import ValidationSet

LENGTH = 13  # tokens of an n-gram, as in GPT-3's filter
_BLOCK = 1 << 18  # tokens of the pool read at a time
_FACTOR = np.uint64(derive(0, "contamination") | 1)  # of the polynomial that is an n-gram's hash, modulo 2^64


def gram_hashes(tokens: np.ndarray) -> np.ndarray:
    """Of every `LENGTH` successive tokens: uint64 [max(len(tokens) - LENGTH + 1, 0)]."""
    count = max(len(tokens) - LENGTH + 1, 0)
    found = np.zeros(count, dtype=np.uint64)
    for place in range(LENGTH):
        found = found * _FACTOR + tokens[place : place + count].astype(np.uint64) + np.uint64(1)
    return found


def contamination(pool: Sequence[Shard], validation: ValidationSet, max_tokens: int) -> dict[str, int]:
    """What of a validation set is found in the pool.

    :param max_tokens: of the pool that are read; evenly spaced blocks of it where it has more.
    :returns: `num_sequences` of the set, those `with_grams` (long enough to have an n-gram), those `found` (more than
        half of their n-grams are in what was read), `read_tokens` of `pool_tokens`.
    """
    shard = validation.shard
    grams = [gram_hashes(shard[index]) for index in range(len(shard))]
    owners = np.repeat(np.arange(len(grams)), [len(part) for part in grams])
    known, places = np.unique(np.concatenate(grams), return_inverse=True)
    is_found = np.zeros(len(known), dtype=bool)
    read_tokens = 0
    for block in _blocks(pool, max_tokens) if len(known) else ():
        read_tokens += len(block)
        hashes = gram_hashes(block)
        at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        is_found[at[known[at] == hashes]] = True
    totals = np.bincount(owners, minlength=len(grams))
    found = np.bincount(owners, weights=is_found[places], minlength=len(grams))
    return {
        "num_sequences": len(grams),
        "with_grams": int((totals > 0).sum()),
        "found": int((found > totals / 2).sum()),
        "read_tokens": read_tokens,
        "pool_tokens": sum(part.num_tokens for part in pool),
    }


def contaminated_share(found: Mapping[str, int]) -> float | None:
    """Of the set, in the whole pool: what was found, by the share of the pool that was read.

    :param found: what `contamination` returned.
    :returns: None where less than two sequences were found.
    """
    if found["found"] < 2:
        return None
    return min(found["found"] / found["num_sequences"] * found["pool_tokens"] / found["read_tokens"], 1.0)


def _blocks(pool: Sequence[Shard], max_tokens: int) -> Iterator[np.ndarray]:
    """The pool's tokens in order, or of a larger pool every so manieth block. N-grams across blocks are left out."""
    blocks = [(part, start) for part in pool for start in range(0, part.num_tokens, _BLOCK)]
    stride = max(-(-sum(part.num_tokens for part in pool) // max_tokens), 1)
    for part, start in blocks[::stride]:
        yield part.tokens[start : start + _BLOCK]
