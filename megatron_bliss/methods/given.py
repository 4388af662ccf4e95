"""Scores that are there already, of whatever method made them."""

from typing import Literal

from megatron_bliss.methods.offline import OfflineMethod


class Given(OfflineMethod):
    """:param name: that the score files give the method."""

    scored_by: Literal["score_model"] = "score_model"

    def __init__(self, name: str) -> None:
        self.name = name
