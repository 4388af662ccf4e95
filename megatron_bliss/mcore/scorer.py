"""Runs a model forward over many sequences: scores, losses of sequences, losses of whole sets.

Sequences longer than the model was trained on are cut into windows; what is measured on them is added up. Windows of
like lengths share a batch, so results do not depend on the batches but for rounding. Data-parallel ranks share the
batches, which do not depend on their number. A thread prepares the next batches while the device is busy.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, fields, replace
from operator import methodcaller
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_bliss.data.shards import Shard
from megatron_bliss.data.validation import ValidationSet
from megatron_bliss.mcore.batches import Batch, bucket, make_batch
from megatron_bliss.mcore.models import token_losses
from megatron_bliss.mcore.parallel import ParallelContext, agreed
from megatron_bliss.mcore.read_ahead import read_ahead
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
class Windows:
    """Pieces of n sequences that fit into a model, and the batches they are put through it in."""

    owners: np.ndarray  # int64 [w], index of the sequence, ascending
    starts: np.ndarray  # int64 [w], in tokens
    stops: np.ndarray  # int64 [w]
    positions: np.ndarray  # int64 [w], predictions of each
    batches: list[np.ndarray]  # indices of windows

    @classmethod
    def of(cls, lengths: np.ndarray, sequence_length: int, batch_tokens: int, multiple: int) -> "Windows":
        """:param lengths: tokens of each sequence, [n].
        :param sequence_length: positions of a window at most.
        :param batch_tokens: positions of a batch at most, padding included.
        :param multiple: padded lengths are multiples of it.
        """
        counts = np.maximum(-(-(lengths.astype(np.int64) - 1) // sequence_length), 1)
        owners = np.repeat(np.arange(len(lengths)), counts)
        first = np.cumsum(counts) - counts
        starts = (np.arange(len(owners)) - first[owners]) * sequence_length
        stops = np.minimum(starts + sequence_length + 1, lengths[owners])
        positions = np.maximum(stops - starts - 1, 0)
        return cls(owners, starts, stops, positions, bucket(positions, batch_tokens, multiple))


@dataclass(frozen=True)
class Pass:
    """How sequences are put through a model."""

    context: ParallelContext
    sequence_length: int  # positions of a window at most
    batch_tokens: int  # positions of a forward pass at most, padding included

    @torch.no_grad()
    def totals(
        self, measure: Measure, sequences: Sequences, on_progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        """Totals and weights of every sequence: float64 [n, 2], the same on all ranks, bit by bit the same for every
        number of data-parallel ranks. All ranks call it.

        :param on_progress: called after each batch with the positions done so far on all ranks, about, without and
            with padding.
        """
        context, windows = self.context, self._windows(sequences)
        # every window has a place of its own: no sum depends on who did what
        result = torch.zeros(len(windows.owners), 2, dtype=torch.float64, device=context.device)
        done = padded = 0

        def note(members: np.ndarray, places: Tensor, batch: Batch) -> None:
            nonlocal done, padded
            result[places] = measure(batch).double()
            done += int(windows.positions[members].sum()) * context.dp_size
            padded += batch.tokens.numel() * context.dp_size
            if on_progress is not None:
                on_progress(done, padded)

        self._go_through(sequences, windows, note)
        if context.dp_size > 1:
            dist.all_reduce(result, group=context.dp_group)
        measured = result.cpu().numpy()
        totals = np.zeros((len(sequences.lengths), 2))
        np.add.at(totals, windows.owners, measured)
        return totals

    def each(self, sequences: Sequences, act: Callable[[Batch], None]) -> None:
        """Call `act` with each of this rank's batches, gradients enabled as they are. All ranks call it."""
        self._go_through(sequences, self._windows(sequences), lambda _, __, batch: act(batch))

    def _windows(self, sequences: Sequences) -> Windows:
        multiple = self.context.length_multiple
        return Windows.of(sequences.lengths, self.sequence_length, self.batch_tokens, multiple)

    def _go_through(
        self, sequences: Sequences, windows: Windows, act: Callable[[np.ndarray, Tensor, Batch], None]
    ) -> None:
        """:param act: is called with a batch on this rank's device, the windows in it, and these on the device."""
        mine = windows.batches[self.context.dp_rank :: self.context.dp_size]
        to_device = methodcaller("to", self.context.device, non_blocking=True)
        with self._failing_together(), closing(read_ahead(self._load(sequences, windows, mine))) as batches:
            for members, (places, batch) in zip(mine, batches, strict=True):
                act(members, to_device(places), _each(batch, to_device))

    def _failing_together(self) -> AbstractContextManager[None]:
        """Tensor-parallel ranks read the same and fail at the same place; data-parallel ones would wait for ever."""
        return agreed(self.context) if self.context.dp_size > 1 else nullcontext()

    def _load(
        self, sequences: Sequences, windows: Windows, batches: Iterable[np.ndarray]
    ) -> Iterator[tuple[Tensor, Batch]]:
        """Batches in the host's memory, pinned where there is a GPU, each with the places of its windows."""
        for members in batches:
            places, batch = torch.from_numpy(members), self._batch(sequences, windows, members)
            if self.context.device.type == "cuda":  # so that copies run beside the GPU's work
                places, batch = places.pin_memory(), _each(batch, torch.Tensor.pin_memory)
            yield places, batch

    def _batch(self, sequences: Sequences, windows: Windows, members: np.ndarray) -> Batch:
        tokens, masks = [], []
        columns = (windows.owners[members], windows.starts[members], windows.stops[members])
        for owner, start, stop in zip(*(column.tolist() for column in columns), strict=True):
            sequence, mask = sequences.get(owner)
            tokens.append(sequence[start:stop])
            if mask is not None:
                masks.append(mask[start:stop])
        return make_batch(tokens, torch.device("cpu"), self.context.length_multiple, masks or None)


def _each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """A batch with each of its tensors changed."""
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: change(tensor) for name, tensor in tensors.items() if tensor is not None})


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
