"""Whether a shard's index fits itself and its tokens the vocabulary: of evenly spaced parts, or of all of it.

`Shard` has checked by then that both files are there and as long as the header says.
"""

from collections.abc import Iterator

import numpy as np

from megatron_bliss.data.shards import Shard
from megatron_bliss.errors import UserError

_BLOCK = 4096  # entries of the index that are read at once
_NUM_BLOCKS = 64  # of a sampled index
_TOKENS = 1 << 24  # read at once


def spaced(count: int, most: int) -> np.ndarray:
    """At most `most` of 0 … count-1, evenly spaced, the first and the last among them: int64, ascending."""
    return np.unique(np.linspace(0, count - 1, min(count, most), dtype=np.int64))


def beyond_vocabulary(shard: Shard, vocab_size: int, num_sequences: int | None) -> tuple[int, int] | None:
    """A sequence with a token id below 0 or not below `vocab_size`, and that id.

    :param num_sequences: how many sequences are looked at, evenly spaced; None: all tokens.
    """
    if num_sequences is None:
        return _anywhere_beyond(shard, vocab_size)
    for sequence_id in spaced(len(shard), num_sequences).tolist():
        tokens = shard[sequence_id]
        if len(tokens) and not 0 <= (worst := _worst(tokens)) < vocab_size:
            return sequence_id, worst
    return None


def _anywhere_beyond(shard: Shard, vocab_size: int) -> tuple[int, int] | None:
    for start in range(0, shard.num_tokens, _TOKENS):
        tokens = shard.tokens[start : start + _TOKENS]
        if 0 <= _worst(tokens) < vocab_size:
            continue
        place = start + int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
        sequence_id = int(np.searchsorted(shard.sequence_offsets, place * shard.dtype.itemsize, side="right")) - 1
        return sequence_id, int(shard.tokens[place])
    return None


def _worst(tokens: np.ndarray) -> int:
    """The lowest id where it is below 0, the highest otherwise."""
    lowest = int(tokens.min())
    return int(tokens.max()) if lowest >= 0 else lowest


def check_index(shard: Shard, in_full: bool) -> None:
    """Sequences follow one another without a gap, and documents begin at sequences, in order.

    :param in_full: look at all entries, instead of 64 blocks of 4096.
    :raises UserError: naming the first entry that does not fit.
    """
    remedy = "build the shard again"
    for start, stop in _blocks(len(shard), in_full):
        lengths = shard.sequence_lengths[start:stop].astype(np.int64)
        offsets = shard.sequence_offsets[start : stop + 1]
        expected = offsets[0] + shard.dtype.itemsize * np.cumsum(lengths)[: len(offsets) - 1]
        wrong = (lengths[: len(expected)] < 0) | (offsets[1:] != expected)
        if (start == 0 and offsets[0] != 0) or wrong.any():
            sequence_id = start + (int(np.argmax(wrong)) if wrong.any() else 0)
            raise UserError(f"{shard.idx_path}: what follows sequence {sequence_id} is not where it ends; {remedy}")
    starts = shard.document_starts
    if len(starts) and (starts[0] != 0 or starts[-1] != len(shard)):
        raise UserError(
            f"{shard.idx_path}: its documents are sequences {starts[0]} to {starts[-1]} of {len(shard)}; {remedy}"
        )
    for start, stop in _blocks(len(starts), in_full):
        if (np.diff(starts[start : stop + 1]) < 0).any():
            raise UserError(f"{shard.idx_path}: documents {start} to {stop} are not in order; {remedy}")


def _blocks(count: int, in_full: bool) -> Iterator[tuple[int, int]]:
    """Spans of entries."""
    number = -(-count // _BLOCK)
    for block in spaced(number, number if in_full else _NUM_BLOCKS).tolist():
        yield block * _BLOCK, min((block + 1) * _BLOCK, count)
