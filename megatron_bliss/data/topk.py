"""The best sequences of many shards under a budget of tokens: exact, in three counting passes and without a sort.

The rule. Order all candidates by how often they were used before, fewest first; then by score, highest first; then by
shard digest and by position in the shard. Without limits, keep the longest beginning of that order whose tokens do not
exceed the budget: either everything is kept, or kept tokens ≤ budget < kept tokens + tokens of the next sequence.

With limits, each group of shards has a smallest and a largest number of tokens. A common end of the order is sought,
the last for which the sum over groups of (tokens before it, raised to the minimum, lowered to the maximum) is within
the budget. A group below its minimum or above its maximum there goes by that number alone: its own longest beginning
within it. All others end at the common end. So kept tokens are exact to one sequence for each group that is held at a
limit, and one more for all others together. The order the shards are given in never matters.

How. A float32 becomes a 32-bit integer of the same order. Tokens are counted by (uses, upper 16 bits), then, for each
group inside the one cell where it ends, by the lower 16 bits, then, at the score that gives, by shard. `_narrow` is the
same search three times. Shards are read a chunk at a time: memory is 2 tables of `num_uses` × 65,536 numbers a group,
and a few chunks a thread.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import numpy as np

CHUNK = 1 << 18  # sequences read at a time
_HALF = 1 << 16
# the upper halves of a float32's bits, from the highest value to the lowest
_DESCENDING = np.concatenate([np.arange(_HALF // 2)[::-1], np.arange(_HALF // 2, _HALF)])
_LOW = np.uint32(_HALF - 1)


@dataclass(frozen=True)
class Chunk:
    """Some candidates of one shard."""

    ids: np.ndarray  # int32 [n] ascending
    scores: np.ndarray  # float32 [n], no NaN; ±inf is ordered like a number
    lengths: np.ndarray  # int32 [n], tokens, ≥ 0
    uses: np.ndarray | None = None  # uint8 [n], how often each was used before; None: never

    def __getitem__(self, part: np.ndarray) -> "Chunk":
        uses = None if self.uses is None else self.uses[part]
        return Chunk(self.ids[part], self.scores[part], self.lengths[part], uses)


class Candidates(Protocol):
    """The candidates of one shard, read as often as they are needed."""

    @property
    def digest(self) -> str:
        """The shard's."""

    @property
    def num_sequences(self) -> int:
        """In the shard, candidates or not."""

    def read(self, start: int, stop: int) -> Chunk:
        """The candidates with ids in [start, stop); from several threads at once."""


@dataclass(frozen=True)
class Limits:
    """What each group may keep: int64 [num_groups], tokens."""

    minimum: np.ndarray
    maximum: np.ndarray


@dataclass(frozen=True)
class Cut:
    """Which candidates of a shard are kept: all used less than `uses` times, and, of those used that often, all above
    `score` and the first of those at it, up to `tie_tokens` tokens (below 0: none)."""

    uses: int
    score: np.float32
    tie_tokens: int


@dataclass(frozen=True)
class Counted:
    """What the first pass found."""

    sequences: np.ndarray  # int64 [num_shards]: candidates
    tokens: np.ndarray  # int64 [num_shards]: of the candidates
    table: np.ndarray  # int64 [num_groups, num_uses × 65536]: tokens, best cell first

    @property
    def available(self) -> np.ndarray:
        """Tokens of candidates used less than `num_uses` times: int64 [num_groups]."""
        return np.asarray(self.table.sum(axis=1))


