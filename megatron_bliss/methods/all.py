"""No selection: a round trains for as many steps on the whole of its slice, blended by the user's weights.

The filters by length hold; how much is kept, quotas and what earlier rounds took do not.
"""

from dataclasses import replace
from typing import Literal

import numpy as np

from megatron_bliss.config import SelectionConfig
from megatron_bliss.data.shards import ShardRecord
from megatron_bliss.methods.offline import OfflineMethod


class All(OfflineMethod):
    name = "all"
    scored_by: Literal["none"] = "none"
    takes_all = True

    def score_without_model(self, record: ShardRecord, ids: np.ndarray, seed: int) -> np.ndarray:
        return np.zeros(len(ids), dtype=np.float32)

    def settings(self, selection: SelectionConfig) -> SelectionConfig:
        return replace(
            super().settings(selection),
            fraction=1.0,
            tokens=None,
            threshold=None,
            blend="keep",
            quotas={},
            max_repeats=1,
        )
