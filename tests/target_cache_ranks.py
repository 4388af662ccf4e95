"""Ranks' work for tests/test_target_cache.py: a target's checkpoint, its cache in several layouts, the loop with it."""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing

from megatron_bliss.artifacts import RunPaths, digest_file
from megatron_bliss.config import RunConfig, read_saved_config
from megatron_bliss.data.target_cache import CacheWriter
from megatron_bliss.errors import UserError
from megatron_bliss.mcore import checkpoint_files, parallel
from megatron_bliss.mcore.architectures import padded_vocab_size, resolve
from megatron_bliss.mcore.models import build_language_model
from megatron_bliss.stages import bilevel, cache_target, warmup_proxy
from tests.bilevel_ranks import metrics
from tests.side_models import edit_config, randomise

LAYOUTS = {  # on two ranks
    "tp": {"target__tensor_parallel": 2},
    "sp": {"target__tensor_parallel": 2, "target__sequence_parallel": True},
    "pp": {"target__pipeline_parallel": 2},
    "dp": {},
}


def save_target(run: Path, seed: int) -> None:
    """A checkpoint as pretrain() would leave it at the end of the warm-up."""
    config = read_saved_config(RunPaths(run).config)
    context = parallel.initialize(1, False, seed=seed)
    target = build_language_model(config.target.model, config.data.tokenizer.vocab_size, context)
    randomise(target)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.mul_(1 + seed / 100)
    path = checkpoint_files.iteration_path(RunPaths(run).warmup_target, config.round_end(0))
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    dist_checkpointing.save({"model": target.sharded_state_dict(), "args": _arguments(config)}, str(path))
    checkpoint_files.write_iteration(RunPaths(run).warmup_target, config.round_end(0))


def _arguments(config: RunConfig) -> argparse.Namespace:
    architecture = resolve(config.target.model)
    return argparse.Namespace(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        kv_channels=architecture.head_size,
        normalization=architecture.normalization,
        layernorm_epsilon=architecture.norm_epsilon,
        swiglu=False,
        add_bias_linear=True,
        position_embedding_type="rope",
        rotary_percent=architecture.rotary_percent,
        rotary_base=architecture.rotary_base,
        untie_embeddings_and_output_weights=True,
        padded_vocab_size=padded_vocab_size(config.data.tokenizer.vocab_size),
    )


def cache_bytes(run: Path) -> dict[str, str]:
    """Digests of the files of round 1's cache."""
    return {path.name: digest_file(path) for path in sorted(RunPaths(run).target_cache(1).iterdir())}


def dense(run: Path) -> np.ndarray:
    """Probabilities of all ids of all tokens as round 1's cache has them, zero where it does not say; the rest last."""
    directory = RunPaths(run).target_cache(1)
    found = []
    for path in sorted(directory.glob("*.ids.npy")):
        ids = np.load(path, allow_pickle=False).astype(np.int64)
        probabilities = np.exp(np.load(str(path).replace(".ids.", ".log_probs."), allow_pickle=False))
        whole = np.zeros((len(ids), 257))
        np.put_along_axis(whole, ids, probabilities[:, :-1], axis=1)
        whole[:, -1] = probabilities[:, -1]
        found.append(whole)
    return np.concatenate(found)


def copy(run: Path, name: str, **settings: Any) -> Path:
    """The run up to its warm-up, with other settings."""
    other = run.parent / name
    shutil.copytree(run, other)
    edit_config(other, **settings)
    return other


def _refusal(work: Callable[[], None]) -> str:
    try:
        work()
    except UserError as error:
        return str(error)
    return "it ran"


