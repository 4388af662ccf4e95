"""Which slice of the pool a sequence belongs to: slice 0 is the warm-up's, slice r is round r's, -1 is held out.

With `selection.pool: all` every round's slice is all that is not held out; the warm-up's stays a part of it.

The answer is a hash of (seed, shard digest, sequence id), so nothing has to be stored or agreed on.
"""

from dataclasses import dataclass

import numpy as np

from megatron_bliss.config import RunConfig
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.seeds import derive, hash_positions, uniform
from megatron_bliss.data.shards import ShardRecord

HELD_OUT = -1
MAX_HELD_OUT_SHARE = 0.05  # of a domain's sequences
_CHUNK = 1 << 20  # sequences hashed at a time


def _numbers(start: int, stop: int, seed: int, num_slices: int, held_out_share: float) -> np.ndarray:
    hashes = hash_positions(seed, np.arange(start, stop))
    # a second hash, so that the slice of a sequence does not depend on how many are held out
    numbers = (uniform(hash_positions(seed, hashes)) * num_slices).astype(np.int16)
    numbers[uniform(hashes) < held_out_share] = HELD_OUT
    return numbers


def slice_numbers(
    record: ShardRecord, seed: int, num_slices: int, held_out_share: float, span: tuple[int, int] | None = None
) -> np.ndarray:
    """Slice of a shard's sequences: int16 [span, or num_sequences], in -1 .. num_slices - 1.

    :param held_out_share: expected share of the sequences that get -1; a larger share only adds to them.
    :param span: the first id, and the one after the last; None: all.
    """
    first, last = span or (0, record.num_sequences)
    numbers = np.empty(last - first, dtype=np.int16)
    seed = derive(seed, "slices", record.digest)
    for start in range(first, last, _CHUNK):
        stop = min(start + _CHUNK, last)
        numbers[start - first : stop - first] = _numbers(start, stop, seed, num_slices, held_out_share)
    return numbers


@dataclass(frozen=True)
class Slicing:
    """The slices of one run; every stage makes it by `Slicing.of` and so sees the same ones."""

    seed: int
    num_slices: int
    records: list[ShardRecord]  # the pool
    held_out: int  # sequences a domain, expected
    is_shared: bool = False  # every round has the whole pool

    @classmethod
    def of(cls, config: RunConfig, inventory: Inventory) -> "Slicing":
        is_shared = config.selection.pool == "all"
        return cls(config.seed, config.num_slices, inventory.pool, config.data.held_out, is_shared)

    def held_out_share(self, domain: str) -> float:
        """Share of a domain's sequences that is kept out of every slice, at most 5 %."""
        num_sequences = sum(record.num_sequences for record in self.records if record.domain == domain)
        return min(self.held_out / max(num_sequences, 1), MAX_HELD_OUT_SHARE)

    def ids(self, record: ShardRecord, number: int, span: tuple[int, int] | None = None) -> np.ndarray:
        """Ids of a shard's sequences in a slice: int32, ascending.

        :param span: only of those from the first id to before the last.
        """
        share = self.held_out_share(record.domain)
        numbers = slice_numbers(record, self.seed, self.num_slices, share, span)
        inside = numbers != HELD_OUT if self.is_shared and number > 0 else numbers == number
        ids = np.flatnonzero(inside).astype(np.int32)
        return ids + np.int32(span[0]) if span else ids

    def ids_by_name(self, number: int) -> dict[str, np.ndarray]:
        """Ids of a slice by shard name, for every shard of the pool; some may be empty."""
        return {record.name: self.ids(record, number) for record in self.records}

    def held_out_ids(self, domain: str) -> dict[str, np.ndarray]:
        """Held-out ids by shard name, for the shards of a domain."""
        return {record.name: self.ids(record, HELD_OUT) for record in self.records if record.domain == domain}
