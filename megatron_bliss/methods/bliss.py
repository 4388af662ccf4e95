"""BLISS (arXiv 2510.06048): a score model that the bilevel loop trains scores every sequence of the slice."""

from typing import Literal

from megatron_bliss.methods.offline import OfflineMethod


class Bliss(OfflineMethod):
    name = "bliss"
    scored_by: Literal["score_model"] = "score_model"
    learns: Literal["bilevel"] = "bilevel"
