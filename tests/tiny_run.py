"""A pool, a validation set and settings so small that a whole run takes about a minute on two cores."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from megatron_bliss.config import (
    BilevelConfig,
    ControlConfig,
    DataConfig,
    DomainConfig,
    EvaluationConfig,
    FidelityConfig,
    LaunchConfig,
    ModelConfig,
    ProxyConfig,
    RunConfig,
    TargetConfig,
    TokenizerConfig,
    WarmupConfig,
    save_config,
)
from megatron_bliss.data.shards import ShardWriter

VOCAB_SIZE = 256
SEQUENCE_LENGTH = 32


def write_chain_shard(prefix: Path, num_sequences: int, seed: int, noise: float) -> str:
    """Sequences of a cyclic walk over the vocabulary, a share `noise` of their tokens random; lengths vary."""
    random = np.random.default_rng(seed)
    with ShardWriter(prefix, np.uint16) as writer:
        for _ in range(num_sequences):
            length = int(random.integers(SEQUENCE_LENGTH // 2, SEQUENCE_LENGTH + 1))
            tokens = (int(random.integers(VOCAB_SIZE)) + np.arange(length)) % (VOCAB_SIZE - 1)
            noisy = random.random(length) < noise
            tokens[noisy] = random.integers(0, VOCAB_SIZE - 1, noisy.sum())
            writer.add_document([tokens])
    return str(prefix)


def tiny_config(folder: Path, *, control: bool = True, rounds: int = 2) -> Path:
    """Write the data and `run.yaml` under `folder`; returns the path of the settings."""
    pool = {
        "walk": write_chain_shard(folder / "walk", 600, seed=1, noise=0.05),
        "noise": write_chain_shard(folder / "noise", 600, seed=2, noise=0.9),
    }
    config = RunConfig(
        seed=7,
        rounds=rounds,
        round_steps=6,
        data=DataConfig(
            pool=[DomainConfig(name, [prefix]) for name, prefix in pool.items()],
            validation=write_chain_shard(folder / "valid", 64, seed=3, noise=0.05),
            test=write_chain_shard(folder / "test", 64, seed=4, noise=0.05),
            tokenizer=TokenizerConfig(type="NullTokenizer", vocab_size=VOCAB_SIZE),
            sequence_length=SEQUENCE_LENGTH,
            held_out=20,
        ),
        target=TargetConfig(
            model=ModelConfig(preset="tiny", hidden_size=32, ffn_hidden_size=64),
            global_batch_size=4, micro_batch_size=2, lr=1e-3, lr_warmup_steps=2, save_interval=3, log_interval=1,
        ),
        proxy=ProxyConfig(model=ModelConfig(preset="tiny", hidden_size=32, ffn_hidden_size=64)),
        warmup=WarmupConfig(target_steps=6, proxy_steps=12, proxy_batch_size=4, proxy_lr=3e-3),
        bilevel=BilevelConfig(
            outer_steps=8, batch_size=8, validation_batch_size=8, micro_batch_size=4, lr_proxy=1e-3, lr_score=1e-3,
            checkpoint_interval=3,
        ),
        evaluation=EvaluationConfig(decay_steps=3, max_sequences=32, curve=True),
        fidelity=FidelityConfig(sequences=20),
        launch=LaunchConfig(concurrency=2, threads=1),
        controls=[ControlConfig(name="random", method="random", steps_factor=2)] if control else [],
    )  # fmt: skip
    path = folder / "config.yaml"
    save_config(config, path)
    return path


def command(*words: str | Path) -> list[str]:
    """`megatron-bliss …` with this interpreter."""
    return [sys.executable, "-m", "megatron_bliss.cli", *map(str, words)]


def megatron_bliss(*words: str | Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=timeout)
