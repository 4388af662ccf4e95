"""The hook on 1e8 sequences of which a fifth is kept, beside Megatron's own dataset on shards of the kept ones alone.

Each measurement is a process of its own, forked off one that has only imported what is needed, and the two kinds take
turns. `start` builds the dataset with no index files there, `prepared_start` with all of them; both begin before the
selection is opened. Memory is what the process holds for itself (RssAnon): mapped files' pages belong to the page cache
and are shared by all ranks of a machine. HOOK_SEQUENCES=1e7 makes it smaller.
"""

import multiprocessing
import os
import shutil
import statistics
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bliss.data.selection import Counts, KeptShard, Selection, write_selection
from megatron_bliss.data.shards import take_inventory

NUM_SHARDS, KEPT, LENGTH, REPEATS = 4, 0.2, 64, 5
ROUNDS, DRAWN = 20, 500  # of samples drawn, and samples in each
LENGTHS = (2, 9)  # tokens a sequence, the end excluded
KINDS = ("unhooked", "hooked")


class _Tokenizer:
    """As much of a tokenizer as Megatron's datasets ask for."""

    vocab_size, eod, pad, unique_identifiers = 1 << 16, 0, -1, {"class": "numbers"}


def write_shard(prefix: Path, lengths: np.ndarray, tokens: np.ndarray) -> str:
    """A shard from its arrays: int32 [sequences], uint16 [all tokens]."""
    offsets = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1], out=offsets[1:])
    tokens.tofile(f"{prefix}.bin")
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1))
        for array in (lengths, offsets * 2, np.arange(len(lengths) + 1, dtype=np.int64)):
            array.tofile(stream)
    return str(prefix)


def write_data(folder: Path, num_sequences: int) -> None:
    """Shards, a selection of a fifth of each, and shards of what is selected."""
    ids, prefixes = [], []
    for number in range(NUM_SHARDS):
        random = np.random.default_rng(number)
        lengths = random.integers(*LENGTHS, num_sequences // NUM_SHARDS, dtype=np.int32)
        tokens = random.integers(0, 60_000, int(lengths.sum(dtype=np.int64)), dtype=np.uint16)
        kept = random.random(len(lengths), dtype=np.float32) < KEPT
        prefixes.append(write_shard(folder / f"hooked-{number}", lengths, tokens))
        write_shard(folder / f"unhooked-{number}", lengths[kept], tokens[np.repeat(kept, lengths)])
        ids.append((np.flatnonzero(kept).astype(np.int32), int(lengths[kept].sum(dtype=np.int64))))
    records = take_inventory({"domain": prefixes})
    shards = [
        KeptShard(
            record, own, Counts(len(own), kept, record.num_sequences, record.num_tokens), kept / sum(n for _, n in ids)
        )
        for record, (own, kept) in zip(records, ids, strict=True)
    ]
    write_selection(
        folder / "selection", shards, method="random", seed=1, fraction=KEPT, thresholds={}, blend_policy="pool",
        sources={},
    )  # fmt: skip


def _memory() -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def build(kind: str, folder: Path, cache: Path) -> tuple[Any, dict[str, float]]:
    """The training dataset of one kind, the seconds that it took and this process's memory afterwards."""
    from tests.benchmarks.hook_imports import GPTDataset, GPTDatasetConfig, hook, megatron_builder

    selection = Selection.open(folder / "selection")  # for the numbers that both kinds are told
    num_samples, weights = int(0.9 * selection.counts.kept_tokens / LENGTH), [weight for weight, _ in selection.blend]
    prefixes = [str(folder / f"{kind}-{number}") for number in range(NUM_SHARDS)]
    del selection
    before, began = _memory(), time.perf_counter()
    if kind == "hooked":
        hook.install(Selection.open(folder / "selection", in_full=False))
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=LENGTH, blend_per_split=[(prefixes, weights), None, None],
        path_to_cache=str(cache), tokenizer=_Tokenizer(), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    sizes = [num_samples, 0, 0]
    train, _, _ = megatron_builder.BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    seconds, memory = time.perf_counter() - began, _memory()
    return train, {"seconds": seconds, "memory": memory, "growth": memory - before}


def start(kind: str, folder: Path, cache: Path, pipe: Any) -> None:
    """Build the dataset and answer with what it took."""
    pipe.send(build(kind, folder, cache)[1])


def draw(kind: str, folder: Path, cache: Path, pipe: Any) -> None:
    """For each range of samples that is asked for, answer with seconds a sample; None ends it."""
    train, _ = build(kind, folder, cache)
    while (wanted := pipe.recv()) is not None:
        began = time.perf_counter()
        for index in range(*wanted):
            train[index]
        pipe.send((time.perf_counter() - began) / (wanted[1] - wanted[0]))


class _Worker:
    """A process of its own that runs `start` or `draw`."""

    def __init__(self, context: Any, target: Any, kind: str, folder: Path, cache: Path) -> None:
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=target, args=(kind, folder, cache, other))
        self.process.start()
        other.close()

    def end(self) -> None:
        self.process.join()
        assert self.process.exitcode == 0


