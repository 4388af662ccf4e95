"""Makes Megatron's training split consist of a selection's sequences, without a copy of any shard.

`SelectedGPTDataset` narrows the sequence ids that Megatron hands to `GPTDataset`; packing, shuffling, blending,
splits, caches and resume stay Megatron's. `install()` puts the builder below in the place of Megatron's own, where a
training script then finds it.
"""

import copy
from typing import Any, ClassVar

import numpy as np
import torch
from megatron.core.datasets import blended_megatron_dataset_builder as megatron_builder
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from megatron.training.datasets.fim_dataset import GPTFIMDataset

from megatron_bliss.data.selection import Selection
from megatron_bliss.errors import UserError
from megatron_bliss.mcore.arguments import refuse_flags

_TRAIN = Split.train.value
_LENGTHS_AT_A_TIME = 4096


def _refuse_config(config: Any) -> None:
    for field, flag in (
        ("fast_cache_load", "--dataloader-fast-cache-load"),
        ("defer_npy_index_mmap", "--dataloader-defer-npy-index-mmap"),
        ("mock", "--mock-data"),
    ):
        if getattr(config, field):
            refuse_flags([flag])


class _TrainsOnSelection:
    """Mixed into a GPT dataset, which then is the training split's alone and has the kept sequences only.

    Megatron lists the ids of a split first, all of the pool's. Here it is told that there are none to list, and the
    kept ones are taken from the selection's memory-mapped file.
    """

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str,
        indexed_indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: Any,
    ) -> None:
        """:param indexed_indices: not looked at.

        :raises UserError: if the configuration bypasses the ids, or the selection does not know the shard.
        """
        _refuse_config(config)
        assert index_split is Split.train
        kept = _kept(config.selection.ids(dataset_path), config.training_span, len(indexed_dataset))
        super().__init__(indexed_dataset, dataset_path, kept, num_samples, index_split, config)  # type: ignore[call-arg]

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        """Sequences that Megatron is to list."""
        return 0

    def _get_num_tokens_per_epoch(self) -> int:
        # Megatron asks for it when it builds an index; where there is one, nobody reads the ids
        self.config.selection.verify_ids(self.dataset_path)  # type: ignore[attr-defined]
        return super()._get_num_tokens_per_epoch()  # type: ignore[misc]

    @staticmethod
    def _key_config_attributes() -> list[str]:
        # without the digest, Megatron's index cache would serve one selection's indices to another
        return [*GPTDataset._key_config_attributes(), "selection_digest"]


class SelectedGPTDataset(_TrainsOnSelection, GPTDataset):
    """`GPTDataset` on a selection."""


class SelectedGPTFIMDataset(_TrainsOnSelection, GPTFIMDataset):
    """`GPTFIMDataset` on a selection."""


_SELECTED = {GPTDataset: SelectedGPTDataset, GPTFIMDataset: SelectedGPTFIMDataset}


