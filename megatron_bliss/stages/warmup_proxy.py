"""`warmup-proxy`: train the proxy on the warm-up selection with the plain next-token loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_bliss import stopping
from megatron_bliss.artifacts import RunPaths
from megatron_bliss.bilevel.optimizer import AdamSettings, Optimizer, lr_factor
from megatron_bliss.bilevel.space import ParameterSpace, Vector, group_sum_
from megatron_bliss.config import BilevelConfig, RunConfig, proxy_run, read_saved_config, warmup_run
from megatron_bliss.data.sampling import SequenceSampler, share_of_rank
from megatron_bliss.data.seeds import derive, hash_positions
from megatron_bliss.data.selection import Selection
from megatron_bliss.data.shards import Shard
from megatron_bliss.mcore import checkpoints, parallel
from megatron_bliss.mcore.batches import Batch, bucket, cut_windows, make_batch
from megatron_bliss.mcore.models import build_language_model, token_losses
from megatron_bliss.mcore.parallel import ParallelContext, agreed
from megatron_bliss.mcore.space import MegatronSpace
from megatron_bliss.mcore.stopping import Vote
from megatron_bliss.progress import MetricsLog, Progress
from megatron_bliss.stages.sources import resume
from megatron_bliss.tracking import Job, track

LR_WARMUP_FRACTION = 0.1  # of the steps; then cosine, to zero


def proxy_directory(paths: RunPaths, config: RunConfig) -> Path:
    """Where the warmed-up proxy of a run lies: its own, or that of the run it starts from."""
    return proxy_run(config, paths).warmup_proxy


def run(run_dir: Path) -> None:
    """Write `warmup/proxy`, or finish it, or start it afresh on another selection. All ranks of the job call it.

    :raises UserError: without the warm-up selection, or where the batch cannot be shared by the ranks.
    """
    paths = RunPaths(Path(run_dir))
    config = read_saved_config(paths.config)
    context = parallel.initialize(config.proxy.tensor_parallel, config.proxy.sequence_parallel, config.seed)
    num_steps, directory = config.warmup.proxy_steps, paths.warmup_proxy
    with agreed(context):
        selection = Selection.open(warmup_run(config, paths).warmup_selection)
        data = WarmupData(selection, config, context)
        sources = {"selection": selection.digest}
        done = resume("warmup-proxy", directory, sources, context.is_first) or 0
    vocab_size = config.data.tokenizer.vocab_size
    model = build_language_model(config.proxy.model, vocab_size, context, config.proxy.recompute)
    adam = adam_settings(config.bilevel, config.warmup.proxy_lr)
    space = MegatronSpace(model, context, adam, config.proxy.distributed_optimizer)
    optimizer = space.optimizer(adam)
    if done:
        vectors = whole_vectors(optimizer)
        checkpoints.load(directory, {checkpoints.MODEL: model}, {checkpoints.MODEL: vectors})
        optimizer.load({name: space.own(vector) for name, vector in vectors.items()}, done)
    progress = Progress("warmup-proxy", num_steps, start=done) if context.is_first else None
    tracker = track(Job(config, paths, "warmup-proxy"), context.is_first, done)
    metrics = MetricsLog(directory / "metrics.jsonl", done, tracker.log) if context.is_first else None
    num_tokens, vote = 0, Vote(context.device)
    for step in range(done, num_steps):
        factor = lr_factor(step, num_steps, LR_WARMUP_FRACTION)
        batches, batch_tokens = data.micro_batches(step)
        loss, gradient = loss_and_gradient(model, space, batches, batch_tokens)
        norm = optimizer.step(gradient, factor)
        num_tokens += batch_tokens
        done = step + 1
        if done % config.target.log_interval == 0 or done == num_steps:
            figures = {"loss": float(group_sum_(loss, space.dp_group)), "lr": config.warmup.proxy_lr * factor}
            if progress is not None and metrics is not None:
                progress.report(done, num_tokens, **figures)
                metrics.write(done, **figures, gradient_norm=float(norm))
        stops = vote() and done < num_steps
        if done % config.target.save_interval == 0 or done == num_steps or stops:
            vectors = whole_vectors(optimizer)
            checkpoints.save(directory, done, {checkpoints.MODEL: model}, {checkpoints.MODEL: vectors}, {}, keep=1)
        if stops:
            stopping.leave("warmup-proxy", done, num_steps)


def adam_settings(settings: BilevelConfig, lr: float) -> AdamSettings:
    """Those of the side models: what `bilevel` says, and a learning rate."""
    return AdamSettings(lr, settings.weight_decay, (settings.beta1, settings.beta2), settings.clip_grad)


def whole_vectors(optimizer: Optimizer) -> dict[str, Vector]:
    """Masters and moments as a checkpoint holds them. All ranks call it."""
    vectors = {"master": optimizer.space.masters, **optimizer.moments()}
    return {name: optimizer.space.whole(vector) for name, vector in vectors.items()}


def loss_and_gradient(
    model: Any, space: ParameterSpace, batches: Sequence[Batch], num_tokens: int
) -> tuple[Tensor, Vector]:
    """This rank's summand of the mean loss over the predicted tokens of the global batch, and the gradient of all.

    :param num_tokens: predicted tokens of the global batch.
    """
    gradient = space.accumulator()
    total = torch.zeros((), device=gradient[0].device)
    for batch in batches:
        loss = (token_losses(model, batch) * batch.loss_mask).sum() / num_tokens
        loss.backward()
        space.harvest_(gradient)
        total += loss.detach()
    return total, space.reduce_gradients(gradient)


class WarmupData:
    """The global batch of every step, the same for any number of ranks.

    Of a sequence longer than a sample, one window is taken, another one each time.
    """

    def __init__(self, selection: Selection, config: RunConfig, context: ParallelContext) -> None:
        self._context = context
        self._size, self._sequence_length = config.warmup.proxy_batch_size, config.data.sequence_length
        self._micro_batch_tokens = config.bilevel.micro_batch_size * config.data.sequence_length
        self._seed = derive(config.seed, "warmup-proxy")
        records = [shard.record for shard in selection.shards]
        is_weighted = config.data.pool[0].weight is not None
        self._sampler = SequenceSampler(
            records,
            {shard.record.name: shard.ids for shard in selection.shards},
            self._seed,
            weights=[shard.weight for shard in selection.shards] if is_weighted else None,
        )
        self._shards = [Shard(record.prefix) for record in records]
        share_of_rank([(0, 0)] * self._size, context.dp_rank, context.dp_size)  # refuse a size that cannot be shared

    def micro_batches(self, step: int) -> tuple[list[Batch], int]:
        """This rank's micro-batches of a step, and the number of predicted tokens of the global batch."""
        samples = self._sampler.batch(step, self._size)
        draws = hash_positions(derive(self._seed, "window"), np.arange(step * self._size, (step + 1) * self._size))
        pieces = []
        for (index, sequence_id), draw in zip(samples, draws.tolist(), strict=True):
            sequence = self._shards[index][sequence_id]
            windows = cut_windows(len(sequence), self._sequence_length)
            start, stop = windows[draw % len(windows)]
            pieces.append(sequence[start:stop])
        num_tokens = sum(max(len(piece) - 1, 0) for piece in pieces)
        mine = pieces[self._context.dp_rank :: self._context.dp_size]
        multiple = self._context.length_multiple
        lengths = np.array([max(len(piece) - 1, 0) for piece in mine])
        batches = [
            make_batch([mine[member] for member in members], self._context.device, multiple)
            for members in bucket(lengths, self._micro_batch_tokens, multiple)
        ]
        return batches, max(num_tokens, 1)