def one_rank(rank: int, run: Path) -> dict[str, Any]:
    save_target(run, seed=1)
    warmup_proxy.run(run)
    results: dict[str, Any] = {"live": _learn(run, "live", bilevel__kl_source="live")}
    results["missing"] = _refusal(lambda: bilevel.run(copy(run, "missing"), 1))
    cases: dict[str, dict[str, Any]] = {
        "everything": {"bilevel__kl_top_k": 256},
        "some": {},
        "reverse": {"bilevel__kl_top_k": 256, "bilevel__kl_direction": "proxy_target"},
        "finite-difference": {"bilevel__kl_top_k": 256, "bilevel__curvature": "finite-difference"},
        "exact": {"bilevel__kl_top_k": 256, "bilevel__curvature": "exact", "bilevel__outer_steps": 3},
    }
    for name, settings in cases.items():
        results[name] = _learn(run, name, cached=True, **settings)
    for name in ("reverse", "finite-difference", "exact"):
        results[f"live {name}"] = _learn(run, f"live-{name}", **cases[name], bilevel__kl_source="live")
    results["dense"] = dense(run.parent / "some")
    results["resumed"] = _killed(copy(run, "killed")), cache_bytes(run.parent / "some")
    results["changed"] = _changed(run.parent / "killed")
    return results


def _learn(run: Path, name: str, cached: bool = False, **settings: Any) -> list[str]:
    """Metrics of round 1."""
    other = copy(run, name, **settings)
    if cached:
        cache_target.run(other, 1)
    bilevel.run(other, 1)
    return metrics(other)


def _killed(run: Path) -> dict[str, str]:
    """The cache of a writer that was stopped in its second chunk and called again."""
    write = CacheWriter.write

    def write_and_die(self: CacheWriter, chunk: int, known: Any) -> None:
        if chunk == 1:
            raise KeyboardInterrupt
        write(self, chunk, known)

    CacheWriter.write = write_and_die  # type: ignore[method-assign]
    try:
        cache_target.run(run, 1)
    except KeyboardInterrupt:
        begun = cache_bytes(run)
        assert "manifest.json" not in begun
        assert "chunk-00000.json" in begun
    finally:
        CacheWriter.write = write  # type: ignore[method-assign]
    refusal = _refusal(lambda: bilevel.run(run, 1))
    assert "not finished" in refusal, refusal
    first = RunPaths(run).target_cache(1) / "chunk-00000.ids.npy"
    untouched = first.stat().st_mtime_ns
    cache_target.run(run, 1)
    assert first.stat().st_mtime_ns == untouched
    cache_target.run(run, 1)  # finished: nothing changes
    return cache_bytes(run)


def _changed(run: Path) -> dict[str, Any]:
    """What is said of a damaged cache, and of one of another target; and after the stage ran again."""
    path = RunPaths(run).target_cache(1) / "chunk-00000.log_probs.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found: dict[str, Any] = {"damaged": _refusal(lambda: bilevel.run(run, 1))}
    path.write_bytes(content)
    before = cache_bytes(run)
    save_target(run, seed=2)
    found["target"] = _refusal(lambda: bilevel.run(run, 1))
    cache_target.run(run, 1)
    found["other bytes"] = cache_bytes(run)["chunk-00000.log_probs.npy"] != before["chunk-00000.log_probs.npy"]
    found["runs"] = _refusal(lambda: bilevel.run(run, 1))
    edit_config(run, bilevel__batch_size=4)
    found["sample"] = _refusal(lambda: bilevel.run(run, 1))
    return found


def two_ranks(rank: int, run: Path) -> dict[str, Any]:
    """The cache in every layout, and the loop at TP 2 with it."""
    results: dict[str, Any] = {}
    for name, settings in LAYOUTS.items():
        if rank == 0:
            copy(run, name, **settings)
        torch.distributed.barrier() if torch.distributed.is_initialized() else _join()
        cache_target.run(run.parent / name, 1)
        torch.distributed.barrier()
        results[name] = dense(run.parent / name)
    if rank == 0:
        edit_config(run.parent / "pp", proxy__tensor_parallel=2)
    torch.distributed.barrier()
    bilevel.run(run.parent / "pp", 1)
    return results | {"loop": metrics(run.parent / "pp")}


def _join() -> None:
    parallel.initialize(1, False, seed=1)
    torch.distributed.barrier()
