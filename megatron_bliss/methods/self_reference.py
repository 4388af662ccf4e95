"""Self-reference: tokens compete by their excess loss over a running average of the model itself.

The average takes the model in every `interval` steps. Selection begins with the second time: until then it is a copy.
"""

from pathlib import Path
from typing import Literal


class SelfReference:
    """:param interval: steps between two models that the average is of."""

    name = "self"
    given: Path | None = None
    upkeep: Literal["average"] = "average"

    def __init__(self, interval: int) -> None:
        self._interval = interval

    def is_due(self, iteration: int, num_syncs: int) -> bool:
        return iteration > 0 and iteration % self._interval == 0

    def selects(self, num_syncs: int) -> bool:
        return num_syncs > 1
