"""What a stage's checkpoints were made from, so that they are continued only while that is the same; and which model
a round's scores are made by.

`sources.json` lies with the checkpoints and is written before the first of them.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_bliss.artifacts import RunPaths, read_json, write_json
from megatron_bliss.config import RunConfig, proxy_run, warmup_run
from megatron_bliss.errors import UserError
from megatron_bliss.mcore import checkpoint_files
from megatron_bliss.mcore.checkpoint_files import read_iteration
from megatron_bliss.methods import offline_method


def resume(stage: str, directory: Path, sources: Mapping[str, str], is_first: bool) -> int | None:
    """Iteration to go on from: of the newest checkpoint made from these sources, or None.

    What was made from others is removed with the whole directory. Every rank may call it without waiting for another:
    `sources.json` names the new sources only once the old checkpoints are gone.

    :param sources: digests by name, equal on all ranks.
    :param is_first: whether this rank is the one that removes and writes.
    """
    path = directory / "sources.json"
    known = _read(path)
    if known == sources:
        return read_iteration(directory)
    if is_first:
        if read_iteration(directory) is not None:
            changed = sorted(name for name in known.keys() | sources.keys() if known.get(name) != sources.get(name))
            print(f"[{stage}] starting afresh: {directory} was made from another {' and '.join(changed)}", flush=True)
        if directory.exists():
            shutil.rmtree(directory)
        write_json(path, {"schema": 1, "sources": dict(sources)})
    return None


def target_checkpoint(paths: RunPaths, config: RunConfig, round_number: int) -> Path:
    """The LLM as the round before this one left it, or the warm-up: its iter_… directory."""
    if round_number > 1:
        return checkpoint_files.iteration_path(paths.target, config.round_end(round_number - 1))
    return checkpoint_files.iteration_path(warmup_run(config, paths).warmup_target, config.round_end(0))


def model_directory(paths: RunPaths, config: RunConfig, round_number: int) -> Path:
    """Where what a round's scores are made by lies."""
    learns = offline_method(config).learns
    if learns == "bilevel":
        return paths.bilevel(round_number)
    if learns == "influence":
        return paths.influence_model(round_number)
    if learns == "ngrams":
        return paths.ngrams(round_number)
    return proxy_run(config, paths).warmup_proxy


def is_model(directory: Path) -> bool:
    """Whether there is one, complete: a checkpoint, or fitted n-grams."""
    return (directory / "manifest.json").is_file() or read_iteration(directory) is not None


def find_model(directory: Path) -> Path:
    """The directory whose files are the model, to be digested.

    :raises UserError: if there is none.
    """
    return directory if (directory / "manifest.json").is_file() else checkpoint_files.find(directory)


def _read(path: Path) -> dict[str, str]:
    try:
        return dict(read_json(path)["sources"])
    except UserError:  # not there, or the first rank is just removing it: whatever lies beside it is of unknown origin
        return {}
