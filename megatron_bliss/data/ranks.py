"""Medians and percentile ranks over many shards, counted in passes like the top-k of `data/topk.py`, without a sort."""

from threading import Lock

import numpy as np

from megatron_bliss.data.topk import Chunk, Passes, float_bits

_HALF = 1 << 16
_CELLS = 1 << 22


def median(passes: Passes) -> np.float32:
    """The median of all candidates' scores, exactly as `np.median` gives it; NaN if there are none. Two passes."""
    upper = _count_upper(passes)
    number = int(upper.sum())
    if not number:
        return np.float32(np.nan)
    places = [(number - 1) // 2, number // 2]
    cells = [int(np.searchsorted(np.cumsum(upper), place, side="right")) for place in places]
    lower = {cell: np.zeros(_HALF, dtype=np.int64) for cell in cells}

    def count_lower(_: int, chunk: Chunk, lock: Lock) -> None:
        bits = _ascending(chunk.scores)
        for cell in lower:
            found = np.bincount(bits[bits >> np.uint32(16) == cell] & np.uint32(_HALF - 1), minlength=_HALF)
            with lock:
                lower[cell] += found

    passes.each_chunk(count_lower)
    values = []
    for place, cell in zip(places, cells, strict=True):
        inside = place - int(upper[:cell].sum())
        bits = cell << 16 | int(np.searchsorted(np.cumsum(lower[cell]), inside, side="right"))
        values.append(np.uint32(bits & 0x7FFFFFFF if bits >> 31 else ~bits & 0xFFFFFFFF).view(np.float32))
    return np.float32(np.mean(np.array(values)))


def mean_ranks(passes: Passes) -> np.ndarray:
    """The mean percentile rank of each group's scores among all: float64 [num_groups], NaN for a group without any.

    A rank is the share of candidates below, plus half of those equal. Scores count as equal that share all of a cell:
    the upper 16 bits of a float32 are taken apart into as many cells as their share of 2^22, at least 1, at most all
    65,536. So a rank is exact among scores whose upper bits 1/64 of all candidates have, and elsewhere off by half a
    cell at most, about a ten-millionth where the scores are spread evenly within it. Three passes.
    """
    upper = _count_upper(passes)
    number = int(upper.sum())
    share = upper / max(number, 1) * _CELLS
    bits = np.clip(np.ceil(np.log2(np.maximum(share, 1))), 0, 16).astype(np.uint32)
    sizes = np.where(upper > 0, 1 << bits.astype(np.int64), 0)
    first, shifts = np.cumsum(sizes) - sizes, np.uint32(16) - bits
    cells = np.zeros(int(sizes.sum()), dtype=np.int64)

    def cells_of(chunk: Chunk) -> np.ndarray:
        values = _ascending(chunk.scores)
        high = values >> np.uint32(16)
        return np.asarray(first[high] + ((values & np.uint32(_HALF - 1)) >> shifts[high]))

    def count_cells(_: int, chunk: Chunk, lock: Lock) -> None:
        places, counts = np.unique(cells_of(chunk), return_counts=True)
        with lock:
            cells[places] += counts

    passes.each_chunk(count_cells)
    doubled = 2 * (np.cumsum(cells) - cells) + cells  # twice the number below, with half of those equal
    sums, counts = [0] * passes.num_groups, [0] * passes.num_groups  # integers: the same whatever the order of chunks

    def add(index: int, chunk: Chunk, lock: Lock) -> None:
        total = int(doubled[cells_of(chunk)].sum())
        with lock:
            sums[passes.groups[index]] += total
            counts[passes.groups[index]] += len(chunk.ids)

    passes.each_chunk(add)
    ranks = [total / (2 * number * count) if count else np.nan for total, count in zip(sums, counts, strict=True)]
    return np.array(ranks)


def _count_upper(passes: Passes) -> np.ndarray:
    """int64 [65536]: candidates by the upper 16 bits of their scores, lowest first."""
    counts = np.zeros(_HALF, dtype=np.int64)

    def count(_: int, chunk: Chunk, lock: Lock) -> None:
        found = np.bincount(_ascending(chunk.scores) >> np.uint32(16), minlength=_HALF)
        with lock:
            counts[:] += found

    passes.each_chunk(count)
    return counts


def _ascending(scores: np.ndarray) -> np.ndarray:
    """uint32 that compare as the float32 scores do; -0.0 equals 0.0."""
    bits = float_bits(scores)
    return np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))
