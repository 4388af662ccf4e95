"""RHO-1 (arXiv 2404.07965): the same competition against a given reference that stays as it is."""

from pathlib import Path
from typing import Literal


class Rho1:
    """:param reference: directory of its checkpoint."""

    name = "rho1"
    upkeep: Literal["none"] = "none"

    def __init__(self, reference: Path) -> None:
        self.given: Path | None = reference

    def is_due(self, iteration: int) -> bool:
        return False

    def selects(self, num_syncs: int) -> bool:
        return True
