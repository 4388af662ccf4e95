"""Ranks' work for tests/test_scorer.py: the score stage and the tool on small runs."""

import contextlib
import io
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.config import read_saved_config
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.errors import UserError
from megatron_bliss.mcore import checkpoints, parallel
from megatron_bliss.mcore.score_model import build_score_model
from megatron_bliss.stages import score, score_shards, select
from tests.side_models import edit_config, read_scores, save_score_model


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def printed(action: Any, *arguments: Any) -> str:
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        action(*arguments)
    return stream.getvalue()


def refusal(action: Any, *arguments: Any) -> str:
    try:
        action(*arguments)
    except UserError as error:
        return str(error)
    return "nothing"


def one_rank(rank: int, folder: Path) -> dict[str, Any]:
    run = folder / "run"
    results: dict[str, Any] = {"printed": printed(score.run, run, 1)}
    results["again"] = printed(score.run, run, 1)
    results["files"], results["scores"] = files_of(RunPaths(run).scores(1)), read_scores(run)
    results |= {f"tool: {name}": value for name, value in _tool(folder).items()}
    edit_config(run, scoring__bf16=True)
    score.run(run, 1)
    results["bf16"] = read_scores(run)
    results["threads"] = [thread.name for thread in threading.enumerate() if thread.name == "read-ahead"]
    results["refused"] = _refused(folder)
    context, config = parallel.initialize(1, False, seed=9), read_saved_config(RunPaths(run).config)
    select.run(run, 1)
    other = build_score_model(config.proxy.model, config.data.tokenizer.vocab_size, context)
    checkpoints.save(RunPaths(run).bilevel(1), 2, {checkpoints.SCORE: other}, {}, {})
    results["refused"]["model"] = refusal(select.run, run, 1)
    return results


def _tool(folder: Path) -> dict[str, Any]:
    run, out, same = folder / "run", folder / "scores", folder / "same"
    pool = Inventory.read(RunPaths(run).inventory).pool
    prefixes = [record.prefix for record in pool]
    config, checkpoint = score_shards.of_run(run, 1, [])
    results: dict[str, Any] = {"dry run": score_shards.describe(prefixes, config, checkpoint)}
    score_shards.run(prefixes, config, checkpoint, out)
    results["scores"] = {record.name: np.load(out / f"{record.name}.npy") for record in pool}
    copied = shutil.copytree(RunPaths(run).bilevel(1), folder / "given")
    results["lost"] = refusal(score_shards.of_checkpoint, copied, None, [])
    score_shards.run(prefixes, *score_shards.of_checkpoint(copied, RunPaths(run).config, []), same)
    score_shards.of_checkpoint(RunPaths(run).bilevel(1), None, [])
    results["same"] = files_of(out) == files_of(same)
    other = score_shards.of_run(run, 1, ["scoring.bf16=true"])
    results["other model"] = refusal(score_shards.run, prefixes, *other, out)
    results["other shards"] = refusal(score_shards.run, prefixes[:1], config, checkpoint, out)
    results["kept"] = files_of(out) == files_of(same)
    narrow = score_shards.of_run(run, 1, ["data.tokenizer.vocab_size=100"])
    results["vocabulary"] = refusal(score_shards.run, prefixes, *narrow, folder / "narrow")
    results["random"] = refusal(score_shards.of_run, run, 1, ["method=random"])
    return results


def _refused(folder: Path) -> dict[str, str]:
    """What the stage says to a diverged model, and to a shard that was changed."""
    run = folder / "refused"
    paths, config = RunPaths(run), read_saved_config(RunPaths(run).config)
    context = parallel.initialize(1, False, seed=4)
    model = build_score_model(config.proxy.model, config.data.tokenizer.vocab_size, context)
    with torch.no_grad():
        model.score_head.bias.fill_(float("nan"))
    checkpoints.save(paths.bilevel(1), 2, {checkpoints.SCORE: model}, {}, {})
    found = {"nan": refusal(score.run, run, 1)}
    found["left"] = " ".join(path.name for path in paths.scores(1).rglob("*") if path.suffix in (".npy", ".claim"))
    prefix = Path(config.data.pool[0].prefixes[0])
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[0] ^= 1
    Path(f"{prefix}.bin").write_bytes(content)
    found["changed shard"] = refusal(score.run, run, 1)
    Path(f"{prefix}.bin").write_bytes(content[:-2])
    found["truncated shard"] = refusal(score.run, run, 1)
    return found


def two_ranks(rank: int, folder: Path) -> dict[str, bytes]:
    """Two data-parallel ranks score what one has scored."""
    score.run(folder / "two", 1)
    return files_of(RunPaths(folder / "two").scores(1))


def save_checkpoint(rank: int, folder: Path) -> None:
    save_score_model(folder)
