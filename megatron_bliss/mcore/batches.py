"""Sequences of tokens as padded batches for next-token prediction.

A sequence of L tokens gives L - 1 predictions: inputs are its first L - 1 tokens, labels its last L - 1. Attention is
causal and padding is at the end, so what a model computes for real positions does not depend on the padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_bliss.data.seeds import hash_positions


@dataclass(frozen=True)
class Batch:
    """b sequences, padded to s positions."""

    tokens: Tensor  # int64 [b, s]
    labels: Tensor  # int64 [b, s]
    loss_mask: Tensor  # float32 [b, s], 1 where a loss counts
    lengths: Tensor  # int64 [b], positions that are not padding
    labelled: Tensor | None  # int64 [n], where loss_mask is 1, as position · b + row; None: everywhere


def make_batch(
    sequences: Sequence[np.ndarray],
    device: torch.device,
    multiple: int = 1,
    loss_masks: Sequence[np.ndarray] | None = None,
) -> Batch:
    """Pad sequences to the longest of them.

    :param sequences: token ids, each [length].
    :param multiple: s is a multiple of it (`ParallelContext.length_multiple`).
    :param loss_masks: for each sequence [length], whether its tokens are to be predicted; None: all but the first.
    """
    num_tokens = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
    lengths = np.maximum(num_tokens - 1, 0)
    width = padded_length(int(lengths.max(initial=1)), multiple)
    place = np.arange(width + 1)
    is_token, is_real = place < num_tokens[:, None], place[:-1] < lengths[:, None]
    padded = np.zeros((len(sequences), width + 1), dtype=np.int64)
    padded[is_token] = np.concatenate(sequences)
    tokens, labels = padded[:, :-1] * is_real, padded[:, 1:].copy()
    mask = is_real.astype(np.float32)
    if loss_masks is not None:
        is_predicted = np.zeros((len(sequences), width + 1), dtype=np.float32)
        is_predicted[is_token] = np.concatenate(loss_masks)
        mask *= is_predicted[:, 1:]

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    # found on the host: a device would have to be waited for
    labelled = None if mask.all() else put(np.flatnonzero(mask.T))
    return Batch(put(tokens), put(labels), put(mask), put(lengths), labelled)


def padded_length(length: int, multiple: int) -> int:
    return -(-max(length, 1) // multiple) * multiple


def mean_losses(losses: Tensor, batch: Batch) -> Tensor:
    """Mean loss of every sequence over the positions that count: [b]; 0 where none does.

    :param losses: [b, s], of every position.
    """
    return (losses * batch.loss_mask).sum(1) / batch.loss_mask.sum(1).clamp_min(1)


def cut_windows(length: int, sequence_length: int) -> list[tuple[int, int]]:
    """[start, stop) of windows that together predict every token of a sequence once, `sequence_length` at most each.

    A window's first token is the last that the window before it predicted.
    """
    starts = range(0, max(length - 1, 1), sequence_length)
    return [(start, min(start + sequence_length + 1, length)) for start in starts]


def drawn_windows(lengths: Sequence[int] | np.ndarray, sequence_length: int, seed: int, first: int = 0) -> list[slice]:
    """One of the windows of each sequence, by a draw for each place.

    :param lengths: tokens of each.
    :param first: place of the first; those of the others follow.
    """
    draws = hash_positions(seed, np.arange(first, first + len(lengths))).tolist()
    windows = [cut_windows(int(length), sequence_length) for length in lengths]
    return [slice(*found[draw % len(found)]) for found, draw in zip(windows, draws, strict=True)]


def bucket(lengths: np.ndarray, batch_tokens: int, multiple: int = 1) -> list[np.ndarray]:
    """Group sequences of like lengths into batches of at most `batch_tokens` positions, padding included, the longest
    first, so that what does not fit into memory shows at once.

    :param lengths: positions of each sequence, [n].
    :returns: int64 indices into `lengths`, each once; a sequence longer than the budget is a batch of its own.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(batch_tokens // padded_length(int(lengths[order[start]]), multiple), 1)
        batches.append(order[start : start + size])
        start += size
    return batches
