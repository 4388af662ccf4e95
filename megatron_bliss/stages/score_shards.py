"""Scores of any shards by the checkpoint of a run, outside of runs: what `tools/score_shards.py` does.

OUT/shards.json    the shards and their digests, taken once
OUT/…              score files and manifest, as a round's
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatron_bliss.artifacts import RunPaths, read_json, write_json
from megatron_bliss.config import RunConfig, load_config
from megatron_bliss.data.shards import Shard, ShardRecord, take_inventory
from megatron_bliss.errors import UserError
from megatron_bliss.mcore.parallel import agreed
from megatron_bliss.methods import offline_method
from megatron_bliss.stages.inventory import check_token_ids
from megatron_bliss.stages.score import ScoringWork, initialize, score, score_checkpoint
from megatron_bliss.stages.sources import find_model
from megatron_bliss.wording import counted


def of_run(run_dir: Path, round_number: int, overrides: list[str]) -> tuple[RunConfig, Path]:
    """Settings of a run, and the checkpoint that its round is scored by.

    :raises UserError: for a run without that checkpoint, or a bad override.
    """
    paths = RunPaths(run_dir)
    config = load_config(paths.config, overrides)
    return config, score_checkpoint(paths, config, round_number)


def of_checkpoint(checkpoint: Path, settings: Path | None, overrides: list[str]) -> tuple[RunConfig, Path]:
    """Settings and place of a checkpoint.

    :param settings: a run's YAML; None: the run.yaml of the run that the checkpoint lies in.
    :raises UserError: if there is no checkpoint, or there are no settings for it.
    """
    found = find_model(checkpoint)
    if settings is None:
        settings = next((run / "run.yaml" for run in found.absolute().parents if (run / "run.yaml").is_file()), None)
    if settings is None:
        raise UserError(f"{checkpoint} lies in no run; name the run.yaml it was trained with by --settings")
    config = load_config(settings, overrides)
    if offline_method(config).scored_by == "none":
        raise UserError(f"{settings} has method {config.method!r}, which scores nothing with a model; give another run")
    return config, found


def describe(prefixes: list[str], config: RunConfig, checkpoint: Path) -> str:
    """What would be done, from the shards' indices alone.

    :raises UserError: for a bad shard.
    """
    shards = [Shard(prefix) for prefix in prefixes]
    chunks = sum(-(-len(shard) // config.scoring.chunk_sequences) for shard in shards)
    sizes = {shard.prefix: (len(shard), shard.num_tokens) for shard in shards}
    sizes["in all"] = sum(map(len, shards)), sum(shard.num_tokens for shard in shards)
    lines = [
        f"{name}: {counted(size, 'sequence')}, {counted(tokens, 'token')}" for name, (size, tokens) in sizes.items()
    ]
    lines.append(f"{counted(chunks, 'chunk')} of at most {counted(config.scoring.chunk_sequences, 'sequence')}")
    lines.append(f"method {offline_method(config).name}, checkpoint {checkpoint}")
    return "\n".join(lines)


def run(prefixes: list[str], config: RunConfig, checkpoint: Path, out: Path) -> None:
    """Score every sequence of the shards, or those that are missing. All ranks of the job call it, and any number of
    jobs may do the same beside it.

    :raises UserError: for a bad or changed shard, or a directory that holds other scores or cannot be written.
    """
    context = initialize(config)
    listing = out / "shards.json"
    with agreed(context):
        if context.is_first and not listing.exists():
            _list_shards(prefixes, config, listing)
    with agreed(context):
        records = _listed(listing, prefixes)
    wanted = {record.name: np.arange(record.num_sequences, dtype=np.int32) for record in records}
    score(ScoringWork(out, records, wanted, checkpoint, config, replace=False), context)


def _list_shards(prefixes: list[str], config: RunConfig, listing: Path) -> None:
    if (listing.parent / "manifest.json").exists():
        raise UserError(f"{listing.parent} holds something else than scores of --shards; give another --out")
    records = take_inventory({"": prefixes})
    for record in records:
        check_token_ids(record, config.data.tokenizer.vocab_size)
    try:
        write_json(listing, {"schema": 1, "shards": [asdict(record) for record in records]})
    except OSError as error:
        raise UserError(f"{listing.parent} cannot be written ({error.strerror}); give another --out") from None


def _listed(listing: Path, prefixes: list[str]) -> list[ShardRecord]:
    records = [ShardRecord(**record) for record in read_json(listing)["shards"]]
    if {record.prefix for record in records} != {str(Path(prefix).absolute()) for prefix in prefixes}:
        raise UserError(f"{listing.parent} is for other shards than --shards now names; give another --out")
    return records
