"""Candidates in memory, for tests of the top-k."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_bliss.data.topk import Chunk, Cut, Limits, Passes


@dataclass(frozen=True)
class InMemory:
    """All sequences of a shard are candidates."""

    digest: str
    scores: np.ndarray
    lengths: np.ndarray
    uses: np.ndarray | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.scores)

    def read(self, start: int, stop: int) -> Chunk:
        part = slice(start, stop)
        uses = None if self.uses is None else self.uses[part]
        return Chunk(np.arange(start, stop, dtype=np.int32), self.scores[part], self.lengths[part], uses)


def kept_ids(passes: Passes, cuts: Sequence[Cut]) -> list[list[int]]:
    return [[int(one) for chunk in passes.kept(index, cut) for one in chunk.ids] for index, cut in enumerate(cuts)]


def top_k(shards: Sequence[InMemory], budget: int, threads: int = 1, num_uses: int = 1) -> list[list[int]]:
    """Ids that are kept of each shard, without limits."""
    passes = Passes(shards, [0] * len(shards), num_uses, threads)
    limits = Limits(np.zeros(1, dtype=np.int64), np.full(1, budget))
    return kept_ids(passes, passes.cuts(passes.count(), limits, budget))
