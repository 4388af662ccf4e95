"""Which sequences a training step sees: a pure function of (seed, step), the same for any number of ranks.

Without weights, every sequence comes once an epoch, in an order that is a keyed permutation of 0 .. n - 1 computed
point by point (a Feistel network with cycle walking). Nothing is stored, so the number of sequences is limited
only by int64.
"""

from collections.abc import Sequence

import numpy as np

from megatron_bliss.data.seeds import derive, hash_positions, uniform
from megatron_bliss.data.shards import ShardRecord
from megatron_bliss.errors import UserError
from megatron_bliss.wording import counted

_ROUNDS = 8

Sample = tuple[int, int]  # (index into the records, sequence id)


def permute(positions: np.ndarray, size: int, seed: int) -> np.ndarray:
    """A permutation of 0 .. size - 1, chosen by `seed`, at some positions: int64, shaped like `positions`."""
    assert size > 0
    half = np.uint64(max((size - 1).bit_length() + 1, 2) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [derive(seed, "permute", turn) for turn in range(_ROUNDS)]
    values = np.array(positions, dtype=np.uint64)
    assert (values < size).all()
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():  # a permutation of 4^half ≥ size numbers, walked until it comes back below `size`
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (hash_positions(key, right) & mask)
        values[outside] = left << half | right
        outside = values >= size
    return values.astype(np.int64)


def shuffled(draws: np.ndarray, size: int, seed: int) -> np.ndarray:
    """What each draw takes of 0 .. size - 1, where every one comes once an epoch, in another order each: int64."""
    places = np.empty_like(draws)
    epochs = draws // size
    for epoch in np.unique(epochs):
        now = epochs == epoch
        places[now] = permute(draws[now] % size, size, derive(seed, "epoch", int(epoch)))
    return places


class SequenceSampler:
    """Draws batches of sequences from some ids of some shards.

    :param ids_by_name: int32 ids by shard name; shards without any are left out.
    :param weights: None: uniform over all sequences, each once an epoch. Else a probability (up to a factor) for each
        record: a draw picks a record by it, then any of its sequences, *with* replacement.
    :raises UserError: if there is nothing to draw from.
    """

    def __init__(
        self,
        records: list[ShardRecord],
        ids_by_name: dict[str, np.ndarray],
        seed: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.records = records
        self._ids = [ids_by_name.get(record.name, np.empty(0, dtype=np.int32)) for record in records]
        self._seed = seed
        counts = np.array([len(ids) for ids in self._ids], dtype=np.int64)
        self._ends = np.cumsum(counts)
        if weights is None:
            self._shares = None
        else:
            assert len(weights) == len(records)
            usable = np.where(counts > 0, np.asarray(weights, dtype=np.float64), 0.0)
            self._shares = np.cumsum(usable / usable.sum()) if usable.sum() > 0 else np.zeros(len(records))
        if not counts.sum() or (self._shares is not None and not self._shares[-1]):
            raise UserError(
                f"no sequence to draw from in {', '.join(record.prefix for record in records) or 'no shard'}; "
                "use a larger pool, fewer rounds or a larger fraction"
            )

    def __len__(self) -> int:
        """Sequences that can be drawn; an epoch when there are no weights."""
        return int(self._ends[-1])

    def batch(self, step: int, size: int) -> list[Sample]:
        """The global batch of a step (0-based), the steps before it being of the same size."""
        draws = np.arange(step * size, (step + 1) * size)
        indices, positions = self._uniform(draws) if self._shares is None else self._weighted(draws, self._shares)
        return [(i, int(self._ids[i][p])) for i, p in zip(indices.tolist(), positions.tolist(), strict=True)]

    def _uniform(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = shuffled(draws, len(self), self._seed)
        indices = np.searchsorted(self._ends, places, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        return indices, places - starts[indices]

    def _weighted(self, draws: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen = uniform(hash_positions(derive(self._seed, "record"), draws)) * shares[-1]
        indices = np.searchsorted(shares, chosen, side="right")
        counts = np.diff(self._ends, prepend=0)[indices]
        places = uniform(hash_positions(derive(self._seed, "sequence"), draws)) * counts
        return indices, places.astype(np.int64)


def share_of_rank(batch: list[Sample], dp_rank: int, dp_size: int) -> list[Sample]:
    """A data-parallel rank's part of a global batch, whose size `dp_size` must divide.

    :raises UserError: if it does not.
    """
    if len(batch) % dp_size:
        raise UserError(
            f"a batch of {counted(len(batch), 'sequence')} cannot be shared by {dp_size} data-parallel ranks; make it "
            f"a multiple of {dp_size}"
        )
    return batch[dp_rank::dp_size]