class Passes:
    """Goes over all chunks of all shards, several at a time.

    :param groups: of each shard, from 0.
    :param num_uses: candidates used that often, or more often, are never kept.
    :param report: called with the number of sequences that have just been read.
    """

    def __init__(
        self,
        shards: Sequence[Candidates],
        groups: Sequence[int],
        num_uses: int = 1,
        threads: int = 1,
        report: Callable[[int], None] = lambda count: None,
    ) -> None:
        assert len(groups) == len(shards)
        self.shards, self.groups, self.num_uses, self.threads = shards, groups, num_uses, threads
        self.num_groups = max(groups) + 1
        self._report = report
        # once a large block was freed, glibc keeps memory for the next chunk instead of asking for fresh pages
        np.empty(31 << 20, dtype=np.uint8)

    def count(self) -> Counted:
        """:raises ValueError: if a score is NaN."""
        sequences, tokens = np.zeros((2, len(self.shards)), dtype=np.int64)
        table = np.zeros((self.num_groups, self.num_uses, _HALF))  # float64 counts exactly up to 2^53 tokens

        def count(index: int, chunk: Chunk, lock: Lock) -> None:
            if np.isnan(chunk.scores).any():
                raise ValueError("a score is NaN")
            cells, lengths = float_bits(chunk.scores) >> np.uint32(16), chunk.lengths
            if chunk.uses is not None:
                fresh = chunk.uses < self.num_uses
                cells, lengths = (chunk.uses[fresh].astype(np.intp) << 16) + cells[fresh], lengths[fresh]
            found = np.bincount(cells, weights=lengths, minlength=self.num_uses * _HALF)
            with lock:
                sequences[index] += len(chunk.ids)
                tokens[index] += chunk.lengths.sum(dtype=np.int64)
                table[self.groups[index]] += found.reshape(self.num_uses, _HALF)[:, _DESCENDING]

        self.each_chunk(count)
        return Counted(sequences, tokens, table.reshape(self.num_groups, -1).astype(np.int64))

    def cuts(self, counted: Counted, limits: Limits, budget: int) -> list[Cut]:
        """What to keep of each shard, by the rule above.

        :param limits: a minimum above what is available counts as all of it; so does a maximum.
        :param budget: tokens, at least the sum of all minimums.
        """
        search = _Search(limits, counted.available, budget)
        cells = search.narrow(counted.table)
        upper = [(int(cell) // _HALF, int(_DESCENDING[cell % _HALF])) for cell in cells]
        places = search.narrow(self._count_lower(upper))
        scores = [_score(high, int(place)) for (_, high), place in zip(upper, places, strict=True)]
        order = sorted(range(len(self.shards)), key=lambda index: self.shards[index].digest)
        ties = self._count_ties([(uses, score) for (uses, _), score in zip(upper, scores, strict=True)])
        ends = search.narrow(ties[:, order])
        cuts: list[Cut] = [Cut(0, np.float32(0), 0)] * len(self.shards)
        for rank, index in enumerate(order):
            group = self.groups[index]
            if search.everything[group]:
                cuts[index] = Cut(self.num_uses, np.float32(np.inf), -1)
                continue
            rest = int(ties[group, index]) if rank < ends[group] else -1
            if rank == ends[group]:
                rest = int(search.limit[group] - search.before[group])
            cuts[index] = Cut(upper[group][0], scores[group], rest)
        return cuts

    def _count_lower(self, upper: Sequence[tuple[int, int]]) -> np.ndarray:
        """int64 [num_groups, 65536]: tokens by the lower 16 bits, best first, in each group's (uses, upper half)."""
        table = np.zeros((self.num_groups, _HALF))

        def count(index: int, chunk: Chunk, lock: Lock) -> None:
            uses, high = upper[self.groups[index]]
            bits = float_bits(chunk.scores)
            inside = _used(chunk, uses, bits >> np.uint32(16) == high)
            found = np.bincount(bits[inside] & _LOW, weights=chunk.lengths[inside], minlength=_HALF)
            with lock:
                table[self.groups[index]] += found[::-1] if high < _HALF // 2 else found

        self.each_chunk(count)
        return table.astype(np.int64)

    def _count_ties(self, ends: Sequence[tuple[int, np.float32]]) -> np.ndarray:
        """int64 [num_groups, num_shards]: tokens of a shard's candidates at its group's (uses, score)."""
        tokens = np.zeros((self.num_groups, len(self.shards)), dtype=np.int64)

        def count(index: int, chunk: Chunk, lock: Lock) -> None:
            uses, score = ends[self.groups[index]]
            found = chunk.lengths[_used(chunk, uses, chunk.scores == score)].sum(dtype=np.int64)
            with lock:
                tokens[self.groups[index], index] += found

        self.each_chunk(count)
        return tokens

    def kept(self, index: int, cut: Cut) -> Iterator[Chunk]:
        """What a cut keeps of a shard, in order; some chunks may be empty."""
        rest = cut.tie_tokens
        for start, stop in _spans(self.shards[index]):
            chunk = self.shards[index].read(start, stop)
            mask = _used(chunk, cut.uses, chunk.scores > cut.score)
            if chunk.uses is not None:
                mask |= chunk.uses < cut.uses
            elif cut.uses:
                mask[:] = True
            if rest >= 0:
                ties = np.flatnonzero(_used(chunk, cut.uses, chunk.scores == cut.score))
                tokens = np.cumsum(chunk.lengths[ties], dtype=np.int64)
                num_fitting = int(np.searchsorted(tokens, rest, side="right"))
                mask[ties[:num_fitting]] = True
                # the order ends at the first that does not fit: a shorter tie further on is not kept
                rest = -1 if num_fitting < len(ties) else rest - int(tokens[-1]) if len(ties) else rest
            yield chunk[np.flatnonzero(mask)]

    def at_least(self, index: int, threshold: float) -> Iterator[Chunk]:
        """All of a shard whose score, as a float32, is at least `threshold`, in order; some chunks may be empty."""
        for start, stop in _spans(self.shards[index]):
            chunk = self.shards[index].read(start, stop)
            mask = chunk.scores >= np.float32(threshold)
            if chunk.uses is not None:
                mask &= chunk.uses < self.num_uses
            yield chunk[np.flatnonzero(mask)]

    def each_chunk(self, work: Callable[[int, Chunk, Lock], None]) -> None:
        """Call `work` with the index of every shard, each of its chunks, and a lock to add up under."""
        lock = Lock()

        def read(index: int, start: int, stop: int) -> int:
            work(index, self.shards[index].read(start, stop), lock)
            return stop - start

        spans = [(index, *span) for index, shard in enumerate(self.shards) for span in _spans(shard)]
        with ThreadPoolExecutor(self.threads) as pool:
            for count in pool.map(lambda span: read(*span), spans):
                self._report(count)

    def each_shard(self, work: Callable[[int], None]) -> None:
        """Call `work` with the index of every shard, each of which it reads once."""
        with ThreadPoolExecutor(self.threads) as pool:
            for index, _ in enumerate(pool.map(work, range(len(self.shards)))):
                self._report(self.shards[index].num_sequences)


class _Search:
    """Where each group ends, cell by cell of finer and finer tables.

    Groups are `free`, that is, they end where all free groups end, or held at their `limit`.
    """

    def __init__(self, limits: Limits, available: np.ndarray, budget: int) -> None:
        self._minimum, self._maximum = np.minimum(limits.minimum, available), np.minimum(limits.maximum, available)
        assert self._minimum.sum() <= budget, "no more is promised than there is"
        self._budget = budget
        self._free = np.ones(len(available), dtype=bool)
        self.limit = np.zeros_like(available)  # tokens; of free groups when all is narrowed down
        self.before = np.zeros_like(available)  # tokens of what comes before the cell that a group ends in
        self.everything = np.zeros(len(available), dtype=bool)  # groups that end nowhere

    def narrow(self, tokens: np.ndarray) -> np.ndarray:
        """The cell that each group ends in: the first that it cannot keep whole.

        :param tokens: int64 [num_groups, num_cells], best cell first: of the cell found before, taken apart.
        """
        after = self.before[:, None] + np.cumsum(tokens, axis=1)
        shared = self._budget - int(self.limit[~self._free].sum())
        low, high = self._minimum[self._free, None], self._maximum[self._free, None]
        clipped = np.clip(after[self._free], low, high).sum(axis=0)
        common = int(np.searchsorted(clipped, shared, side="right"))
        if common == tokens.shape[1]:  # the budget does not end here; maximums may
            self.limit[self._free] = self._maximum[self._free]
            self._free[:] = False
        else:
            before = after[:, common] - tokens[:, common]
            capped = self._free & (before > self._maximum)  # not at it: its cell of a coarser table may end there
            raised = self._free & ~capped & (after[:, common] <= self._minimum)
            self.limit[capped], self.limit[raised] = self._maximum[capped], self._minimum[raised]
            self._free &= ~(capped | raised)
        cells = np.array(
            [
                common if free else np.searchsorted(row, limit, side="right")
                for free, row, limit in zip(self._free, after, self.limit, strict=True)
            ]
        )
        self.everything |= cells == tokens.shape[1]
        cells[self.everything] = 0  # any
        rows = np.arange(len(cells))
        self.before = after[rows, cells] - tokens[rows, cells]
        # the budget that is left, if this group is the one whose sequence does not fit
        held = int(self.limit[~self._free].sum())
        self.limit[self._free] = self._budget - held - (self.before[self._free].sum() - self.before[self._free])
        return cells


def float_bits(scores: np.ndarray) -> np.ndarray:
    """The bits of float32 as uint32, shaped like `scores`; those of 0.0 for -0.0."""
    return (scores + np.float32(0)).view(np.uint32)


def _score(high: int, place: int) -> np.float32:
    """The float32 with these upper bits that is number `place` from the highest."""
    low = _HALF - 1 - place if high < _HALF // 2 else place
    return np.uint32(high << 16 | low).view(np.float32)


def _used(chunk: Chunk, uses: int, mask: np.ndarray) -> np.ndarray:
    """Those of the mask that were used just so often."""
    if chunk.uses is None:
        return mask if uses == 0 else np.zeros_like(mask)
    return mask & (chunk.uses == uses)


def _spans(shard: Candidates) -> Iterator[tuple[int, int]]:
    for start in range(0, shard.num_sequences, CHUNK):
        yield start, min(start + CHUNK, shard.num_sequences)
