"""What the bilevel loop sees: the sequences of every outer step, and the micro-batches made of them."""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_bliss.artifacts import digest_json
from megatron_bliss.config import RunConfig
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.sampling import SequenceSampler, share_of_rank
from megatron_bliss.data.seeds import derive
from megatron_bliss.data.shards import ShardRecord, verify_shard
from megatron_bliss.data.slices import Slicing
from megatron_bliss.data.target_cache import Known
from megatron_bliss.data.validation import ValidationSet
from megatron_bliss.mcore.batches import Batch, drawn_windows, make_batch
from megatron_bliss.mcore.lower_level import MicroBatch, micro_batches
from megatron_bliss.mcore.parallel import ParallelContext
from megatron_bliss.mcore.top_k import TopK


class BilevelDraws:
    """The global batches of every step as a function of (seed, step).

    The pool is the round's slice, each of its sequences once an epoch; so is each validation set. Of a sequence longer
    than a sample one window is taken, another one each time.
    """

    def __init__(self, config: RunConfig, inventory: Inventory, round_number: int) -> None:
        self._settings, self._length = config.bilevel, config.data.sequence_length
        self._seed = derive(config.seed, "bilevel", round_number)
        self._shards = [verify_shard(record) for record in inventory.pool]
        slicing = Slicing.of(config, inventory)
        self._pool = SequenceSampler(inventory.pool, slicing.ids_by_name(round_number), derive(self._seed, "pool"))
        self._validation = [self._with_sampler(name, record) for name, record in inventory.validation.items()]
        slices = [inventory.digest, config.seed, config.num_slices, config.data.held_out]
        self.pool_digest = digest_json(["pool", *slices, round_number, self._length, self._settings.batch_size])

    def pool(self, step: int) -> list[np.ndarray]:
        """Tokens of the pool at a 0-based step, a window a sequence."""
        samples = self._pool.batch(step, self._settings.batch_size)
        sequences = [self._shards[index][sequence_id] for index, sequence_id in samples]
        return [sequence[window] for sequence, window in zip(sequences, self._windows(sequences, step), strict=True)]

    def validation(self, step: int) -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
        """Tokens and loss masks of each validation set at a 0-based step."""
        found = []
        for validation, sampler in self._validation:
            samples = sampler.batch(step, self._settings.validation_batch_size)
            pairs = [validation.get(sequence_id) for _, sequence_id in samples]
            windows = self._windows([tokens for tokens, _ in pairs], step)
            cut = [(tokens[window], mask[window]) for (tokens, mask), window in zip(pairs, windows, strict=True)]
            found.append(([tokens for tokens, _ in cut], [mask for _, mask in cut]))
        return found

    def _with_sampler(self, name: str, record: ShardRecord) -> tuple[ValidationSet, SequenceSampler]:
        validation = ValidationSet.of(record)
        everything = {record.name: np.arange(len(validation), dtype=np.int32)}
        purpose = ["validation"] if name == "validation" else ["validation", name]
        return validation, SequenceSampler([record], everything, derive(self._seed, *purpose))

    def _windows(self, sequences: Sequence[np.ndarray], step: int) -> list[slice]:
        lengths, seed = [len(sequence) for sequence in sequences], derive(self._seed, "window", step)
        return drawn_windows(lengths, self._length, seed)


class BilevelData:
    """This rank's micro-batches of every step; together they are the same for any number of ranks."""

    def __init__(self, config: RunConfig, draws: BilevelDraws, context: ParallelContext) -> None:
        self._settings, self._draws, self._context = config.bilevel, draws, context
        for size in (self._settings.batch_size, self._settings.validation_batch_size):
            share_of_rank([(0, 0)] * size, context.dp_rank, context.dp_size)  # refuse a size that cannot be shared

    @property
    def rows(self) -> range:
        """This rank's sequences of a step's batch of the pool."""
        return range(self._context.dp_rank, self._settings.batch_size, self._context.dp_size)

    def pool(self, step: int, known: Sequence[Known] | None = None) -> list[MicroBatch]:
        """Micro-batches of the pool at a 0-based step.

        :param known: of the target, for each of `rows`, where it is not here itself.
        """
        batches = self._batches(self._draws.pool(step))
        if known is None:
            return micro_batches(batches, self._context)
        size = self._settings.micro_batch_size
        parts = [known[start : start + size] for start in range(0, len(known), size)]
        target = [top_k_at_labels(part, batch) for part, batch in zip(parts, batches, strict=True)]
        return micro_batches(batches, self._context, target)

    def validation(self, step: int) -> list[list[MicroBatch]]:
        """Micro-batches of each validation set at a 0-based step."""
        return [
            micro_batches(self._batches(tokens, masks), self._context) for tokens, masks in self._draws.validation(step)
        ]

    def _batches(self, sequences: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None = None) -> list[Batch]:
        mine = range(self._context.dp_rank, len(sequences), self._context.dp_size)
        size = self._settings.micro_batch_size
        return [
            make_batch(
                [sequences[i] for i in mine[start : start + size]],
                self._context.device,
                self._context.length_multiple,
                None if masks is None else [masks[i] for i in mine[start : start + size]],
            )
            for start in range(0, len(mine), size)
        ]


def top_k_at_labels(known: Sequence[Known], batch: Batch) -> TopK:
    """What is known of a batch's sequences in the order of its labelled tokens: by position, then by sequence."""
    places = np.concatenate([np.arange(len(ids)) for ids, _ in known])
    order = np.argsort(places, kind="stable")
    ids = np.concatenate([ids for ids, _ in known])[order].astype(np.int64)
    log_probs = np.concatenate([log_probs for _, log_probs in known])[order]
    device = batch.tokens.device
    num_labelled = batch.tokens.numel() if batch.labelled is None else len(batch.labelled)
    assert len(ids) == num_labelled, "the cache's sequences are as long as those drawn"
    return TopK(*(torch.from_numpy(array).to(device, non_blocking=True) for array in (ids, log_probs)))
