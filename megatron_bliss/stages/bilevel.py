"""`bilevel`: learn the score model of a round with the bilevel loop."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bliss.artifacts import RunPaths, digest_tree
from megatron_bliss.bilevel.curvature import Pool, check_exact, make_curvature
from megatron_bliss.bilevel.loop import BilevelLoop, LoopSettings
from megatron_bliss.bilevel.optimizer import AdamSettings
from megatron_bliss.bilevel.solvers import Averaged, ConjugateGradient, Paper, Solver
from megatron_bliss.bilevel.space import ParameterSpace, group_size
from megatron_bliss.config import BilevelConfig, RunConfig, read_saved_config, warmup_run
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.sampling import SequenceSampler, share_of_rank
from megatron_bliss.data.seeds import derive, hash_positions
from megatron_bliss.data.shards import verify_shard
from megatron_bliss.data.slices import Slicing
from megatron_bliss.data.validation import ValidationSet
from megatron_bliss.mcore import checkpoint_files, checkpoints, parallel
from megatron_bliss.mcore.batches import cut_windows, make_batch
from megatron_bliss.mcore.losses import VocabShard
from megatron_bliss.mcore.lower_level import MegatronLowerLevel, MegatronUpperLevel, MicroBatch, micro_batches
from megatron_bliss.mcore.models import build_language_model
from megatron_bliss.mcore.parallel import ParallelContext, agreed
from megatron_bliss.mcore.score_model import build_score_model
from megatron_bliss.mcore.space import MegatronSpace
from megatron_bliss.progress import MetricsLog, Progress
from megatron_bliss.stages.inventory import run_inventory
from megatron_bliss.stages.sources import resume
from megatron_bliss.stages.warmup_proxy import proxy_directory

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
        inventory = run_inventory(paths.root, config)
        data = BilevelData(config, inventory, round_number, context)
        sources = {"inventory": inventory.digest} | starting_points(paths, config, round_number)
        done = resume("bilevel", directory, sources, context.is_first) or 0
    if done >= settings.outer_steps:
        return
    loop, models = build(paths, config, round_number, context, is_fresh=not done)
    if done:
        lower, upper = loop.vectors()
        vectors = {checkpoints.MODEL: lower, checkpoints.SCORE: upper}
        loop.load(lower, upper, checkpoints.load(directory, models, vectors))
    if settings.curvature == "exact":
        _check_exact(loop, data.pool(done))
    progress = Progress("bilevel", settings.outer_steps, start=done) if context.is_first else None
    log = MetricsLog(directory / "metrics.jsonl", done) if context.is_first else None
    num_tokens = 0
    while loop.steps_done < settings.outer_steps:
        began = time.monotonic()
        pool, validation = data.pool(loop.steps_done), data.validation(loop.steps_done)
        metrics = loop.step(pool, validation)
        step_tokens = int(pool[0].num_tokens + validation[0].num_tokens)
        num_tokens += step_tokens
        if progress is not None and log is not None:
            log.write(loop.steps_done, **metrics, tokens_per_second=step_tokens / (time.monotonic() - began))
            progress.report(loop.steps_done, num_tokens, **{name: metrics[name] for name in _SHOWN})
        if loop.steps_done % settings.checkpoint_interval == 0 or loop.steps_done == settings.outer_steps:
            lower, upper = loop.vectors()
            vectors = {checkpoints.MODEL: lower, checkpoints.SCORE: upper}
            checkpoints.save(directory, loop.steps_done, models, vectors, loop.scalars(), keep=1)


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
        if round_number == 1 or settings.restart_score:
            checkpoints.load_backbone(proxy_directory(paths, config), score_model)
        else:
            checkpoints.load_model(paths.bilevel(round_number - 1), score_model, checkpoints.SCORE)
    target = None
    if settings.gamma:
        checkpoint = target_checkpoint(paths, config, round_number)
        target = checkpoints.load_target(checkpoint, context, config.target.model, vocab_size)
    loop = assemble(settings, proxy, score_model, target, context, vocab_size, config.proxy.distributed_optimizer)
    return loop, {checkpoints.MODEL: proxy, checkpoints.SCORE: score_model}


def assemble(
    settings: BilevelConfig,
    proxy: Any,
    score_model: Any,
    target: Any | None,
    context: ParallelContext,
    vocab_size: int,
    distributed_optimizer: bool = False,
) -> Loop:
    """The loop on models that hold the weights to begin with."""
    adam = AdamSettings(
        weight_decay=settings.weight_decay, betas=(settings.beta1, settings.beta2), clip_grad=settings.clip_grad
    )
    proxy_adam, score_adam = replace(adam, lr=settings.lr_proxy), replace(adam, lr=settings.lr_score)
    space = MegatronSpace(proxy, context, proxy_adam, distributed_optimizer)
    score_space = MegatronSpace(score_model, context, score_adam, distributed_optimizer)
    shard = VocabShard.of(context, vocab_size)
    return BilevelLoop(
        MegatronLowerLevel(proxy, space, target, shard, settings.gamma, settings.kl_direction),
        MegatronUpperLevel(score_model, score_space),
        make_curvature(settings.curvature, space),
        make_solver(settings, space),
        loop_settings(settings),
        space.optimizer(proxy_adam),
        score_space.optimizer(score_adam),
    )


def starting_points(paths: RunPaths, config: RunConfig, round_number: int) -> dict[str, str]:
    """Digests of the checkpoints that `build` reads for a fresh start, by name."""
    found = {"proxy": proxy_directory(paths, config)}
    if round_number > 1 and not config.bilevel.restart_score:
        found["score model"] = paths.bilevel(round_number - 1)
    if config.bilevel.gamma:
        found["target"] = target_checkpoint(paths, config, round_number)
    return {name: digest_tree(checkpoint_files.find(directory)) for name, directory in found.items()}


def target_checkpoint(paths: RunPaths, config: RunConfig, round_number: int) -> Path:
    """The LLM as the round before this one left it, or the warm-up: its iter_… directory."""
    if round_number > 1:
        return checkpoint_files.iteration_path(paths.target, config.round_end(round_number - 1))
    return checkpoint_files.iteration_path(warmup_run(config, paths).warmup_target, config.round_end(0))


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


class BilevelData:
    """The global batches of every step, the same for any number of ranks.

    The pool is the round's slice, each of its sequences once an epoch; so is the validation set. Of a sequence longer
    than a sample one window is taken, another one each time.
    """

    def __init__(self, config: RunConfig, inventory: Inventory, round_number: int, context: ParallelContext) -> None:
        self._context, self._settings, self._length = context, config.bilevel, config.data.sequence_length
        self._seed = derive(config.seed, "bilevel", round_number)
        self._shards = [verify_shard(record) for record in inventory.pool]
        ids = Slicing.of(config, inventory).ids_by_name(round_number)
        self._pool = SequenceSampler(inventory.pool, ids, derive(self._seed, "pool"))
        self._set = ValidationSet.of(inventory.validation)
        everything = {inventory.validation.name: np.arange(len(self._set), dtype=np.int32)}
        self._validation = SequenceSampler([inventory.validation], everything, derive(self._seed, "validation"))
        for size in (self._settings.batch_size, self._settings.validation_batch_size):
            share_of_rank([(0, 0)] * size, context.dp_rank, context.dp_size)  # refuse a size that cannot be shared

    def pool(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of the pool at a 0-based step."""
        samples = self._pool.batch(step, self._settings.batch_size)
        sequences = [self._shards[index][sequence_id] for index, sequence_id in samples]
        return self._micro_batches(sequences, None, step)

    def validation(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of the validation set at a 0-based step."""
        samples = self._validation.batch(step, self._settings.validation_batch_size)
        pairs = [self._set.get(sequence_id) for _, sequence_id in samples]
        return self._micro_batches([tokens for tokens, _ in pairs], [mask for _, mask in pairs], step)

    def _micro_batches(
        self, sequences: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None, step: int
    ) -> list[MicroBatch]:
        draws = hash_positions(derive(self._seed, "window", step), np.arange(len(sequences))).tolist()
        windows = [self._window(len(sequence), draw) for sequence, draw in zip(sequences, draws, strict=True)]
        mine = range(self._context.dp_rank, len(sequences), self._context.dp_size)
        size = self._settings.micro_batch_size
        batches = [
            make_batch(
                [sequences[i][windows[i]] for i in mine[start : start + size]],
                self._context.device,
                self._context.length_multiple,
                None if masks is None else [masks[i][windows[i]] for i in mine[start : start + size]],
            )
            for start in range(0, len(mine), size)
        ]
        return micro_batches(batches, self._context)

    def _window(self, length: int, draw: int) -> slice:
        windows = cut_windows(length, self._length)
        return slice(*windows[draw % len(windows)])
