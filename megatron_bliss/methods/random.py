"""The control: a uniform draw, by a hash of (seed, shard digest, sequence id)."""

from typing import Literal

import numpy as np

from megatron_bliss.data.seeds import derive, hash_positions, uniform
from megatron_bliss.data.shards import ShardRecord
from megatron_bliss.methods.offline import OfflineMethod


class Random(OfflineMethod):
    name = "random"
    scored_by: Literal["none"] = "none"

    def score_without_model(self, record: ShardRecord, ids: np.ndarray, seed: int) -> np.ndarray:
        return uniform(hash_positions(derive(seed, "random", record.digest), ids)).astype(np.float32)
