"""Small random shards and run directories for tests of data and stages."""

from pathlib import Path

import numpy as np

from megatron_bliss.config import RunConfig, load_config, save_config
from megatron_bliss.data.shards import ShardRecord, ShardWriter, take_inventory

VOCAB_SIZE = 100


def write_shard(prefix: Path, num_sequences: int, seed: int, dtype: type = np.uint16, vocab: int = VOCAB_SIZE) -> str:
    """A shard of `num_sequences` documents of 1 to 20 random tokens."""
    rng = np.random.default_rng(seed)
    with ShardWriter(prefix, dtype) as writer:
        for length in rng.integers(1, 21, num_sequences):
            writer.add_document([rng.integers(0, vocab, length)])
    return str(prefix)


def records_of(directory: Path, sizes: dict[str, list[int]]) -> list[ShardRecord]:
    """Records of random shards: for each domain, one shard of each size."""
    prefixes = {
        domain: [
            write_shard(directory / f"{domain}{i}", size, seed=1000 * i + len(domain)) for i, size in enumerate(counts)
        ]
        for domain, counts in sizes.items()
    }
    return take_inventory(prefixes)


def fake_record(num_sequences: int, name: str = "shard", domain: str = "domain") -> ShardRecord:
    """A record without files, for what needs only the numbers in it."""
    return ShardRecord(name, domain, f"/nowhere/{name}", "uint16", num_sequences, num_sequences, name, name, [])


def write_run(directory: Path, sizes: dict[str, list[int]], overrides: list[str] | None = None) -> RunConfig:
    """`run.yaml` of a run over random shards, which lie in directory/../shards."""
    shards = directory.parent / "shards"
    if not shards.exists():
        for domain, counts in sizes.items():
            for i, size in enumerate(counts):
                write_shard(shards / f"{domain}{i}", size, seed=1000 * i + len(domain))
        write_shard(shards / "validation", 20, seed=77)
        write_shard(shards / "test", 20, seed=78)
    pool = [
        {"name": domain, "prefixes": [str(shards / f"{domain}{i}") for i in range(len(counts))]}
        for domain, counts in sizes.items()
    ]
    settings = directory.parent / f"{directory.name}.settings.yaml"
    settings.write_text(str({"data": {"pool": pool}}))  # a dict's repr is YAML
    config = load_config(
        settings,
        [
            f"data.validation={shards / 'validation'}",
            f"data.test={shards / 'test'}",
            f"data.tokenizer.vocab_size={VOCAB_SIZE}",
            "data.held_out=10",
            "rounds=2",
            *(overrides or []),
        ],
    )
    save_config(config, directory / "run.yaml")
    return config
