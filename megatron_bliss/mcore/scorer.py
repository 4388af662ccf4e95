"""Runs a model forward over many sequences: scores, losses of sequences, losses of whole sets.

Sequences longer than the model was trained on are cut into windows; what is measured on them is added up. Windows of
like lengths share a batch, data-parallel ranks share the batches, so results depend on neither but for rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_bliss.data.shards import Shard
from megatron_bliss.data.validation import ValidationSet
from megatron_bliss.mcore.batches import Batch, bucket, cut_windows, make_batch
from megatron_bliss.mcore.models import token_losses
from megatron_bliss.mcore.parallel import ParallelContext
from megatron_bliss.mcore.score_model import ScoreModel

Measure = Callable[[Batch], Tensor]  # [b, 2]: of each window a total and its weight, so that windows can be added up


class Sequences(Protocol):
    """What is measured: any n sequences."""

    lengths: np.ndarray  # tokens of each, [n]

    def get(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Token ids [length]; whether each is to be predicted [length], or None: all but the first."""
        ...


class ShardSequences:
    """Some sequences of some shards.

    :param parts: shards, each with the ids that are meant.
    """

    def __init__(self, parts: Sequence[tuple[Shard, np.ndarray]]) -> None:
        self._shards = [shard for shard, _ in parts]
        self._owners = np.repeat(np.arange(len(parts)), [len(ids) for _, ids in parts])
        self._ids = np.concatenate([np.asarray(ids, dtype=np.int64) for _, ids in parts] or [np.empty(0, np.int64)])
        self.lengths = np.concatenate(
            [shard.sequence_lengths[np.asarray(ids, dtype=np.int64)] for shard, ids in parts] or [np.empty(0, np.int32)]
        )

    def get(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        return self._shards[self._owners[index]][int(self._ids[index])], None


class ValidationSequences:
    """Some sequences of a validation set, with its loss mask."""

    def __init__(self, validation: ValidationSet, ids: np.ndarray) -> None:
        self._validation, self._ids = validation, ids
        self.lengths = validation.shard.sequence_lengths[ids]

    def get(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        return self._validation.get(int(self._ids[index]))


@dataclass(frozen=True)
class Pass:
    """How sequences are put through a model."""

    context: ParallelContext
    sequence_length: int  # positions of a window at most
    batch_tokens: int  # positions of a forward pass at most, padding included

    @torch.no_grad()
    def totals(
        self, measure: Measure, sequences: Sequences, on_progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Totals and weights of every sequence: float64 [n, 2], the same on all ranks. All ranks call it.

        :param on_progress: called now and then with the positions done so far on all ranks, about.
        """
        context = self.context
        windows = [
            (index, *window)
            for index, length in enumerate(sequences.lengths.tolist())
            for window in cut_windows(length, self.sequence_length)
        ]
        owners, starts, stops = np.array(windows, dtype=np.int64).reshape(-1, 3).T
        lengths = np.maximum(stops - starts - 1, 0)
        batches = bucket(lengths, self.batch_tokens, context.length_multiple)
        result = torch.zeros(len(sequences.lengths), 2, dtype=torch.float64, device=context.device)
        done = 0
        for members in batches[context.dp_rank :: context.dp_size]:
            batch = self._batch(sequences, owners[members], starts[members], stops[members])
            owner = torch.from_numpy(owners[members]).to(context.device, non_blocking=True)
            result.index_add_(0, owner, measure(batch).double())
            done += int(lengths[members].sum()) * context.dp_size
            if on_progress is not None:
                on_progress(done)
        if context.dp_size > 1:
            dist.all_reduce(result, group=context.dp_group)
        return result.cpu().numpy()

    def _batch(self, sequences: Sequences, owners: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> Batch:
        tokens, masks = [], []
        for owner, start, stop in zip(owners.tolist(), starts.tolist(), stops.tolist(), strict=True):
            sequence, mask = sequences.get(owner)
            tokens.append(sequence[start:stop])
            masks.append(np.ones(stop - start, dtype=bool) if mask is None else mask[start:stop])
        return make_batch(tokens, self.context.device, self.context.length_multiple, masks)


def score_measure(model: ScoreModel) -> Measure:
    """Raw scores; those of windows are averaged by their tokens."""

    def measure(batch: Batch) -> Tensor:
        weights = batch.lengths.clamp_min(1).double()
        return torch.stack([model(batch).double() * weights, weights], dim=1)

    return measure


def loss_measure(model: GPTModel) -> Measure:
    """Summed losses and the number of predicted tokens."""

    def measure(batch: Batch) -> Tensor:
        losses = token_losses(model, batch) * batch.loss_mask
        return torch.stack([losses.sum(1, dtype=torch.float64), batch.loss_mask.sum(1, dtype=torch.float64)], dim=1)

    return measure


def means(totals: np.ndarray) -> np.ndarray:
    """Mean of every sequence: float32 [n]; 0 where nothing was to be predicted."""
    return (totals[:, 0] / np.maximum(totals[:, 1], 1)).astype(np.float32)


def mean(totals: np.ndarray) -> float | None:
    """Mean over all tokens of all sequences; None without any."""
    weight = float(totals[:, 1].sum())
    return float(totals[:, 0].sum()) / weight if weight else None
