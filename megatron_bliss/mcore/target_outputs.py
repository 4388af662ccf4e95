"""What a target predicts, at its own tensor- and pipeline-parallel layout, by Megatron's own schedules."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_bliss.data.target_cache import Known
from megatron_bliss.mcore import models
from megatron_bliss.mcore.batches import Batch, make_batch, padded_length
from megatron_bliss.mcore.losses import VocabShard
from megatron_bliss.mcore.parallel import ParallelContext
from megatron_bliss.mcore.top_k import TopK, top_k_of


class TargetOutputs:
    """The k most likely ids of every predicted token.

    :param target: this rank's pipeline stage.
    :param sequence_length: predicted tokens of a sequence at most; all are padded to it, as pipeline stages exchange
        tensors of one shape.
    """

    def __init__(
        self,
        target: GPTModel,
        context: ParallelContext,
        vocab_size: int,
        k: int,
        micro_batch_size: int,
        sequence_length: int,
    ) -> None:
        self.target, self.context, self.k, self.micro_batch_size = target, context, k, micro_batch_size
        self.shard = VocabShard.of(context, vocab_size)
        self.width = padded_length(sequence_length, context.length_multiple)

    @torch.no_grad()
    def __call__(self, sequences: Sequence[np.ndarray]) -> list[Known]:
        """Of each sequence, on the last pipeline stage, equal on all tensor-parallel ranks; nothing on the others.

        :param sequences: tokens, each [length].
        """
        size = self.micro_batch_size
        starts = range(0, len(sequences), size)
        batches = [self._batch(sequences[start : start + size]) for start in starts]
        found = get_forward_backward_func()(
            forward_step_func=_forward_step(self.shard, self.k),
            data_iterator=iter(batches),
            model=self.target,
            num_microbatches=len(batches),
            seq_length=self.width,
            micro_batch_size=size,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not self.context.is_last_stage:
            return []
        return [known for batch, top in zip(batches, found, strict=True) for known in _by_sequence(batch, top)][
            : len(sequences)
        ]

    def _batch(self, sequences: Sequence[np.ndarray]) -> Batch:
        """As many rows and positions in each: the missing rows are without labels."""
        empty = [np.zeros(self.width + 1, dtype=np.int64)] * (self.micro_batch_size - len(sequences))
        padded = [np.pad(sequence, (0, self.width + 1 - len(sequence))) for sequence in sequences]
        masks = [np.arange(self.width + 1) < len(sequence) for sequence in sequences]
        masks += [np.zeros(self.width + 1, dtype=bool) for _ in empty]
        return make_batch([*padded, *empty], self.context.device, loss_masks=masks)


def _forward_step(shard: VocabShard, k: int) -> Any:
    def step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
        return models.logits(model, next(batches)), partial(_collect, shard, k)

    return step


def _collect(shard: VocabShard, k: int, logits: Tensor, non_loss_data: bool) -> TopK:
    return top_k_of(logits, shard, k)


def _by_sequence(batch: Batch, top: TopK) -> list[Known]:
    """Rows of the labelled tokens, which are sorted by position, sequence by sequence."""
    rows, columns = batch.tokens.shape
    labelled = np.arange(rows * columns) if batch.labelled is None else batch.labelled.cpu().numpy()
    order = np.argsort(labelled % rows, kind="stable")
    ends = np.cumsum(np.bincount(labelled % rows, minlength=rows))[:-1]
    ids, log_probs = top.ids.cpu().numpy()[order], top.log_probs.cpu().numpy()[order]
    return list(zip(np.split(ids, ends), np.split(log_probs, ends), strict=True))
