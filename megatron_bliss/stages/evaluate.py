"""`evaluate`: the LLM's loss on the validation sets, the test set and every domain's held-out sequences.

The headline numbers are those of a decay branch, which is trained first, by Megatron, in the same processes.
"""

import gc
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_bliss import stopping
from megatron_bliss.artifacts import RunPaths, digest_tree, read_json, write_json
from megatron_bliss.config import DataConfig, RunConfig, read_saved_config, warmup_run
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.sampling import permute
from megatron_bliss.data.seeds import derive
from megatron_bliss.data.shards import ShardRecord, verify_shard
from megatron_bliss.data.slices import Slicing
from megatron_bliss.data.validation import ValidationSet
from megatron_bliss.errors import UserError
from megatron_bliss.mcore import checkpoint_files, checkpoints, parallel
from megatron_bliss.mcore.parallel import ParallelContext, agreed
from megatron_bliss.mcore.scorer import Pass, Sequences, ShardSequences, ValidationSequences, loss_measure, mean
from megatron_bliss.mcore.stopping import Vote
from megatron_bliss.progress import Progress
from megatron_bliss.stages.inventory import run_inventory
from megatron_bliss.stages.pretrain import decay_branch
from megatron_bliss.tracking import Job, track


def run(run_dir: Path, round_number: int) -> None:
    """Write `round-N/evaluation/results.json`. All ranks of the job call it.

    :raises UserError: without the round's checkpoint, where it does not fit the settings, or its loss is no number.
    """
    paths = RunPaths(Path(run_dir))
    config = read_saved_config(paths.config)
    decayed = decay_branch(paths.root, round_number)
    gc.collect()  # the trainer's model and optimizer
    torch.cuda.empty_cache()  # and their memory; nothing happens without a GPU
    context = parallel.initialize(config.target.tensor_parallel, config.target.sequence_parallel, config.seed)
    last = config.round_end(round_number)
    with agreed(context):
        inventory = run_inventory(paths.root, config)
        sets = measured_sets(config, inventory)
        measured = {"decay": decayed}
        if config.evaluation.curve:
            measured |= {str(checkpoint[0]): checkpoint[1] for checkpoint in line(paths, config, round_number)}
        digests = {name: digest_tree(checkpoint) for name, checkpoint in measured.items()} | {"": inventory.digest}
        losses = _read_partial(paths, round_number, digests)
    progress = Progress("evaluate", len(measured), "checkpoints", start=len(losses)) if context.is_first else None
    vote = Vote(context.device)
    for name, checkpoint in measured.items():
        if name in losses:
            continue
        losses[name] = evaluate(checkpoint, sets, config, context)
        if progress is not None:
            progress.report(len(losses), validation_loss=losses[name]["validation_loss"])
        with agreed(context):
            if context.is_first:
                partial = {"schema": 1, "checkpoints": digests, "losses": losses}
                write_json(_partial(paths, round_number), partial)
        if vote() and len(losses) < len(measured):
            stopping.leave("evaluate", len(losses), len(measured), "checkpoints")
    decay = losses.pop("decay")
    curve = [
        {"iteration": int(name), "tokens": _tokens(config, int(name)), **losses[name]}
        for name in sorted(losses, key=int)
    ]
    with agreed(context):
        if context.is_first:
            results = {"schema": 1, "iteration": last, "tokens_trained": _tokens(config, last), "decay": decay}
            write_json(paths.evaluation(round_number) / "results.json", results | {"curve": curve})
            tracker = track(Job(config, paths, "evaluate", round_number))
            for point in [*curve, {"iteration": last + config.evaluation.decay_steps, **decay}]:
                tracker.log(point["iteration"], _figures(point))
            tracker.close()
            _partial(paths, round_number).unlink(missing_ok=True)


def _figures(losses: Mapping[str, Any]) -> dict[str, float | None]:
    """A checkpoint's losses as trackers take them."""
    of_domains = {f"domain_loss/{name}": value for name, value in losses["domain_loss"].items()}
    of_sets = {f"validation_loss/{name}": one["loss"] for name, one in losses.get("validation_sets", {}).items()}
    return {name: losses[name] for name in ("validation_loss", "test_loss")} | of_sets | of_domains


def _partial(paths: RunPaths, round_number: int) -> Path:
    return paths.evaluation(round_number) / "partial.json"


