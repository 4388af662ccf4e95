"""Offline methods: one score a sequence, made before the training it decides on. Higher is better.

A score passes through two hands. `from_output` turns what a stage measured into what the score files hold; it sees
a batch at a time. `finish` turns the scores of a whole slice into what is compared, for methods that need all of
them (the median, for example). Methods that need no model score a shard directly.

A new method is one file with a subclass, and a line in `methods.offline_method`.
"""

from typing import Literal, Protocol

import numpy as np

from megatron_bliss.data.shards import ShardRecord


class OfflineMethod(Protocol):
    """What the stages need to know of a method; they never look at its name."""

    name: str
    scored_by: Literal["score_model", "proxy_loss", "none"]  # whose output is scored; none: no score stage
    learns: bool = False  # there is a bilevel stage

    def from_output(self, output: np.ndarray) -> np.ndarray:
        """:param output: float32 [n]: the score model's output, or the proxy's mean loss on each sequence in nats.
        :returns: float32 [n] for the score files.
        """
        return output

    def score_without_model(self, record: ShardRecord, ids: np.ndarray, seed: int) -> np.ndarray:
        """Score sequences of a shard where `scored_by` is "none": float32 [len(ids)]."""
        raise AssertionError(f"{self.name} is scored by {self.scored_by}")

    def finish(self, scores: list[np.ndarray]) -> list[np.ndarray]:
        """:param scores: float32 [n] of the slice's sequences, one array a shard.
        :returns: the same shapes: what is compared when the selection is made.
        """
        return scores
