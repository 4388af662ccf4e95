"""`warmup-target` and `pretrain`: the LLM's training by Megatron's own trainer, on a selection; and its decay branch.

Every rank of the job calls these functions; the training runs in this process. A stage is complete when the checkpoint
of its last iteration is there. One that was killed or stopped goes on from the newest checkpoint, to the same numbers.
A checkpoint that a stop added is removed when there is a newer one: the line keeps those that an undisturbed one has.
"""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from megatron_bliss import stopping
from megatron_bliss.artifacts import RunPaths, atomic_write, digest_tree, read_json, write_json
from megatron_bliss.config import RunConfig, read_saved_config, warmup_run
from megatron_bliss.data.selection import Selection
from megatron_bliss.errors import UserError
from megatron_bliss.mcore.arguments import Files, decay_arguments, split_blends, training_arguments
from megatron_bliss.mcore.checkpoint_files import (
    find,
    iteration_path,
    mend_latest,
    note_passing,
    read_iteration,
    remove_passing,
    write_iteration,
)
from megatron_bliss.mcore.online import OnlineJob
from megatron_bliss.mcore.online import install as install_online
from megatron_bliss.mcore.script import PACKAGED_SCRIPT, run_script
from megatron_bliss.methods import online_method
from megatron_bliss.stages.sources import resume
from megatron_bliss.tracking import Job, script_arguments
from megatron_bliss.tracking import environment as tracking_environment


def run(run_dir: Path, round_number: int) -> None:
    """Train the LLM through one round; round 0 is the warm-up, on the warm-up's selection.

    :raises UserError: if the selection or settings cannot be used.
    :raises SystemExit: if Megatron stopped before the round's last iteration: with code 3 if it was asked to.
    """
    paths = RunPaths(Path(run_dir))
    config = read_saved_config(paths.config)
    save, selection = line_and_selection(paths, round_number)
    start = warmup_run(config, paths).warmup_target if round_number else None
    end = config.round_end(round_number)
    _remember_selection(save, round_number, selection)
    resumed = read_iteration(save)
    if resumed is not None and resumed >= end:
        _say(f"[pretrain] {save} is already at iteration {resumed}")
        return
    # without a warm-up the first round starts from the initialisation
    load = save if resumed is not None else start if config.warmup.target_steps else None
    files = Files(_data_file(save), paths.index_cache, save, load)
    online = _online(config, paths.online(round_number) / "metrics.jsonl") if round_number else None
    # a step that chooses among its whole global batch reads it at once, so its micro-batches cannot be told apart
    looks_ahead = online is not None and config.online.scope == "global-batch"
    metrics = None if looks_ahead else paths.training_metrics(round_number)
    job = Job(config, paths, "pretrain" if round_number else "warmup-target", round_number or None)
    os.environ.update(tracking_environment(job))  # read by wandb, which Megatron calls
    arguments = [*training_arguments(config, files), *script_arguments(job)]
    _train(config, selection, files, arguments, end, online, metrics)


def line_and_selection(paths: RunPaths, round_number: int) -> tuple[Path, Path]:
    """Directories of the checkpoints that a round adds to, and of the selection that it trains on."""
    if round_number == 0:
        return paths.warmup_target, paths.warmup_selection
    return paths.target, paths.selection(round_number)


def decay_branch(run_dir: Path, round_number: int) -> Path:
    """Take the LLM at the end of a round down to the minimal learning rate, aside from the main line.

    It starts afresh where the round's last checkpoint or its selection has changed.

    :returns: the directory of the branch's last checkpoint; the round's own where `evaluation.decay_steps` is 0.
    :raises UserError: if the selection or settings cannot be used.
    :raises SystemExit: if Megatron stopped before the branch's last iteration: with code 3 if it was asked to.
    """
    paths = RunPaths(Path(run_dir))
    config = read_saved_config(paths.config)
    start = config.round_end(round_number)
    trunk, selection = line_and_selection(paths if round_number else warmup_run(config, paths), round_number)
    if config.evaluation.decay_steps == 0:
        return iteration_path(trunk, start)
    save, end = paths.evaluation(round_number) / "decay", start + config.evaluation.decay_steps
    trunk_digest = digest_tree(find(iteration_path(trunk, start)))
    sources = {"target": trunk_digest, "selection": Selection.open(selection, in_full=False).digest}
    resumed = resume("evaluate", save, sources, _is_first())
    if resumed != end:
        fresh = paths.evaluation(round_number) / "start"
        load = save if resumed is not None else _branching_point(trunk, start, fresh)
        # with an index cache of its own, as the next round may be using the run's
        files = Files(_data_file(save), paths.evaluation(round_number) / "index-cache", save, load)
        online = _online(config) if round_number else None
        _train(config, selection, files, decay_arguments(config, round_number, files), end, online)
    return iteration_path(save, end)


