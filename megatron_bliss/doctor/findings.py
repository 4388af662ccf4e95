"""What a check has found."""

from dataclasses import dataclass
from typing import Literal

from megatron_bliss.errors import UserError

# ok: as it should be. gap: a run works, at a cost. broken: it cannot work like this.
Status = Literal["ok", "gap", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    name: str
    status: Status
    value: str  # what is here
    costs: str = ""  # what that costs, in plain words; of gaps and what is broken
    remedy: str = ""  # the command, or else the change, that closes it


def broken(name: str, error: UserError, costs: str, remedy: str) -> Finding:
    """:param remedy: where the error names none, after its last semicolon."""
    problem, _, named = str(error).rpartition("; ")
    return Finding(name, "broken", problem or named, costs, named if problem else remedy)


def can_run(findings: list[Finding]) -> bool:
    return all(finding.status != "broken" for finding in findings)
