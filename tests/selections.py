"""Selections of small shards, for tests of what trains on them."""

from pathlib import Path

import numpy as np

from megatron_bliss.data.selection import Counts, KeptShard, Selection, write_selection
from megatron_bliss.data.shards import Shard, ShardRecord, ShardWriter, take_inventory


def write_numbered_shard(prefix: Path, num_sequences: int, first_token: int, seed: int) -> str:
    """Sequences of 5 to 40 tokens, all different across the shard: `first_token`, `first_token` + 1, and so on."""
    lengths = np.random.default_rng(seed).integers(5, 41, num_sequences)
    with ShardWriter(prefix, np.int32) as writer:
        for length in lengths:
            writer.add_document([np.arange(first_token, first_token + length)])
            first_token += length
    return str(prefix)


def select(directory: Path, kept: dict[str, np.ndarray]) -> Selection:
    """Write and open a selection: by shard prefix, the ids that are kept. The blend follows the tokens."""
    records = take_inventory({Path(prefix).name: [prefix] for prefix in kept})
    counts = {record.prefix: _counts(record, kept[record.prefix]) for record in records}
    total = sum(count.kept_tokens for count in counts.values())
    shards = [
        KeptShard(
            record,
            np.asarray(kept[record.prefix], dtype=np.int32),
            counts[record.prefix],
            counts[record.prefix].kept_tokens / total,
        )
        for record in records
    ]
    write_selection(
        directory, shards, method="random", seed=1, fraction=0.2, thresholds={}, blend_policy="pool", sources={}
    )
    return Selection.open(directory)


def _counts(record: ShardRecord, ids: np.ndarray) -> Counts:
    tokens = int(Shard(record.prefix).sequence_lengths[np.asarray(ids, dtype=int)].sum())
    return Counts(len(ids), tokens, record.num_sequences, record.num_tokens)
