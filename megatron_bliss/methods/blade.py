"""BLADE (arXiv 2606.18650): tokens compete by their excess loss over a reference that keeps up with the model.

The reference is set to the model every `interval` steps and then trained a little further, on the validation set too.
"""

from pathlib import Path
from typing import Literal


class Blade:
    """:param interval: steps between synchronisations."""

    name = "blade"
    given: Path | None = None
    upkeep: Literal["train"] = "train"

    def __init__(self, interval: int) -> None:
        self._interval = interval

    def is_due(self, iteration: int, num_syncs: int) -> bool:
        return iteration > 0 and iteration % self._interval == 0

    def selects(self, num_syncs: int) -> bool:
        return num_syncs > 0
