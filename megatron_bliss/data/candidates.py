"""A shard's candidates for a selection, read a chunk at a time: ids of the slice, lengths, scores, earlier uses."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_bliss.data.ledger import Ledger
from megatron_bliss.data.seeds import derive, hash_positions
from megatron_bliss.data.shards import ShardRecord, read_lengths
from megatron_bliss.data.topk import Chunk
from megatron_bliss.errors import UserError


@dataclass(frozen=True)
class Filters:
    """Which lengths may be candidates, in tokens."""

    min_length: int = 0
    max_length: int | None = None

    def accepts(self, lengths: np.ndarray) -> np.ndarray:
        """bool, shaped like `lengths`."""
        return (lengths >= self.min_length) & (lengths <= (self.max_length or np.iinfo(np.int32).max))


@dataclass(frozen=True)
class ShardCandidates:
    """`topk.Candidates` of one shard of a pool."""

    record: ShardRecord
    wanted: Callable[[tuple[int, int]], np.ndarray]  # ids of the slice in a span: int32 ascending
    scores: Callable[[np.ndarray], np.ndarray]  # of ids: float32, as compared before noise
    filters: Filters
    ledger: Ledger
    temperature: float  # of the Gumbel noise; 0: none
    seed: int  # of the noise

    @property
    def digest(self) -> str:
        return self.record.digest

    @property
    def num_sequences(self) -> int:
        return self.record.num_sequences

    def read(self, start: int, stop: int) -> Chunk:
        """:raises UserError: if a candidate has no score, or one that is not a number."""
        ids = self.wanted((start, stop))
        lengths = read_lengths(self.record.prefix, start, stop)[ids - start]
        accepted = self.filters.accepts(lengths)
        if not accepted.all():
            ids, lengths = ids[accepted], lengths[accepted]
        scores = self.scores(ids)
        if np.isnan(scores).any():
            raise UserError(
                f"sequence {ids[np.isnan(scores)][0]} of shard {self.record.prefix} has a score that cannot be "
                "compared (is the median infinite?); look at the scores and run the score stage again"
            )
        if self.temperature:
            scores = self._perturbed(scores, ids)
        uses = self.ledger.uses(self.record, start, stop)[ids - start] if self.ledger.num_rounds else None
        return Chunk(ids, scores, lengths, uses)

    def _perturbed(self, scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """score / temperature + Gumbel noise: float32. The best k of these are a draw of k sequences one after the
        other, each with a chance in proportion to exp(score / temperature) (Kool et al., arXiv 1903.06059)."""
        hashes = hash_positions(derive(self.seed, "gumbel", self.record.digest), ids)
        uniform = ((hashes >> np.uint64(12)) + 0.5) * 2.0**-52  # inside (0, 1)
        noise = -np.log(-np.log(uniform))
        with np.errstate(over="ignore"):
            return (scores / np.float64(self.temperature) + noise).astype(np.float32)