class SelectedDatasetBuilder(BlendedMegatronDatasetBuilder):
    """Megatron's builder with the selection's datasets, and without training domains that were left empty."""

    selection: ClassVar[Selection]
    is_used: ClassVar[bool] = False  # whether the script built its data with it

    def __init__(self, cls: type, sizes: list[int | None], is_built_on_rank: Any, config: Any) -> None:
        """:raises UserError: for a dataset class or configuration that cannot be narrowed."""
        SelectedDatasetBuilder.is_used = True
        _refuse_config(config)
        if cls not in _SELECTED:
            raise UserError(
                f"dataset class {cls.__name__} cannot be narrowed to a selection; only GPTDataset and GPTFIMDataset can"
            )
        super().__init__(cls, sizes, is_built_on_rank, config)

    def _build_blended_dataset_splits(self) -> list[Any]:
        per_split = self.config.blend_per_split
        span = self.config.split_matrix[_TRAIN] if per_split is None else (0.0, 1.0)
        blend = self.config.blend if per_split is None else per_split[_TRAIN]
        if blend is None or span is None:
            return self._build(self.cls, self.config)

        train, others = copy.copy(self.config), copy.copy(self.config)
        train.selection, train.selection_digest, train.training_span = self.selection, self.selection.digest, span
        remaining = self._without_empty_domains(blend, span)
        if per_split is None:
            train.blend = remaining
            train.split_matrix = [span if split is Split.train else None for split in Split]
            others.split_matrix = [
                None if split is Split.train else self.config.split_matrix[split.value] for split in Split
            ]
        else:
            train.blend_per_split = [remaining if split is Split.train else None for split in Split]
            others.blend_per_split = [None if split is Split.train else per_split[split.value] for split in Split]
        selected = self._build(_SELECTED[self.cls], train)[_TRAIN]
        return [selected, *self._build(self.cls, others)[_TRAIN + 1 :]]

    def _build(self, cls: type, config: Any) -> list[Any]:
        builder = BlendedMegatronDatasetBuilder(cls, self.sizes, self.is_built_on_rank, config)
        built: list[Any] = builder._build_blended_dataset_splits()
        return built

    def _without_empty_domains(
        self, blend: tuple[list[str], list[float] | None], span: tuple[float, float]
    ) -> tuple[list[str], list[float] | None]:
        """The blend without prefixes of which too little is kept for Megatron to build a dataset. Every rank reads the
        same selection and comes to the same answer."""
        prefixes, weights = blend
        # without weights each domain is read once, so it must fill a sample; with weights it is repeated as needed
        is_repeated = weights is not None or len(prefixes) == 1
        num_tokens = 1 if is_repeated else self.config.sequence_length + self.config.add_extra_token_to_sequence
        full = [self._keeps(prefix, span, num_tokens) for prefix in prefixes]
        if all(full):
            return blend
        if not any(full):
            raise UserError(
                f"selection {self.selection.directory} keeps nothing of the training data "
                f"({', '.join(prefixes)}); select more, or give the training split a larger share of --split"
            )
        for prefix in (prefix for prefix, is_full in zip(prefixes, full, strict=True) if not is_full):
            if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
                print(f"> {prefix}: nothing selected; dropped from the training blend, the other weights scaled up")
        keep = np.flatnonzero(full)
        return [prefixes[i] for i in keep], None if weights is None else [weights[i] for i in keep]

    def _keeps(self, prefix: str, span: tuple[float, float], num_tokens: int) -> bool:
        """Whether the kept sequences in this part of the shard have at least so many tokens."""
        shard = self.selection.shard(prefix)
        if span == (0.0, 1.0):
            return shard.counts.kept_tokens >= num_tokens
        ids = _kept(shard.ids, span, shard.record.num_sequences)
        if len(ids) == 0:
            return False
        dataset = IndexedDataset(prefix)  # its arrays are gone with it
        for first in range(0, len(ids), _LENGTHS_AT_A_TIME):
            num_tokens -= int(dataset.sequence_lengths[ids[first : first + _LENGTHS_AT_A_TIME]].sum(dtype=np.int64))
            if num_tokens <= 0:
                return True
        return False


def _kept(ids: np.ndarray, span: tuple[float, float], num_sequences: int) -> np.ndarray:
    """Those of a shard's ascending ids that lie in a split's span of its sequences: int32, a view."""
    ends = [round(end * float(num_sequences)) for end in span]  # as Megatron does it
    first, last = np.searchsorted(ids, np.array(ends, dtype=ids.dtype))  # of another dtype, all ids would be converted
    return np.asarray(ids[first:last])


def install(selection: Selection) -> None:
    """Put the selection between every script that is imported from now on and Megatron's datasets."""
    SelectedDatasetBuilder.selection, SelectedDatasetBuilder.is_used = selection, False
    megatron_builder.BlendedMegatronDatasetBuilder = SelectedDatasetBuilder


def check_used(script: str) -> None:
    """:raises UserError: if the script has ended without building its data through the selection."""
    if not SelectedDatasetBuilder.is_used:
        raise UserError(
            f"{script} did not read selection {SelectedDatasetBuilder.selection.directory}: it builds its data without "
            "Megatron's BlendedMegatronDatasetBuilder, so what it trained is not of the selection; use that class"
        )
