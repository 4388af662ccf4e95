"""Exact top 20 % of the tokens of 1e8 scores in 100 shards, from files in the page cache; with FULL=1 of 1e9, too.

Measured is all that depends on the number of sequences: counting, and writing the kept ids, by two threads. Files are
read into buffers, not mapped, so that the peak resident memory is all there is.
"""

import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bliss.data.selection import write_ids
from megatron_bliss.data.topk import Chunk, Limits, Passes

NUM_SHARDS, REPEATS, MAX_LENGTH, THREADS = 100, 5, 2048, 2  # tokens; threads


@dataclass(frozen=True)
class Files:
    """Scores and lengths as raw float32 and int32."""

    folder: Path
    number: int
    num_sequences: int

    @property
    def digest(self) -> str:
        return str(self.number)

    def read(self, start: int, stop: int) -> Chunk:
        scores = np.fromfile(self.folder / f"scores-{self.number}", np.float32, stop - start, offset=4 * start)
        lengths = np.fromfile(self.folder / f"lengths-{self.number}", np.int32, stop - start, offset=4 * start)
        return Chunk(np.arange(start, stop, dtype=np.int32), scores, lengths)


def write_shards(folder: Path, num_sequences: int) -> None:
    size = num_sequences // NUM_SHARDS
    for shard in range(NUM_SHARDS):
        generator = np.random.default_rng(shard)
        generator.standard_normal(size, dtype=np.float32).tofile(folder / f"scores-{shard}")
        generator.integers(1, MAX_LENGTH, size, dtype=np.int32).tofile(folder / f"lengths-{shard}")


def select(folder: Path, num_sequences: int, answer: Any) -> None:
    """Time one selection in a process of its own, whose peak memory it reports."""
    shards = [Files(folder, number, num_sequences // NUM_SHARDS) for number in range(NUM_SHARDS)]
    tokens = np.zeros(NUM_SHARDS, dtype=np.int64)
    before = _cpu_seconds()
    began = time.perf_counter()
    passes = Passes(shards, [0] * NUM_SHARDS, threads=THREADS)
    counted = passes.count()
    budget = int(counted.tokens.sum()) // 5
    cuts = passes.cuts(counted, Limits(np.zeros(1, dtype=np.int64), np.full(1, budget)), budget)

    def kept(index: int) -> Iterator[np.ndarray]:
        for chunk in passes.kept(index, cuts[index]):
            tokens[index] += chunk.lengths.sum(dtype=np.int64)
            yield chunk.ids

    def write(index: int) -> None:
        write_ids(folder / f"kept-{index}.npy", kept(index))

    passes.each_shard(write)
    seconds = time.perf_counter() - began
    assert budget - MAX_LENGTH < tokens.sum() <= budget
    answer.put((seconds, _cpu_seconds() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure() -> dict[str, Any]:
    results: dict[str, Any] = {}
    context = multiprocessing.get_context("spawn")
    for name in ("1e8", "1e9") if os.environ.get("FULL") == "1" else ("1e8",):
        num_sequences = int(float(name))
        with tempfile.TemporaryDirectory() as folder:
            write_shards(Path(folder), num_sequences)
            runs = []
            for _ in range(REPEATS):
                answer = context.SimpleQueue()
                process = context.Process(target=select, args=(Path(folder), num_sequences, answer))
                process.start()
                runs.append(answer.get())
                process.join()
        seconds, cpu_seconds, memory = zip(*runs, strict=True)
        results[name] = {
            "seconds": statistics.median(seconds),
            "seconds_all": sorted(seconds),
            "cpu_seconds": statistics.median(cpu_seconds),
            "threads": THREADS,
            "peak_mb": max(memory),
            "shards": NUM_SHARDS,
        }
    return results