def _branching_point(trunk: Path, iteration: int, directory: Path) -> Path:
    """A directory whose newest checkpoint is that of `iteration`, by a link: a next round may be writing the trunk."""
    if _is_first():
        directory.mkdir(parents=True, exist_ok=True)
        link = iteration_path(directory, iteration)
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(iteration_path(trunk, iteration), directory))
        write_iteration(directory, iteration)
    return directory


def _remember_selection(save: Path, round_number: int, selection: Path) -> None:
    """Note beside the checkpoints what each round was trained on.

    :raises UserError: if the round was begun on another selection: its steps cannot be taken back.
    """
    if not _is_first():
        return
    path, digest = save.with_name(f"{save.name}-selections.json"), Selection.open(selection, in_full=False).digest
    known = read_json(path)["rounds"] if path.exists() else {}
    if known.setdefault(str(round_number), digest) != digest:
        raise UserError(
            f"{selection} is not the selection that round {round_number} of {save} was begun with; put that one back, "
            "or start a new run with --run DIR"
        )
    write_json(path, {"schema": 1, "rounds": known})


def _data_file(save: Path) -> Path:
    return save.with_name(f"{save.name}-data.json")


def _online(config: RunConfig, metrics: Path | None = None) -> OnlineJob | None:
    """The choice of tokens in a round or, without metrics, on its decay branch, where the reference stays as it is."""
    method = online_method(config.online)
    if method is None:
        return None
    weights = config.data.validation_weights
    sets = [(weights[name], prefix) for name, prefix in config.data.validation_prefixes.items()]
    return OnlineJob(config.online, method, sets, metrics, holds=metrics is None)


def _train(
    config: RunConfig,
    selection: Path,
    files: Files,
    arguments: Sequence[str],
    end: int,
    online: OnlineJob | None,
    metrics: Path | None = None,
) -> None:
    """:param metrics: where the loss by domain is noted, of the tokens that carry loss; None: nowhere."""

    def before() -> None:
        # first, as it is then called last: it sees the tokens that were chosen, and no pass of the reference
        if metrics is not None:
            from megatron_bliss.mcore import domain_loss

            domain_loss.install(metrics, Selection.open(selection, in_full=False).domain)
        if online is not None:
            install_online(online)
        from megatron_bliss.mcore.stopping import install as install_stop

        install_stop(partial(_note_passing, files.save, end))

    if _is_first():
        write_blends(files.data, selection, config)
        mend_latest(files.save)
        remove_passing(files.save)
        _mend_index_cache(files.index_cache)
    began = read_iteration(files.save)
    try:
        run_script(Path(config.target.script or PACKAGED_SCRIPT), arguments, selection, before)
    except SystemExit as ended:  # how Megatron ends at a transition
        if ended.code:
            raise
    reached = read_iteration(files.save)
    if reached is None or reached <= (began or 0) < end:
        raise SystemExit(f"Megatron stopped at iteration {reached} of {end}; run the stage again to go on")
    if reached < end:
        stopping.leave("pretrain", reached, end, "iterations")
    if _is_first():
        remove_passing(files.save)


def _note_passing(save: Path, end: int, iteration: int) -> None:
    """Before a checkpoint is written that is only there because the training is stopped."""
    if _is_first() and iteration != end:
        note_passing(save, iteration)


def write_blends(path: Path, selection: Path, config: RunConfig) -> None:
    """The file for --per-split-data-args-path."""
    # a blend of several would be empty, which Megatron's samplers refuse
    validation = next(iter(config.data.validation_prefixes.values()))
    blends = split_blends(Selection.open(selection, in_full=False).blend, validation)
    with atomic_write(path, "w") as stream:
        json.dump(blends, stream, indent=1)


def _mend_index_cache(directory: Path) -> None:
    """Remove what a kill left half-written: Megatron takes an index that is there for whole."""
    for path in directory.glob("*.npy"):
        try:
            np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError):
            path.unlink()


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(line: str) -> None:
    if _is_first():
        print(line, flush=True)
