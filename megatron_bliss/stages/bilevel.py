"""`bilevel`: learn the score model of a round with the bilevel loop."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_bliss import stopping
from megatron_bliss.artifacts import RunPaths, digest_tree
from megatron_bliss.bilevel.curvature import Pool, check_exact, make_curvature
from megatron_bliss.bilevel.loop import BilevelLoop, LoopSettings
from megatron_bliss.bilevel.set_weights import SetWeights
from megatron_bliss.bilevel.solvers import Averaged, ConjugateGradient, Paper, Solver
from megatron_bliss.bilevel.space import ParameterSpace, group_size
from megatron_bliss.config import BilevelConfig, DataConfig, RunConfig, read_saved_config
from megatron_bliss.data.target_cache import Known, TargetCache
from megatron_bliss.mcore import checkpoint_files, checkpoints, parallel
from megatron_bliss.mcore.losses import VocabShard
from megatron_bliss.mcore.lower_level import MegatronLowerLevel, MegatronUpperLevel, MicroBatch
from megatron_bliss.mcore.models import build_language_model
from megatron_bliss.mcore.parallel import ParallelContext, agreed, same
from megatron_bliss.mcore.read_ahead import read_ahead
from megatron_bliss.mcore.score_model import build_score_model
from megatron_bliss.mcore.space import MegatronSpace
from megatron_bliss.mcore.stopping import Vote
from megatron_bliss.progress import MetricsLog, Progress
from megatron_bliss.stages.bilevel_data import BilevelData, BilevelDraws
from megatron_bliss.stages.cache_target import purpose_of
from megatron_bliss.stages.guards import trusted_round
from megatron_bliss.stages.inventory import run_inventory
from megatron_bliss.stages.side_training import adam_settings
from megatron_bliss.stages.sources import pin_target, resume, target_checkpoint
from megatron_bliss.stages.warmup_proxy import proxy_directory
from megatron_bliss.tracking import Job, track

Loop = BilevelLoop[MicroBatch]


def run(run_dir: Path, round_number: int) -> None:
    """Write `round-N/bilevel` (proxy, score model, the loop's vectors, metrics.jsonl), or finish it.

    It starts afresh where the data or a checkpoint it starts from has changed. All ranks call it.

    :raises UserError: without the checkpoints it starts from, or where a batch cannot be shared by the ranks.
    """
    paths = RunPaths(Path(run_dir))
    config = read_saved_config(paths.config)
    settings, directory = config.bilevel, paths.bilevel(round_number)
    context = parallel.initialize(config.proxy.tensor_parallel, config.proxy.sequence_parallel, config.seed)
    with agreed(context):
        if context.is_first:
            pin_target(paths, config, round_number)
    with agreed(context):
        inventory = run_inventory(paths.root, config)
        draws = BilevelDraws(config, inventory, round_number)
        data, cache = BilevelData(config, draws, context), open_cache(paths, config, draws, round_number)
        sources = {"inventory": inventory.digest} | starting_points(paths, config, round_number)
        sources |= {"cached target": cache.digest} if cache else {}
        done = resume("bilevel", directory, sources, context.is_first) or 0
    done = same(context, done, f"the number of steps in {directory}")
    if done >= settings.outer_steps:
        return
    loop, models = build(paths, config, round_number, context, is_fresh=not done)
    if done:
        lower, upper = loop.vectors()
        vectors = {checkpoints.MODEL: lower, checkpoints.SCORE: upper}
        loop.load(lower, upper, checkpoints.load(directory, models, vectors))
    if settings.curvature == "exact":
        _check_exact(loop, data.pool(done, cache.read(done, data.rows) if cache else None))
    progress = Progress("bilevel", settings.outer_steps, start=done) if context.is_first else None
    tracker = track(Job(config, paths, "bilevel", round_number), context.is_first, done)
    log = MetricsLog(directory / "metrics.jsonl", done, tracker.log) if context.is_first else None
    num_tokens, vote = 0, Vote(context.device)
    shown: dict[str, float] = {}  # the latest; not all are there in every step
    for known in _known(cache, data.rows, range(done, settings.outer_steps)):
        began = time.monotonic()
        pool = data.pool(loop.steps_done, known)
        sets = data.validation(loop.steps_done) if loop.solves_next else []
        metrics = loop.step(pool, *sets)
        step_tokens = int(pool[0].num_tokens + sum(batches[0].num_tokens for batches in sets))
        num_tokens += step_tokens
        if progress is not None and log is not None:
            log.write(loop.steps_done, **metrics, tokens_per_second=step_tokens / (time.monotonic() - began))
            shown |= {name: metrics[name] for name in _SHOWN if name in metrics}
            progress.report(loop.steps_done, num_tokens, **shown)
        is_last = loop.steps_done == settings.outer_steps
        stops = vote() and not is_last
        if loop.steps_done % settings.checkpoint_interval == 0 or is_last or stops:
            lower, upper = loop.vectors()
            vectors = {checkpoints.MODEL: lower, checkpoints.SCORE: upper}
            checkpoints.save(directory, loop.steps_done, models, vectors, loop.scalars(), keep=1)
        if stops:
            stopping.leave("bilevel", loop.steps_done, settings.outer_steps)


def open_cache(paths: RunPaths, config: RunConfig, draws: BilevelDraws, round_number: int) -> TargetCache | None:
    """The round's cached target, where the settings ask for one.

    :raises UserError: if it is missing, or of another target or sample.
    """
    if not config.bilevel.uses_cached_target:
        return None
    return TargetCache(paths.target_cache(round_number), purpose_of(paths, config, draws, round_number))


def _known(cache: TargetCache | None, rows: range, steps: range) -> Iterator[list[Known] | None]:
    """Of the target at the sequences `rows` of each step, read ahead; None where it is in the loop itself."""
    if cache is None:
        yield from (None for _ in steps)
    else:
        yield from read_ahead(cache.read(step, rows) for step in steps)


_SHOWN = ("train_loss", "validation_loss", "score_std", "contained")


def build(
    paths: RunPaths, config: RunConfig, round_number: int, context: ParallelContext, is_fresh: bool
) -> tuple[Loop, dict[str, Any]]:
    """The loop, and its models by the names they are saved under.

    :param is_fresh: start from the warm-up and the round before; False: the caller loads what a checkpoint holds.
    """
    vocab_size, settings = config.data.tokenizer.vocab_size, config.bilevel
    is_exact = settings.curvature == "exact"  # fused kernels have no second derivative
    proxy = build_language_model(
        config.proxy.model, vocab_size, context, config.proxy.recompute, plain_kernels=is_exact
    )
    score_model = build_score_model(config.proxy.model, vocab_size, context, config.proxy.recompute)
    if is_fresh:
        checkpoints.load_model(proxy_directory(paths, config), proxy)
        earlier = earlier_score_model(paths, config, round_number)
        if earlier is None:
            checkpoints.load_backbone(proxy_directory(paths, config), score_model)
        else:
            checkpoints.load_model(earlier, score_model, checkpoints.SCORE)
    target = None
    if settings.gamma and not settings.uses_cached_target:
        checkpoint = target_checkpoint(paths, config, round_number)
        target = checkpoints.load_target(checkpoint, context, config.target.model, vocab_size)
    loop = assemble(
        settings, proxy, score_model, target, context, vocab_size, config.proxy.distributed_optimizer,
        make_set_weights(config.data, context.device),
    )  # fmt: skip
    return loop, {checkpoints.MODEL: proxy, checkpoints.SCORE: score_model}


def assemble(
    settings: BilevelConfig,
    proxy: Any,
    score_model: Any,
    target: Any | None,
    context: ParallelContext,
    vocab_size: int,
    distributed_optimizer: bool = False,
    set_weights: SetWeights | None = None,
) -> Loop:
    """The loop on models that hold the weights to begin with."""
    proxy_adam, score_adam = (adam_settings(settings, lr) for lr in (settings.lr_proxy, settings.lr_score))
    space = MegatronSpace(proxy, context, proxy_adam, distributed_optimizer)
    score_space = MegatronSpace(score_model, context, score_adam, distributed_optimizer)
    shard = VocabShard.of(context, vocab_size)
    reuses_target = settings.reuses_target(-(-settings.batch_size // (settings.micro_batch_size * context.dp_size)))
    return BilevelLoop(
        MegatronLowerLevel(proxy, space, target, shard, settings.gamma, settings.kl_direction, reuses_target),
        MegatronUpperLevel(score_model, score_space),
        make_curvature(settings.curvature, space),
        make_solver(settings, space),
        loop_settings(settings),
        space.optimizer(proxy_adam),
        score_space.optimizer(score_adam),
        set_weights,
    )


def make_set_weights(data: DataConfig, device: torch.device) -> SetWeights:
    """As `data.validation_weighting` says."""
    rate = data.validation_rate if data.validation_weighting == "worst-case" else 0.0
    return SetWeights(data.validation_weights, rate, device)


def starting_points(paths: RunPaths, config: RunConfig, round_number: int) -> dict[str, str]:
    """Digests of the checkpoints that `build` reads for a fresh start, by name."""
    found = {"proxy": proxy_directory(paths, config)}
    if earlier := earlier_score_model(paths, config, round_number):
        found["score model"] = earlier
    if config.bilevel.gamma and not config.bilevel.uses_cached_target:
        found["target"] = target_checkpoint(paths, config, round_number)
    return {name: digest_tree(checkpoint_files.find(directory)) for name, directory in found.items()}


def earlier_score_model(paths: RunPaths, config: RunConfig, round_number: int) -> Path | None:
    """That a round goes on from: the last one that guards trust; None: from the proxy's backbone."""
    trusted = 0 if config.bilevel.restart_score else trusted_round(paths, round_number - 1)
    return paths.bilevel(trusted) if trusted else None


def make_solver(settings: BilevelConfig, space: ParameterSpace) -> Solver:
    """By the name in `bilevel.solver`."""
    if settings.solver == "paper":
        return Paper(space, settings.z_lr, settings.damping, settings.clip_grad, settings.z_steps)
    if settings.solver == "conjugate-gradient":
        return ConjugateGradient(space, settings.damping, settings.gradient_average, settings.z_steps)
    return Averaged(space, settings.z_lr, settings.damping, settings.gradient_average, settings.z_steps)


def loop_settings(settings: BilevelConfig) -> LoopSettings:
    return LoopSettings(
        outer_steps=settings.outer_steps,
        inner_steps=settings.inner_steps,
        solve_first=settings.solve_first,
        solve_interval=settings.solve_interval,
        lr_warmup_fraction=settings.lr_warmup_fraction,
        ridge=settings.lambda_,
        weights="naive" if settings.weights == "naive" else "softmax",
    )


def _check_exact(loop: Loop, batches: list[MicroBatch]) -> None:
    """See `check_exact`; along the gradient of G with equal weights."""
    masks = [batch.batch.loss_mask for batch in batches]
    count = sum(map(len, masks)) * group_size(loop.lower.space.dp_group)
    pool = Pool(loop.lower, batches, [mask.new_full(mask.shape[:1], 1 / count) for mask in masks], loop.settings.ridge)
    check_exact(pool, pool.gradient()[0])
