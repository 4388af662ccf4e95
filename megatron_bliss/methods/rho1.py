"""RHO-1 (arXiv 2404.07965): the same competition against a reference that stays as it is.

It is given, or made before the first step: the model as it is then, trained a little further on the validation set
alone, as the paper trains its reference on data of high quality.
"""

from pathlib import Path
from typing import Literal


class Rho1:
    """:param reference: directory of its checkpoint; None: it is made."""

    name = "rho1"

    def __init__(self, reference: Path | None) -> None:
        self.given = reference
        self.upkeep: Literal["tune", "none"] = "tune" if reference is None else "none"

    def is_due(self, iteration: int, num_syncs: int) -> bool:
        return self.given is None and num_syncs == 0

    def selects(self, num_syncs: int) -> bool:
        return self.given is not None or num_syncs > 0
