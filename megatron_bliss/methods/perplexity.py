"""Selection by the warmed-up proxy's mean loss on a sequence: keep the low, the middle or the high ones.

The score files hold −loss for `low` and `middle`, +loss for `high`. The middle of a slice is known only when all of it
is scored, so `middle` becomes −|score − median of the slice| when the selection is made.
"""

from typing import Literal

import numpy as np

from megatron_bliss.methods.offline import OfflineMethod


class Perplexity(OfflineMethod):
    """:param keep: low | middle | high."""

    scored_by: Literal["proxy_loss"] = "proxy_loss"

    def __init__(self, keep: str) -> None:
        self.name = f"perplexity-{keep}"
        self._keep = keep
        self.needs_median = keep == "middle"

    def from_output(self, output: np.ndarray) -> np.ndarray:
        return output if self._keep == "high" else -output

    def compared(self, scores: np.ndarray, median: np.float32) -> np.ndarray:
        return -np.abs(scores - median) if self.needs_median else scores
