"""Which samples hold a sequence, as told from Megatron's index files, against the samples that Megatron serves."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets import blended_megatron_dataset_builder as megatron_builder

from megatron_bliss.data.shards import Shard
from megatron_bliss.data.training_order import TrainingOrder
from megatron_bliss.errors import UserError
from tests.selections import select, write_numbered_shard
from tests.test_hook import build, config_of, data_arguments


@pytest.fixture(autouse=True)
def _megatrons_builder() -> Iterator[None]:
    original = megatron_builder.BlendedMegatronDatasetBuilder
    yield
    megatron_builder.BlendedMegatronDatasetBuilder = original


@pytest.mark.parametrize(
    ("form", "num_samples", "length"),  # about 80 samples of 16 tokens, or 20 of 64, are an epoch of a shard
    [("single", 20, 16), ("single", 210, 16), ("single", 100, 64), ("per-split", 100, 16), ("per-split", 100, 64)],
)
def test_every_sequence_is_in_just_these_samples(form: str, num_samples: int, length: int, tmp_path: Path) -> None:
    shards = [write_numbered_shard(tmp_path / name, 200, 10_000 * (i + 1), i) for i, name in enumerate("abv")]
    kept = {prefix: np.arange(i, 200, 3) for i, prefix in enumerate(shards[: 1 if form == "single" else 2])}
    config = config_of(data_arguments(form, shards[:2], shards[2], tmp_path), tmp_path)
    config.sequence_length = length
    if form == "single":
        config.split, config.split_matrix = "100,0,0", [(0, 1.0), None, None]
    selection = select(tmp_path / "selection", kept)
    train, *_ = build(config, selection, num_samples)
    served = [{*train[k]["tokens"].tolist(), int(train[k]["labels"][-1])} for k in range(len(train))]
    order = TrainingOrder.find(tmp_path / "cache", selection)
    assert order is not None
    found = 0
    for prefix in kept:
        shard = Shard(prefix)
        for sequence_id in range(len(shard)):
            tokens = set(shard[sequence_id].tolist())
            told = order.samples(prefix, sequence_id, len(tokens)).tolist()
            assert told == [k for k, sample in enumerate(served) if tokens & sample]
            found += len(told)
    assert found >= num_samples


def test_what_is_not_there_or_not_clear(tmp_path: Path) -> None:
    shards = [write_numbered_shard(tmp_path / name, 200, 10_000 * (i + 1), i) for i, name in enumerate("abv")]
    selection = select(tmp_path / "selection", {prefix: np.arange(100) for prefix in shards[:2]})
    cache = tmp_path / "cache"
    assert TrainingOrder.find(cache, selection) is None
    for num_samples in (20, 30):
        build(config_of(data_arguments("per-split", shards[:2], shards[2], tmp_path), tmp_path), selection, num_samples)
        if num_samples == 20:
            order = TrainingOrder.find(cache, selection)
            assert order is not None
            assert order.samples(shards[2], 1, 5).size == 0, "not of the selection"
    with pytest.raises(UserError, match="holds the indices of 2 trainings on this selection"):
        TrainingOrder.find(cache, selection)
    for path in cache.glob("*document_index.npy"):
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"document_index\.npy is missing or cut short"):
        order.samples(shards[0], 1, 5)
