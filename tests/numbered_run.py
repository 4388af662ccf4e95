"""A run of two rounds over shards in which no token is in two places, scored and selected, ready to be trained."""

from pathlib import Path

import numpy as np

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.config import RunConfig, load_config, save_config
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.scores import ScoreWriter
from megatron_bliss.data.slices import Slicing
from megatron_bliss.stages import inventory, select
from tests.selections import write_numbered_shard
from tests.tiny_run import tiny_config

ROUNDS, STEPS, BATCH, LENGTH = 2, 5, 4, 32


def numbered_run(folder: Path, *overrides: str, script: Path | None = None) -> tuple[RunPaths, RunConfig]:
    """Shards `a` and `b` of 120 sequences of 5 to 40 tokens; every round keeps half of its slice; no warm-up."""
    prefixes = [write_numbered_shard(folder / name, 120, 10 + 5000 * i, i) for i, name in enumerate(("a", "b", "v"))]
    pool = ",".join(f"{{name: {Path(prefix).name}, prefixes: [{prefix}]}}" for prefix in prefixes[:2])
    settings = tiny_config(folder / "unused", control=False)
    config = load_config(
        settings,
        [
            f"rounds={ROUNDS}", f"round_steps={STEPS}", "method=perplexity", f"data.pool=[{pool}]",
            f"data.validation={prefixes[2]}", f"data.test={write_numbered_shard(folder / 't', 20, 20, 9)}",
            "data.tokenizer.vocab_size=15000", f"data.sequence_length={LENGTH}", "data.held_out=10",
            "warmup.target_steps=0", "selection.fraction=0.5", "target.save_interval=3",
            *([f"target.script={script}"] if script else []), *overrides,
        ],
    )  # fmt: skip
    paths = RunPaths(folder / "run")
    save_config(config, paths.config)
    inventory.run(paths.root)
    for number in range(1, ROUNDS + 1):
        write_scores(paths, config, number)
        select.run(paths.root, number)
    return paths, config


def write_scores(paths: RunPaths, config: RunConfig, number: int) -> None:
    """Random scores with many ties."""
    known = Inventory.read(paths.inventory)
    wanted = Slicing.of(config, known).ids_by_name(number)
    writer = ScoreWriter(
        paths.scores(number), known.pool, wanted,
        method="perplexity-low", model_digest="0", seed=config.seed, chunk_sequences=64,
    )  # fmt: skip
    for chunk in writer.pending():
        draws = np.random.default_rng(len(chunk.ids)).integers(0, 30, len(chunk.ids))
        writer.write(chunk, draws.astype(np.float32))
