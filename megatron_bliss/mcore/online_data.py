"""What the reference of online selection is trained on: samples of the training data and of validation sets, drawn as
a function of (seed, step), whatever the number of ranks. The training's own iterator is never touched.

Samples are as Megatron's data loader gives them, so that the script's own `forward_step` takes them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from megatron_bliss.data.sampling import shuffled
from megatron_bliss.data.seeds import derive
from megatron_bliss.data.validation import ValidationSet
from megatron_bliss.mcore.batches import drawn_windows


class ValidationSamples:
    """Validation sets as samples of `length` positions, padded; of a longer sequence one window.

    Of several, each has its share of the samples: the smallest number of them in which every sequence is there at
    least once.

    :param sets: with their weights, which sum to 1.
    :param with_attention_mask: as --no-create-attention-mask-in-dataloader says.
    """

    def __init__(
        self, sets: Sequence[tuple[float, ValidationSet]], length: int, with_attention_mask: bool, seed: int
    ) -> None:
        self._sets, self._length, self._with_mask, self._seed = sets, length, with_attention_mask, seed
        total = max(len(validation) / weight for weight, validation in sets)
        self._ends = np.cumsum([max(round(weight * total), len(validation)) for weight, validation in sets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        validation = self._sets[which][1]
        tokens, mask = validation.get((index - int(self._ends[which - 1] if which else 0)) % len(validation))
        [window] = drawn_windows([len(tokens)], self._length, derive(self._seed, "window"), first=index)
        padded, predicted = np.zeros(self._length + 1, dtype=np.int64), np.zeros(self._length + 1, dtype=np.float32)
        count = len(tokens[window])
        padded[:count], predicted[:count] = tokens[window], mask[window]
        sample = {
            "tokens": torch.from_numpy(padded[:-1]),
            "labels": torch.from_numpy(padded[1:].copy()),
            "loss_mask": torch.from_numpy(predicted[1:].copy()),
            "position_ids": torch.arange(self._length),
        }
        if self._with_mask:
            sample["attention_mask"] = ~torch.ones(1, self._length, self._length, dtype=torch.bool).tril()
        return sample


class Stream:
    """Global batches of some samples, each once an epoch; a rank's micro-batches hold the samples that they would hold
    if Megatron's loader had drawn them.

    :param samples: indexed by position; None on ranks that read no data.
    """

    def __init__(
        self, samples: Any | None, seed: int, micro_batch_size: int, batch_size: int, dp_rank: int, dp_size: int
    ) -> None:
        self._samples, self._seed, self._batch_size = samples, seed, batch_size
        self._micro, self._dp_rank, self._dp_size = micro_batch_size, dp_rank, dp_size
        self.num_micro_batches = batch_size // (micro_batch_size * dp_size)

    def iterator(self, step: int) -> Iterator[Any] | None:
        """This rank's micro-batches of a 0-based step; None where the script reads none."""
        return None if self._samples is None else self._batches(self._samples, step)

    def _batches(self, samples: Any, step: int) -> Iterator[Any]:
        draws = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
        places = shuffled(draws, len(samples), self._seed).reshape(-1, self._dp_size, self._micro)
        for row in places[:, self._dp_rank]:
            yield default_collate([samples[int(place)] for place in row])
