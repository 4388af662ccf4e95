"""Exact top 20 % of the tokens of 1e8 scores in 100 shards, from memory-mapped files; with FULL=1 of 1e9, too."""

import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bliss.data.topk import Candidates, top_k_by_tokens

NUM_SHARDS, REPEATS, MAX_LENGTH = 100, 5, 2048  # tokens


def write_shards(folder: Path, num_sequences: int) -> None:
    size = num_sequences // NUM_SHARDS
    for shard in range(NUM_SHARDS):
        generator = np.random.default_rng(shard)
        np.save(folder / f"scores-{shard}.npy", generator.standard_normal(size, dtype=np.float32))
        np.save(folder / f"lengths-{shard}.npy", generator.integers(1, MAX_LENGTH, size, dtype=np.int32))


def select(folder: Path, answer: Any) -> None:
    """Time one selection in a process of its own, whose peak memory without mapped files' pages it reports."""
    shards = [
        Candidates(
            str(shard),
            np.load(folder / f"scores-{shard}.npy", mmap_mode="r"),
            np.load(folder / f"lengths-{shard}.npy", mmap_mode="r"),
        )
        for shard in range(NUM_SHARDS)
    ]
    budget = int(0.2 * sum(int(shard.lengths.sum(dtype=np.int64)) for shard in shards))
    began = time.perf_counter()
    top = top_k_by_tokens(shards, budget)
    seconds = time.perf_counter() - began
    assert budget - MAX_LENGTH < top.num_tokens <= budget
    mapped = sum(shard.scores.nbytes + shard.lengths.nbytes for shard in shards)
    answer.put((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - mapped) / 1e6))


def measure() -> dict[str, Any]:
    results: dict[str, Any] = {}
    context = multiprocessing.get_context("spawn")
    for name in ("1e8", "1e9") if os.environ.get("FULL") == "1" else ("1e8",):
        with tempfile.TemporaryDirectory() as folder:
            write_shards(Path(folder), int(float(name)))
            runs = []
            for _ in range(REPEATS):
                answer = context.SimpleQueue()
                process = context.Process(target=select, args=(Path(folder), answer))
                process.start()
                runs.append(answer.get())
                process.join()
        seconds, memory = zip(*runs, strict=True)
        results[name] = {
            "seconds": statistics.median(seconds),
            "seconds_all": sorted(seconds),
            "peak_mb": max(memory),
            "shards": NUM_SHARDS,
        }
    return results
