"""Whether a round's scores tell sequences apart at all: a look at evenly spaced ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_bliss.data.shards import ShardRecord, read_lengths

_SAMPLED = 1_000_000  # sequences of the pool, about
_LOWEST = np.finfo(np.float32).min  # where a sequence could not be scored, or is too short for that


@dataclass(frozen=True)
class ScoreCheck:
    """Of the scored sequences of two tokens or more that were looked at."""

    num_scores: int
    spread: float  # between the 10th and the 90th percentile; 0 without scores
    unscored: float  # share without a number


def check_scores(directory: Path, records: Sequence[ShardRecord]) -> ScoreCheck:
    """:param directory: of finished scores; shards without a file have none."""
    stride = -(-max(sum(record.num_sequences for record in records), 1) // _SAMPLED)
    parts = [np.empty(0, dtype=np.float32)]
    for record in records:
        path = directory / f"{record.name}.npy"
        if path.exists():
            scores = np.load(path, mmap_mode="r", allow_pickle=False)[::stride]
            lengths = read_lengths(record.prefix, 0, record.num_sequences)[::stride]
            parts.append(scores[~np.isnan(scores) & (lengths > 1)])
    scores = np.concatenate(parts)
    known = scores[scores > _LOWEST].astype(np.float64)
    low, high = np.percentile(known, [10, 90]) if len(known) else (0.0, 0.0)
    return ScoreCheck(len(scores), float(high - low), 1 - len(known) / max(len(scores), 1))
