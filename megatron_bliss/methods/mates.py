"""MATES (arXiv 2406.06046): a score model is fitted to what a step on a sequence does to the validation loss.

What it predicts is the fall of the loss in standard deviations of the sample it was fitted to, so that a temperature
means the same whatever the learning rate.
"""

from dataclasses import replace
from typing import Literal

from megatron_bliss.config import SelectionConfig
from megatron_bliss.methods.offline import OfflineMethod


class Mates(OfflineMethod):
    """:param temperature: of the Gumbel noise that the selection is drawn with; 0 keeps the best."""

    name = "mates"
    scored_by: Literal["score_model"] = "score_model"
    learns: Literal["influence"] = "influence"

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def settings(self, selection: SelectionConfig) -> SelectionConfig:
        return replace(selection, temperature=self._temperature)
