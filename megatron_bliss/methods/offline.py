"""Offline methods: one score a sequence, made before the training it decides on. Higher is better.

A score passes through two hands. `from_output` turns what a stage measured into what the score files hold; it sees
a batch at a time. `compared` turns them into what is compared when the selection is made, for methods that need to
know the median of the whole slice. Methods that need no model score a shard directly.

A new method is one file with a subclass, and a line in `methods.offline_method`.
"""

from dataclasses import replace
from typing import Literal, Protocol

import numpy as np

from megatron_bliss.config import SelectionConfig
from megatron_bliss.data.shards import ShardRecord


class OfflineMethod(Protocol):
    """What the stages need to know of a method; they never look at its name."""

    name: str
    scored_by: Literal["score_model", "proxy_loss", "ngrams", "none"]  # whose output is scored; none: no score stage
    learns: Literal["bilevel", "influence", "ngrams"] | None = None  # how a round makes what it is scored by
    takes_all: bool = False  # each round takes all that it is offered, whatever the rounds before took
    needs_median: bool = False  # `compared` has to know the median of all candidates' scores

    @property
    def needs_proxy(self) -> bool:
        """Whether the proxy is warmed up for it."""
        return self.scored_by in ("score_model", "proxy_loss")

    def from_output(self, output: np.ndarray) -> np.ndarray:
        """:param output: float32 [n]: the score model's output, the proxy's mean loss on each sequence in nats, or the
            log-ratio of its n-grams.
        :returns: float32 [n] for the score files.
        """
        return output

    def score_without_model(self, record: ShardRecord, ids: np.ndarray, seed: int) -> np.ndarray:
        """Score sequences of a shard where `scored_by` is "none": float32 [len(ids)]."""
        raise AssertionError(f"{self.name} is scored by {self.scored_by}")

    def compared(self, scores: np.ndarray, median: np.float32) -> np.ndarray:
        """:param scores: float32 [n] of the score files.
        :param median: of all candidates; 0 unless `needs_median`.
        :returns: float32 [n]: what is compared when the selection is made.
        """
        return scores

    def settings(self, selection: SelectionConfig) -> SelectionConfig:
        """What of the user's settings a selection by this method is made with."""
        # where nothing is scored, the draw is a random one already
        return replace(selection, temperature=0.0) if self.scored_by == "none" else selection
