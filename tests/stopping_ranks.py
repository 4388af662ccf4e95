"""Ranks' work for tests/test_stopping.py: stages of our own loops that are asked to stop, again and again."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_bliss import stopping
from megatron_bliss.artifacts import RunPaths, digest_file
from megatron_bliss.data import target_cache
from megatron_bliss.mcore import parallel
from megatron_bliss.mcore.stopping import Vote
from megatron_bliss.stages import bilevel, cache_target, fidelity, fit_influence, influence, score, warmup_proxy
from tests.target_cache_ranks import save_target

# Settings with which every stage has a few steps.
SMALL: dict[str, Any] = {
    "data__sequence_length": 20, "bilevel__gamma": 0.5, "bilevel__kl_source": "cached", "bilevel__kl_top_k": 16,
    "bilevel__outer_steps": 8, "scoring__chunk_sequences": 60, "target__save_interval": 5,
    "mates__sample_size": 40, "mates__reference_sequences": 8, "mates__checkpoint_interval": 10,
    "mates__fit_batch_size": 8, "mates__fit_epochs": 2, "fidelity__sequences": 20,
}  # fmt: skip
STAGES: dict[str, Callable[[Path], None]] = {
    "warmup-proxy": warmup_proxy.run,
    "cache-target": lambda run: cache_target.run(run, 1),
    "bilevel": lambda run: bilevel.run(run, 1),
    "score": lambda run: score.run(run, 1),
    "fidelity": lambda run: fidelity.run(run, 1),
    "influence": lambda run: influence.run(run, 1),
    "fit-influence": lambda run: fit_influence.run(run, 1),
}


def prepare(rank: int, run: Path) -> None:
    save_target(run, seed=1)


def stop_stages(rank: int, whole: Path, stopped: Path) -> dict[str, list[Any]]:
    """Of every stage: how often it was stopped, and the digests of its files undisturbed and stopped.

    Only the second rank is asked, at its second look each time.
    """
    asked, looks = stopping.requested, [0]
    target_cache.CHUNK_STEPS, fidelity._CHUNK = 1, 8

    def requested() -> bool:
        looks[0] += 1
        return rank == 1 and looks[0] >= 2

    results: dict[str, list[Any]] = {}
    for name, stage in STAGES.items():
        stage(whole)
        stopping.requested, stops, is_over = requested, 0, False
        while not is_over:
            looks[0] = 0
            try:
                stage(stopped)
                is_over = True
            except SystemExit as ended:
                stops += ended.code == stopping.EXIT_CODE
        stopping.requested = asked
        results[name] = [stops, files_of(whole, name), files_of(stopped, name)]
    return results


def files_of(run: Path, stage: str) -> dict[str, str]:
    """Digests of the tensors and arrays that a stage has written; a checkpoint's description has an id of its own."""
    paths = RunPaths(run)
    directory = {
        "warmup-proxy": paths.warmup_proxy,
        "cache-target": paths.target_cache(1),
        "bilevel": paths.bilevel(1),
        "score": paths.scores(1),
        "fidelity": paths.fidelity(1),
        "influence": paths.influence(1),
        "fit-influence": paths.influence_model(1),
    }[stage]
    files = [path for path in sorted(directory.rglob("*")) if path.suffix in (".npy", ".distcp")]
    return {str(path.relative_to(directory)): digest_file(path) for path in files}


def votes(rank: int) -> list[Any]:
    """When ranks of different pace stop, one of which is asked after its fiftieth step; and how often they voted."""
    context = parallel.initialize(1, False, seed=1)
    reductions, reduce = [], torch.distributed.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        reductions.append(1)
        return reduce(*args, **kwargs)

    torch.distributed.all_reduce = counted
    vote, step = Vote(context.device, interval=0.05), 0
    while True:
        step += 1
        time.sleep(0.001 * (1 + rank))
        if step == 50 and rank == 1:
            stopping._received.append(10)
        if vote():
            return [step, len(reductions)]
