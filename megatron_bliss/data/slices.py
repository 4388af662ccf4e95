"""Which slice of the pool a sequence belongs to: slice 0 is the warm-up's, slice r is round r's, -1 is held out.

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


def slice_numbers(record: ShardRecord, seed: int, num_slices: int, held_out_share: float) -> np.ndarray:
    """Slice of every sequence of a shard: int16 [num_sequences], in -1 .. num_slices - 1.

    :param held_out_share: expected share of the sequences that get -1; a larger share only adds to them.
    """
    numbers = np.empty(record.num_sequences, dtype=np.int16)
    seed = derive(seed, "slices", record.digest)
    for start in range(0, len(numbers), _CHUNK):
        stop = min(start + _CHUNK, len(numbers))
        numbers[start:stop] = _numbers(start, stop, seed, num_slices, held_out_share)
    return numbers


def slice_ids(record: ShardRecord, number: int, seed: int, num_slices: int, held_out_share: float) -> np.ndarray:
    """Ids of a shard's sequences in slice `number`: int32, ascending."""
    numbers = slice_numbers(record, seed, num_slices, held_out_share)
    return np.flatnonzero(numbers == number).astype(np.int32)


@dataclass(frozen=True)
class Slicing:
    """The slices of one run; every stage makes it by `Slicing.of` and so sees the same ones."""

    seed: int
    num_slices: int
    records: list[ShardRecord]  # the pool
    held_out: int  # sequences a domain, expected

    @classmethod
    def of(cls, config: RunConfig, inventory: Inventory) -> "Slicing":
        return cls(config.seed, config.num_slices, inventory.pool, config.data.held_out)

    def held_out_share(self, domain: str) -> float:
        """Share of a domain's sequences that is kept out of every slice, at most 5 %."""
        num_sequences = sum(record.num_sequences for record in self.records if record.domain == domain)
        return min(self.held_out / max(num_sequences, 1), MAX_HELD_OUT_SHARE)

    def ids(self, record: ShardRecord, number: int) -> np.ndarray:
        """Ids of a shard's sequences in a slice: int32, ascending."""
        return slice_ids(record, number, self.seed, self.num_slices, self.held_out_share(record.domain))

    def ids_by_name(self, number: int) -> dict[str, np.ndarray]:
        """Ids of a slice by shard name, for every shard of the pool; some may be empty."""
        return {record.name: self.ids(record, number) for record in self.records}

    def held_out_ids(self, domain: str) -> dict[str, np.ndarray]:
        """Held-out ids by shard name, for the shards of a domain."""
        return {record.name: self.ids(record, HELD_OUT) for record in self.records if record.domain == domain}
