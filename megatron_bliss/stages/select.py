"""`select`: keep the best part of a round's slice; `warmup-select`: a random part of slice 0."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.config import RunConfig, read_saved_config
from megatron_bliss.data.blend import BlendPart, blend_weights, score_weights
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.scores import ScoreFiles
from megatron_bliss.data.seeds import derive
from megatron_bliss.data.selection import Counts, KeptShard, Selection, write_selection
from megatron_bliss.data.shards import ShardRecord, verify_shard
from megatron_bliss.data.slices import Slicing
from megatron_bliss.data.topk import Candidates, top_k_by_tokens
from megatron_bliss.errors import UserError
from megatron_bliss.methods import offline_method
from megatron_bliss.methods.offline import OfflineMethod
from megatron_bliss.methods.random import Random
from megatron_bliss.stages.inventory import run_inventory


def run(run_dir: Path, round_number: int | None) -> None:
    """Write a round's selection, or for None the warm-up's, unless a run is started from another one's warm-up.

    The result depends on settings, shards and scores alone, so a selection that is there already is written again
    to the same bytes.

    :raises UserError: if scores are missing or unfinished, a shard changed, or nothing would be kept.
    """
    paths = RunPaths(Path(run_dir))
    config = read_saved_config(paths.config)
    if round_number is None and config.warmup.start_from:
        return
    inventory = run_inventory(run_dir, config)
    seed = selection_seed(config, paths, round_number)
    sources = {"inventory": inventory.digest}
    method: OfflineMethod
    if round_number is None:
        directory, method, fraction = paths.warmup_selection, Random(), config.warmup.fraction
    else:
        directory, method, fraction = paths.selection(round_number), offline_method(config), config.selection.fraction
    files = None
    if round_number is not None and method.scored_by != "none":
        files = ScoreFiles(paths.scores(round_number))
        if files.method != method.name:
            raise UserError(
                f"{files.directory} holds scores of {files.method!r}, this run selects by {method.name!r}; "
                "remove the directory and run the score stage again"
            )
        sources["scores"] = files.digest
    candidates = gather(inventory, Slicing.of(config, inventory), round_number or 0, method, files, seed)
    shards, thresholds = choose(candidates, config, fraction)
    write_selection(
        directory,
        shards,
        method=method.name,
        seed=seed,
        fraction=fraction,
        thresholds=thresholds,
        blend_policy=config.selection.blend,
        sources=sources,
    )
    selection = Selection.open(directory)
    counts, dropped = selection.counts, selection.dropped
    print(
        f"[{'warmup-select' if round_number is None else 'select'}] {method.name} keeps {counts.kept_sequences} of "
        f"{counts.slice_sequences} sequences, {counts.kept_tokens} of {counts.slice_tokens} tokens"
        + (f"; nothing of {', '.join(dropped)}, left out of the blend" if dropped else ""),
        flush=True,
    )


def selection_seed(config: RunConfig, paths: RunPaths, round_number: int | None) -> int:
    """Seed of a selection's draws: another one for each run (main or control arm), round and stage."""
    arm = f"control {paths.root.resolve().name}" if config.warmup.start_from else "main"
    if round_number is None:
        return derive(config.seed, arm, "warmup-select")
    return derive(config.seed, arm, "select", round_number)


@dataclass(frozen=True)
class Scored:
    """A shard's part of the slice."""

    record: ShardRecord
    ids: np.ndarray  # int32 [n] ascending
    lengths: np.ndarray  # int32 [n], tokens
    scores: np.ndarray  # float32 [n], as compared


def gather(
    inventory: Inventory,
    slicing: Slicing,
    slice_number: int,
    method: OfflineMethod,
    files: ScoreFiles | None,
    seed: int,
) -> list[Scored]:
    """The slice's sequences with their scores, from the score files or, without them, from the method itself."""
    ids, lengths, scores = [], [], []
    for record in inventory.pool:
        ids.append(slicing.ids(record, slice_number))
        lengths.append(verify_shard(record).sequence_lengths[ids[-1]])
        found = files.read(record, ids[-1]) if files else method.score_without_model(record, ids[-1], seed)
        scores.append(found)
    finished = method.finish(scores)
    return [Scored(*entry) for entry in zip(inventory.pool, ids, lengths, finished, strict=True)]


def choose(
    candidates: Sequence[Scored], config: RunConfig, fraction: float
) -> tuple[list[KeptShard], dict[str, float | None]]:
    """Keep `fraction` of the candidates' tokens, over the whole pool or within each domain as the blend policy says.

    :returns: what is kept of each shard, in the order given, and the threshold by domain.
    """
    policy = config.selection.blend
    domains = list(dict.fromkeys(scored.record.domain for scored in candidates))
    groups = [domains] if policy == "pool" else [[domain] for domain in domains]
    kept: dict[str, np.ndarray] = {}
    thresholds: dict[str, float | None] = {}
    for group in groups:
        members = [scored for scored in candidates if scored.record.domain in group]
        num_tokens = sum(int(scored.lengths.sum(dtype=np.int64)) for scored in members)
        top = top_k_by_tokens(
            [Candidates(scored.record.digest, scored.scores, scored.lengths) for scored in members],
            round(fraction * num_tokens),
        )
        kept |= {scored.record.name: mask for scored, mask in zip(members, top.kept, strict=True)}
        thresholds |= dict.fromkeys(group, top.threshold)
    counts = [_counts(scored, kept[scored.record.name]) for scored in candidates]
    weights = _weights(candidates, counts, config)
    return [
        KeptShard(scored.record, scored.ids[kept[scored.record.name]], count, weight)
        for scored, count, weight in zip(candidates, counts, weights, strict=True)
    ], thresholds


def _counts(scored: Scored, mask: np.ndarray) -> Counts:
    return Counts(
        kept_sequences=int(mask.sum()),
        kept_tokens=int(scored.lengths[mask].sum(dtype=np.int64)),
        slice_sequences=len(scored.ids),
        slice_tokens=int(scored.lengths.sum(dtype=np.int64)),
    )


def _weights(candidates: Sequence[Scored], counts: Sequence[Counts], config: RunConfig) -> list[float]:
    parts = [
        BlendPart(scored.record.domain, scored.record.num_tokens, count.kept_tokens)
        for scored, count in zip(candidates, counts, strict=True)
    ]
    domain_weights: dict[str, float] | None = None
    if config.selection.blend == "score":
        domain_weights = score_weights(
            [part.domain for part in parts],
            [part.pool_tokens for part in parts],
            [scored.scores for scored in candidates],
        )
    elif config.data.pool[0].weight is not None:
        domain_weights = {domain.name: domain.weight for domain in config.data.pool if domain.weight is not None}
    return blend_weights(config.selection.blend, parts, domain_weights)