def measure() -> dict[str, Any]:
    num_sequences = int(float(os.environ.get("HOOK_SEQUENCES", "1e8")))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.benchmarks.hook_imports"])
    found: dict[str, dict[str, list[Any]]] = {name: {kind: [] for kind in KINDS} for name in ("start", "prepared")}
    drawn: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, num_sequences)
        caches = {kind: folder / f"cache-{kind}" for kind in KINDS}
        for repeat in range(REPEATS + 1):
            for kind in KINDS[:: 1 if repeat % 2 else -1]:
                shutil.rmtree(caches[kind], ignore_errors=True)
                for step in ("start", "prepared"):
                    worker = _Worker(context, start, kind, folder, caches[kind])
                    answer = worker.pipe.recv()
                    worker.end()
                    found[step][kind] += [answer] if repeat else []  # the first one warms the page cache
            for kind, seconds in _draw_in_turns(context, folder, caches).items():
                drawn[kind] += [seconds] if repeat else []
    return results(found, drawn) | {"sequences": num_sequences}


def _draw_in_turns(context: Any, folder: Path, caches: dict[str, Path]) -> dict[str, float]:
    """Seconds a sample of both kinds: medians over rounds in which one process draws while the other waits."""
    workers = {kind: _Worker(context, draw, kind, folder, caches[kind]) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(2 * ROUNDS):
        place = number % ROUNDS * DRAWN
        for kind in KINDS[:: 1 if number % 2 else -1]:
            workers[kind].pipe.send((place, place + DRAWN))
            seconds = workers[kind].pipe.recv()
            times[kind] += [seconds] if number >= ROUNDS else []  # the first time round, pages come into memory
    for worker in workers.values():
        worker.pipe.send(None)
        worker.end()
    return {kind: statistics.median(seconds) for kind, seconds in times.items()}


def results(found: dict[str, dict[str, list[Any]]], drawn: dict[str, list[float]]) -> dict[str, Any]:
    """Ratios of medians, hooked to unhooked, and what they are of."""

    def both(values: dict[str, list[float]]) -> dict[str, Any]:
        medians = {kind: statistics.median(values[kind]) for kind in KINDS}
        spread = {f"{kind}_all": sorted(values[kind]) for kind in KINDS}
        return {"ratio": medians["hooked"] / medians["unhooked"], **medians, **spread}

    def of(step: str, figure: str) -> dict[str, Any]:
        return both({kind: [answer[figure] for answer in found[step][kind]] for kind in KINDS})

    started, getitem, memory = of("start", "seconds"), both(drawn), of("prepared", "memory")
    return {
        "start_ratio": started["ratio"],
        "getitem_ratio": getitem["ratio"],
        "memory_ratio": memory["ratio"],
        "start_s": started,
        "prepared_start_s": of("prepared", "seconds"),
        "getitem_s": getitem,
        "memory_bytes": memory,
        "memory_after_building_bytes": of("start", "memory"),
        "memory_growth_bytes": of("prepared", "growth"),
    }
