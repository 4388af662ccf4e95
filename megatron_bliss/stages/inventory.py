"""`inventory`: hash and check every shard of a run once, so that later stages notice when one changes."""

from dataclasses import replace
from pathlib import Path

from megatron_bliss.artifacts import RunPaths, read_json, write_json
from megatron_bliss.config import RunConfig, read_saved_config
from megatron_bliss.data.contamination import LENGTH, contamination
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.shard_checks import beyond_vocabulary
from megatron_bliss.data.shards import Shard, ShardRecord, take_inventory, verify_shard
from megatron_bliss.data.validation import ValidationSet, mask_digest, verify_mask
from megatron_bliss.errors import UserError
from megatron_bliss.wording import counted

_SAMPLED_SEQUENCES = 1000  # of each shard, for the check of token ids


def run(run_dir: Path) -> None:
    """Write `inventory.json`, or make sure that the shards are still those in it.

    :raises UserError: for a bad shard, token ids beyond the vocabulary, mixed dtypes, or a shard listed twice.
    """
    paths = RunPaths(Path(run_dir))
    config = read_saved_config(paths.config)
    if paths.inventory.exists():
        inventory = Inventory.read(paths.inventory)
        for record in inventory.records:
            verify_shard(record)
        for record in filter(None, (*inventory.validation.values(), inventory.test)):
            verify_mask(record)
    else:
        inventory = collect(config)
        inventory.write(paths.inventory)
    shards, num_tokens = counted(len(inventory.pool), "shard"), sum(record.num_tokens for record in inventory.pool)
    print(f"[inventory] {shards} in the pool, {num_tokens / 1e6:.1f}M tokens", flush=True)
    if config.data.contamination_tokens:
        look_for_contamination(paths.contamination, inventory, config.data.contamination_tokens)


def look_for_contamination(path: Path, inventory: Inventory, max_tokens: int) -> None:
    """Write what of the validation sets stands in the pool, unless that was done on the same data.

    :param max_tokens: of the pool that are read.
    """
    if path.exists() and read_json(path)["inventory"] == inventory.digest:
        return
    pool = [Shard(record.prefix) for record in inventory.pool]
    sets = {
        name: contamination(pool, ValidationSet.open(record.prefix), max_tokens)
        for name, record in inventory.validation.items()
    }
    write_json(path, {"schema": 1, "inventory": inventory.digest, "sets": sets})
    for name, found in sets.items():
        share = found["read_tokens"] / max(found["pool_tokens"], 1)
        print(
            f"[inventory] {found['found']} of {found['num_sequences']} sequences of the set {name}: most of their "
            f"{LENGTH}-grams stand in the {share:.1%} of the pool that were looked at",
            flush=True,
        )


def collect(config: RunConfig) -> Inventory:
    """Hash and check the shards that the settings name."""
    pool = take_inventory({domain.name: domain.prefixes for domain in config.data.pool})
    validation = {name: _measured(name, prefix) for name, prefix in config.data.validation_prefixes.items()}
    test = _measured("test", config.data.test) if config.data.test else None
    inventory = Inventory(pool, validation, test)
    _check_distinct(inventory.records)
    _check_dtype(inventory.records)
    for record in inventory.records:
        check_token_ids(record, config.data.tokenizer.vocab_size)
    return inventory


def _measured(name: str, prefix: str) -> ShardRecord:
    [record] = take_inventory({name: [prefix]})
    return replace(record, mask_sha256=mask_digest(prefix))


def run_inventory(run_dir: Path, config: RunConfig) -> Inventory:
    """A run's inventory; that of the run it starts from if it has none of its own.

    :raises UserError: if there is none.
    """
    path = RunPaths(Path(run_dir)).inventory
    if not path.exists() and config.warmup.start_from:
        path = RunPaths(Path(config.warmup.start_from)).inventory
    return Inventory.read(path)


def _check_distinct(records: list[ShardRecord]) -> None:
    seen: dict[str, ShardRecord] = {}
    for record in records:
        if not record.num_sequences:
            raise UserError(f"shard {record.prefix} has no sequence in it; leave it out or build it again")
        first = seen.setdefault(record.digest, record)
        if first is not record:
            raise UserError(
                f"shards {first.prefix} ({first.domain}) and {record.prefix} ({record.domain}) are the same data: "
                "list it once, and keep validation and test data out of the pool"
            )


def _check_dtype(records: list[ShardRecord]) -> None:
    first = records[0]
    for record in records:
        if record.dtype != first.dtype:
            raise UserError(
                f"shard {record.prefix} has {record.dtype} tokens, {first.prefix} has {first.dtype}: were they made "
                "with the same tokenizer? build them all with one"
            )


def check_token_ids(record: ShardRecord, vocab_size: int) -> None:
    """:raises UserError: if a token id of some sequences, evenly spaced, is beyond the vocabulary."""
    found = beyond_vocabulary(Shard(record.prefix), vocab_size, _SAMPLED_SEQUENCES)
    if found:
        raise UserError(
            f"sequence {found[0]} of shard {record.prefix} has token id {found[1]}, but "
            f"data.tokenizer.vocab_size is {vocab_size}; give the size of the tokenizer the shard was made with"
        )