def _read_partial(paths: RunPaths, round_number: int, digests: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Losses that an earlier call measured, by checkpoint, if they are of these checkpoints and sets."""
    path = _partial(paths, round_number)
    found = read_json(path) if path.exists() else {}
    return dict(found["losses"]) if found.get("checkpoints") == digests else {}


def line(paths: RunPaths, config: RunConfig, round_number: int) -> list[tuple[int, Path]]:
    """Iteration and place of the checkpoints that a round saved; the first round's begin with the warm-up's last."""
    first, last = config.round_end(round_number - 1), config.round_end(round_number)
    found = [
        (iteration, checkpoint_files.iteration_path(paths.target, iteration))
        for iteration in checkpoint_files.iterations(paths.target)
        if first < iteration <= last
    ]
    if round_number == 1 and first:
        found.insert(0, (first, checkpoint_files.iteration_path(warmup_run(config, paths).warmup_target, first)))
    return found


def _tokens(config: RunConfig, iteration: int) -> int:
    """Tokens the LLM was trained on up to an iteration."""
    return iteration * config.target.global_batch_size * config.data.sequence_length


def measured_sets(config: RunConfig, inventory: Inventory) -> dict[str, dict[str, Sequences]]:
    """The validation sets, the test set if there is one, and the domains' held-out sequences, by kind and name.

    :raises UserError: for a missing or changed shard or mask.
    """
    slicing = Slicing.of(config, inventory)
    sets: dict[str, dict[str, Sequences]] = {}
    sets["validation"] = {name: _validation(record, config) for name, record in inventory.validation.items()}
    sets["test"] = {"": _validation(inventory.test, config)} if inventory.test else {}
    sets["domain"] = {}
    for domain in config.data.pool:
        ids = slicing.held_out_ids(domain.name)
        records = [record for record in inventory.pool if record.domain == domain.name]
        sizes = np.array([len(ids[record.name]) for record in records])
        sample = _sample(int(sizes.sum()), config, domain.name)
        ends = np.cumsum(sizes)
        parts = [
            (verify_shard(record), ids[record.name][sample[(sample >= end - size) & (sample < end)] - (end - size)])
            for record, size, end in zip(records, sizes.tolist(), ends.tolist(), strict=True)
        ]
        sets["domain"][domain.name] = ShardSequences(parts)
    return sets


def _validation(record: ShardRecord, config: RunConfig) -> ValidationSequences:
    validation = ValidationSet.of(record)
    return ValidationSequences(validation, _sample(len(validation), config, Path(record.prefix).name))


def _sample(size: int, config: RunConfig, name: str) -> np.ndarray:
    """At most `evaluation.max_sequences` of 0 … size-1, ascending, the same in every round and arm."""
    count = min(size, config.evaluation.max_sequences)
    if not count:
        return np.empty(0, dtype=np.int64)
    return np.sort(permute(np.arange(count), size, derive(config.seed, "evaluate", name)))


def evaluate(
    checkpoint: Path, sets: Mapping[str, Mapping[str, Sequences]], config: RunConfig, context: ParallelContext
) -> dict[str, Any]:
    """Mean losses per predicted token, None for a set without any. All ranks call it.

    :raises UserError: where one is no number.
    """
    model = checkpoints.load_target(checkpoint, context, config.target.model, config.data.tokenizer.vocab_size)
    forward, measure = Pass(context, config.data.sequence_length, config.scoring.batch_tokens), loss_measure(model)
    losses = {
        kind: {name: mean(forward.totals(measure, sequences)) for name, sequences in by_name.items()}
        for kind, by_name in sets.items()
    }
    refuse_divergence(losses, checkpoint)
    validation = over_sets(losses["validation"], config.data)
    return validation | {"test_loss": losses["test"].get(""), "domain_loss": losses["domain"]}


def refuse_divergence(losses: Mapping[str, Mapping[str, float | None]], checkpoint: Path) -> None:
    """:raises UserError: if a loss is infinite or no number: nothing that follows could be compared."""
    for kind, by_name in losses.items():
        for name, loss in by_name.items():
            if loss is not None and not math.isfinite(loss):
                raise UserError(
                    f"the loss of {checkpoint} on the {kind} set {name or 'of the run'} is {loss}: the training has "
                    "diverged; start a new run with a lower target.lr, or with gradients that are clipped at less"
                )


def over_sets(losses: Mapping[str, float | None], data: DataConfig) -> dict[str, Any]:
    """`validation_loss` and, of several sets, `validation_sets` with loss and weight of each.

    The former is Σ weight × loss; with `worst-case` all weight is on the highest loss.
    """
    if len(losses) == 1:
        return {"validation_loss": next(iter(losses.values()))}
    known, weights = {name: loss or 0.0 for name, loss in losses.items()}, data.validation_weights
    if data.validation_weighting == "worst-case":
        worst = max(known, key=lambda name: known[name])
        weights = {name: float(name == worst) for name in known}
    return {
        "validation_loss": sum(weights[name] * loss for name, loss in known.items()),
        "validation_sets": {name: {"loss": losses[name], "weight": weights[name]} for name in known},
    }
