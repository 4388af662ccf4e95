"""`warmup-proxy`: train the proxy on the warm-up selection with the plain next-token loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.bilevel.space import ParameterSpace, Vector
from megatron_bliss.config import RunConfig, proxy_run, read_saved_config, warmup_run
from megatron_bliss.data.sampling import SequenceSampler, share_of_rank
from megatron_bliss.data.seeds import derive
from megatron_bliss.data.selection import Selection
from megatron_bliss.data.shards import Shard
from megatron_bliss.mcore import checkpoints, parallel
from megatron_bliss.mcore.batches import Batch, bucket, drawn_windows, make_batch
from megatron_bliss.mcore.models import build_language_model, token_losses
from megatron_bliss.mcore.parallel import ParallelContext, agreed, same
from megatron_bliss.stages.side_training import SideTraining, adam_settings, train
from megatron_bliss.stages.sources import resume
from megatron_bliss.tracking import Job


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
    directory = paths.warmup_proxy
    with agreed(context):
        selection = Selection.open(warmup_run(config, paths).warmup_selection)
        data = WarmupData(selection, config, context)
        sources = {"selection": selection.digest}
        done = resume("warmup-proxy", directory, sources, context.is_first) or 0
    done = same(context, done, f"the number of steps in {directory}")
    vocab_size = config.data.tokenizer.vocab_size
    model = build_language_model(config.proxy.model, vocab_size, context, config.proxy.recompute)
    adam = adam_settings(config.bilevel, config.warmup.proxy_lr)
    job = Job(config, paths, "warmup-proxy")
    training = SideTraining(
        job, directory, checkpoints.MODEL, config.warmup.proxy_steps, config.target.save_interval, adam
    )

    def step(space: ParameterSpace, number: int) -> tuple[Tensor, Vector, int]:
        batches, num_tokens = data.micro_batches(number)
        return *loss_and_gradient(model, space, batches, num_tokens), num_tokens

    train(training, model, context, done, step)


def loss_and_gradient(
    model: Any, space: ParameterSpace, batches: Sequence[Batch], num_tokens: int
) -> tuple[Tensor, Vector]:
    """This rank's summand of the mean loss over the predicted tokens of the global batch, and the gradient of all.

    :param num_tokens: predicted tokens of the global batch.
    """
    gradient = space.accumulator()
    total = torch.zeros((), device=space.parameters[0].device)
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
        sequences = [self._shards[index][sequence_id] for index, sequence_id in samples]
        lengths, seed = [len(sequence) for sequence in sequences], derive(self._seed, "window")
        windows = drawn_windows(lengths, self._sequence_length, seed, first=step * self._size)
        pieces = [sequence[window] for sequence, window in zip(sequences, windows, strict=True)]
        num_tokens = sum(max(len(piece) - 1, 0) for piece in pieces)
        mine = pieces[self._context.dp_rank :: self._context.dp_size]
        multiple = self._context.length_multiple
        positions = np.array([max(len(piece) - 1, 0) for piece in mine])
        batches = [
            make_batch([mine[member] for member in members], self._context.device, multiple)
            for members in bucket(positions, self._micro_batch_tokens, multiple)
        ]
        return batches, max(num_tokens, 1)
