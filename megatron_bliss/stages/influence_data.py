"""Which sequences of a round are probed, and the sequences that the probing steps are judged by."""

from dataclasses import dataclass

import numpy as np

from megatron_bliss.config import RunConfig
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.sampling import SequenceSampler
from megatron_bliss.data.seeds import derive
from megatron_bliss.data.shards import ShardRecord, verify_shard
from megatron_bliss.data.slices import Slicing
from megatron_bliss.data.validation import ValidationSet
from megatron_bliss.errors import UserError
from megatron_bliss.mcore.batches import drawn_windows


class InfluenceSample:
    """Some sequences of the round's slice in random order, each once: a function of (seed, round).

    Of a sequence longer than a sample of the model one window is taken. The last `num_held_out` are not fitted to.

    :raises UserError: if the slice is too small for a sample, or a shard changed.
    """

    def __init__(self, config: RunConfig, inventory: Inventory, round_number: int) -> None:
        settings, seed = config.mates, derive(config.seed, "influence", round_number)
        ids = Slicing.of(config, inventory).ids_by_name(round_number)
        sampler = SequenceSampler(inventory.pool, ids, derive(seed, "sample"))
        self._samples = sampler.batch(0, min(settings.sample_size, len(sampler)))
        self.num_held_out = round(settings.held_out * len(self._samples))
        if min(self.num_held_out, self.num_fitted) < 2:
            raise UserError(
                f"a sample of {len(self._samples)} sequences with mates.held_out={settings.held_out} leaves "
                f"{self.num_fitted} to fit to and {self.num_held_out} to test on, and both need two; raise "
                "mates.sample_size, or use a larger pool or fewer rounds"
            )
        self._shards = [verify_shard(record) for record in inventory.pool]
        lengths = [self._shards[index].sequence_lengths[id_] for index, id_ in self._samples]
        self._windows = drawn_windows(lengths, config.data.sequence_length, derive(seed, "window"))
        self.lengths = np.array([window.stop - window.start for window in self._windows])  # tokens of each

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def num_fitted(self) -> int:
        return len(self) - self.num_held_out

    def get(self, index: int) -> tuple[np.ndarray, None]:
        """Token ids [length]; None: all but the first are to be predicted."""
        shard, sequence_id = self._samples[index]
        return self._shards[shard][sequence_id][self._windows[index]], None


@dataclass(frozen=True)
class ReferenceSet:
    """Sequences of one validation set that the probing steps of a round are judged by."""

    weight: float  # of its loss; those of all sets sum to 1
    tokens: list[np.ndarray]
    masks: list[np.ndarray]


def reference_sets(config: RunConfig, inventory: Inventory, round_number: int) -> list[ReferenceSet]:
    """Of each validation set, by `data.validation_weights`: also where these move in the bilevel loop."""
    seed = derive(config.seed, "influence", round_number, "reference")
    weights = config.data.validation_weights
    return [
        ReferenceSet(weights[name], *_drawn(config, record, derive(seed, name)))
        for name, record in inventory.validation.items()
    ]


def _drawn(config: RunConfig, record: ShardRecord, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    found = ValidationSet.of(record)
    sampler = SequenceSampler([record], {record.name: np.arange(len(found), dtype=np.int32)}, seed)
    drawn = sampler.batch(0, min(config.mates.reference_sequences, len(found)))
    pairs = [found.get(sequence_id) for _, sequence_id in drawn]
    lengths = [len(tokens) for tokens, _ in pairs]
    windows = drawn_windows(lengths, config.data.sequence_length, derive(seed, "window"))
    cut = [(tokens[window], mask[window]) for (tokens, mask), window in zip(pairs, windows, strict=True)]
    return [tokens for tokens, _ in cut], [mask for _, mask in cut]
