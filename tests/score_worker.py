"""`python -m tests.score_worker DIRECTORY SECONDS`: one of several processes that score the same shards, with numbers
that are a function of shard and sequence, as a model's are."""

import sys
import time
from pathlib import Path

import numpy as np

from megatron_bliss.data.scores import Chunk, ScoreWriter
from tests.toy_shards import fake_record

RECORDS = [fake_record(3000, "a"), fake_record(1, "b"), fake_record(900, "c"), fake_record(50, "d")]
WANTED = {
    "a": np.arange(1, 3000, 2, dtype=np.int32),
    "b": np.zeros(1, dtype=np.int32),
    "c": np.flatnonzero(np.arange(900) % 7 < 3).astype(np.int32),
}
CHUNK = 64


def open_writer(directory: Path, timeout: float = 300) -> ScoreWriter:
    return ScoreWriter(
        directory,
        RECORDS,
        WANTED,
        method="bliss",
        model_digest="m",
        seed=1,
        chunk_sequences=CHUNK,
        claim_timeout=timeout,
    )


def scores_of(chunk: Chunk) -> np.ndarray:
    return np.sin(chunk.ids + len(chunk.record.name) * ord(chunk.record.name)).astype(np.float32)


def work(directory: Path, seconds: float) -> None:
    """:param seconds: that a chunk takes."""
    writer = open_writer(directory)
    while not writer.is_complete:
        chunk = writer.claim()
        if chunk is None:
            time.sleep(0.01)
            continue
        print(f"{chunk.name}", flush=True)
        time.sleep(seconds)
        writer.write(chunk, scores_of(chunk))


if __name__ == "__main__":
    work(Path(sys.argv[1]), float(sys.argv[2]))
