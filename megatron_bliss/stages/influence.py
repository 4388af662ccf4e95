"""`influence`: how much one optimizer step on a sequence lowers the proxy's validation loss, for a sample of the slice.

The step is the warm-up's own: from the proxy's weights and Adam state as it left them, clipped as it clips, at
`mates.lr`. Each data-parallel rank probes sequences of its own and so holds the whole optimizer state, twice, also
where `proxy.distributed_optimizer` shares it out elsewhere.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bliss import stopping
from megatron_bliss.artifacts import RunPaths, atomic_write, digest_tree
from megatron_bliss.bilevel.probe import Probe
from megatron_bliss.config import RunConfig, read_saved_config
from megatron_bliss.errors import UserError
from megatron_bliss.mcore import checkpoint_files, checkpoints, parallel
from megatron_bliss.mcore.batches import Batch, bucket, make_batch
from megatron_bliss.mcore.models import build_language_model, token_losses
from megatron_bliss.mcore.parallel import ParallelContext, agreed, same
from megatron_bliss.mcore.space import MegatronSpace
from megatron_bliss.mcore.stopping import Vote
from megatron_bliss.progress import Progress
from megatron_bliss.stages.influence_data import InfluenceSample, ReferenceSet, reference_sets
from megatron_bliss.stages.inventory import run_inventory
from megatron_bliss.stages.side_training import adam_settings, whole_vectors
from megatron_bliss.stages.sources import resume
from megatron_bliss.stages.warmup_proxy import loss_and_gradient, proxy_directory


def run(run_dir: Path, round_number: int) -> None:
    """Write `round-N/influence/influence.npy`, or what is missing of it. All ranks call it.

    :raises UserError: without the warmed-up proxy, for a slice that is too small, or where a step leads to no number.
    """
    paths = RunPaths(Path(run_dir))
    config, directory = read_saved_config(paths.config), paths.influence(round_number)
    context = parallel.initialize(config.proxy.tensor_parallel, config.proxy.sequence_parallel, config.seed)
    with agreed(context):
        inventory = run_inventory(paths.root, config)
        sample = InfluenceSample(config, inventory, round_number)
        reference = reference_sets(config, inventory, round_number)
        proxy = proxy_directory(paths, config)
        sources = {"inventory": inventory.digest, "proxy": digest_tree(checkpoint_files.find(proxy))}
        resume("influence", directory, sources, context.is_first)
    known = read(directory)
    same(context, len(known), f"the number of influences in {directory}")
    if len(known) == len(sample):
        return
    probe = SequenceProbe(config, proxy, reference, context)
    progress = Progress("influence", len(sample), "sequences", start=len(known)) if context.is_first else None
    num_tokens, vote = 0, Vote(context.device)
    while len(known) < len(sample):
        ids = range(len(known), min(len(known) + config.mates.checkpoint_interval, len(sample)))
        found = torch.zeros(len(ids), dtype=torch.float64, device=context.device)
        for place in range(context.dp_rank, len(ids), context.dp_size):
            tokens, _ = sample.get(ids[place])
            found[place] = probe(tokens)
            num_tokens += len(tokens) * context.dp_size
            if progress is not None and place + context.dp_size < len(ids):
                progress.report(ids[place], num_tokens)
        if context.dp_size > 1:
            dist.all_reduce(found, group=context.dp_group)
        known = np.concatenate([known, found.cpu().numpy()])
        with agreed(context):
            if not np.isfinite(known).all():
                raise UserError(f"a step at mates.lr={step_size(config)} leads to a loss that is no number; lower it")
            if context.is_first:
                with atomic_write(_path(directory)) as stream:
                    np.save(stream, known, allow_pickle=False)
        if progress is not None:
            progress.report(len(known), num_tokens, mean=known.mean(), std=known.std(), helpful=(known > 0).mean())
        if vote() and len(known) < len(sample):
            stopping.leave("influence", len(known), len(sample), "sequences")


def read(directory: Path) -> np.ndarray:
    """By how much the loss falls, in nats a token, for the first sequences of the sample: float64 [known]."""
    path = _path(directory)
    return np.load(path, allow_pickle=False) if path.exists() else np.empty(0)


def _path(directory: Path) -> Path:
    return directory / "influence.npy"


def step_size(config: RunConfig) -> float:
    """Learning rate of the probing step."""
    return config.warmup.proxy_lr if config.mates.lr is None else config.mates.lr


class SequenceProbe:
    """The warmed-up proxy, which takes a step on a sequence and takes it back.

    :param proxy: where its checkpoint lies.
    :param reference: what steps are judged by: the weighted sum of the sets' losses.
    """

    def __init__(
        self,
        config: RunConfig,
        proxy: Path,
        reference: Sequence[ReferenceSet],
        context: ParallelContext,
    ) -> None:
        self._context = context
        # a data-parallel rank steps alone
        alone = replace(context, dp_group=None, dp_rank=0, dp_size=1)
        model = build_language_model(
            config.proxy.model, config.data.tokenizer.vocab_size, context, config.proxy.recompute
        )
        adam = adam_settings(config.bilevel, step_size(config))
        self._model, self._space = model, MegatronSpace(model, alone, adam, distributed=False)
        batch_tokens = config.bilevel.micro_batch_size * config.data.sequence_length
        self._reference = [(one.weight, self._batches(one, batch_tokens)) for one in reference]
        optimizer = self._space.optimizer(adam)
        state = whole_vectors(optimizer)
        checkpoints.load(proxy, {checkpoints.MODEL: model}, {checkpoints.MODEL: state})
        self._probe = Probe(optimizer, state, checkpoint_files.read_iteration(proxy) or 0, self._reference_loss)

    def __call__(self, tokens: np.ndarray) -> Tensor:
        """By how much a step on a sequence lowers the loss: float64 scalar."""
        batch = make_batch([tokens], self._context.device, self._context.length_multiple)
        _, gradient = loss_and_gradient(self._model, self._space, [batch], max(len(tokens) - 1, 1))
        return self._probe.influence(gradient)

    @torch.no_grad()
    def _reference_loss(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._context.device)
        for weight, batches in self._reference:
            losses = [
                (token_losses(self._model, batch) * batch.loss_mask).sum(dtype=torch.float64) for batch in batches
            ]
            count = torch.stack([batch.loss_mask.sum() for batch in batches]).sum().clamp_min(1)
            total += weight * torch.stack(losses).sum() / count
        return total

    def _batches(self, one: ReferenceSet, batch_tokens: int) -> list[Batch]:
        context = self._context
        lengths = np.array([max(len(tokens) - 1, 0) for tokens in one.tokens])
        return [
            make_batch(
                [one.tokens[i] for i in members],
                context.device,
                context.length_multiple,
                [one.masks[i] for i in members],
            )
            for members in bucket(lengths, batch_tokens, context.length_multiple)
        ]
