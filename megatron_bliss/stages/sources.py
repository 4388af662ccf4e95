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
    """The LLM that a round's selection is made with: the iter_… directory of its pinned iteration."""
    return target_at(paths, config, target_iteration(paths, config, round_number))


def target_at(paths: RunPaths, config: RunConfig, iteration: int) -> Path:
    """The LLM's iter_… directory at an iteration."""
    directory = paths.target if iteration > config.round_end(0) else warmup_run(config, paths).warmup_target
    return checkpoint_files.iteration_path(directory, iteration)


def target_iteration(paths: RunPaths, config: RunConfig, round_number: int) -> int:
    """The one that was pinned, else the last of the round before; of round 1, the warm-up's last."""
    path = paths.pinned_target(round_number)
    return int(read_json(path)["iteration"]) if path.exists() else config.round_end(round_number - 1)


def pin_target(paths: RunPaths, config: RunConfig, round_number: int) -> None:
    """With `launch.mode=overlap`, choose the newest checkpoint of the LLM that there is up to the end of the round
    before, for good: a stage that is called again goes on with it. Checkpoints that only a stop has made do not count.
    One process calls it, before the others look."""
    path = paths.pinned_target(round_number)
    if config.launch.mode != "overlap" or path.exists():
        return
    last, kept = config.round_end(round_number - 1), read_iteration(paths.target) or 0
    passing = checkpoint_files.passing(paths.target)
    staying = [iteration for iteration in checkpoint_files.iterations(paths.target) if iteration not in passing]
    iteration = max((one for one in staying if one <= min(kept, last)), default=config.round_end(0))
    write_json(path, {"schema": 1, "iteration": iteration, "staleness": last - iteration})


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
