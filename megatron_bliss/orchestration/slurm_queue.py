"""What Slurm says: jobs of a run, limits of the cluster. Reads what its commands print; accounting is not needed.

A run's jobs are known by their comment, `megatron-bliss:RUN:STAGE`, whoever submitted them from wherever.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_bliss.errors import UserError

_MARK = "megatron-bliss:"
_FIELDS = "%i|%T|%r|%N|%k"  # id, state, reason, nodes, comment
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
_HELD = "launch failed requeued held"  # as squeue writes it
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


@dataclass(frozen=True)
class Job:
    """A job, or a task of an array (`12_3`)."""

    id: str
    state: str
    reason: str  # why it is pending
    nodes: str
    stage: str

    @property
    def is_alive(self) -> bool:
        return self.state not in _ENDED

    @property
    def is_held(self) -> bool:
        """Whether Slurm itself holds it, as it does after a node could not start it, until somebody releases it."""
        return self.reason == _HELD

    @property
    def array(self) -> str:
        """Number that other jobs depend on: that of the whole array."""
        return self.id.partition("_")[0]


def is_here() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None


def call(words: Sequence[str]) -> str:
    """Output of a command of Slurm's.

    :raises UserError: with Slurm's own words, if it fails; if it is not there.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{words[0]} is not on this machine; call this where jobs are submitted") from None
    if done.returncode:
        raise UserError(f"{words[0]} failed: {_line(done.stderr) or 'no output'}")
    return done.stdout


def _line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def comment(run_dir: Path, stage: str) -> str:
    """Of a job of a run."""
    return f"{_MARK}{run_dir}:{stage}"


def jobs(run_dir: Path) -> list[Job]:
    """A run's jobs that Slurm remembers, ended ones among them; of an array each task.

    :raises UserError: if Slurm does not answer.
    """
    start, found = comment(run_dir, ""), []
    for line in call(["squeue", "--noheader", "--array", "--states=all", f"--format={_FIELDS}"]).splitlines():
        identity, state, reason, nodes, text = line.split("|", 4)
        if text.startswith(start):
            found.append(Job(identity, state, reason, nodes, text.removeprefix(start)))
    return found


def ended_states(numbers: Sequence[str]) -> dict[str, str]:
    """How jobs ended that Slurm itself has forgotten, by number, from its accounting; empty where there is none."""
    words = [
        "sacct",
        "--noheader",
        "--parsable2",
        "--allocations",
        "--format=JobID,State",
        f"--jobs={','.join(numbers)}",
    ]
    try:
        lines = call(words).splitlines() if numbers else []
    except UserError:  # accounting is off
        return {}
    return {number.partition("_")[0]: state for number, _, state in (line.partition("|") for line in lines)}


@dataclass(frozen=True)
class Partition:
    """Limits of a partition; None: there is none."""

    name: str
    num_nodes: int
    max_nodes: int | None
    max_seconds: int | None
    is_up: bool
    is_default: bool


def partitions() -> list[Partition]:
    """:raises UserError: if Slurm does not answer."""
    return [_partition(line) for line in call(["scontrol", "show", "partition", "--oneliner"]).splitlines() if line]


def _partition(line: str) -> Partition:
    values = dict(word.split("=", 1) for word in line.split() if "=" in word)
    max_nodes = values.get("MaxNodes", "UNLIMITED")
    return Partition(
        name=values["PartitionName"],
        num_nodes=int(values.get("TotalNodes", "0")),
        max_nodes=None if max_nodes == "UNLIMITED" else int(max_nodes),
        max_seconds=seconds(values.get("MaxTime", "UNLIMITED")),
        is_up=values.get("State") == "UP",
        is_default=values.get("Default") == "YES",
    )


def max_array_size() -> int:
    """An array's tasks are numbered below it.

    :raises UserError: if Slurm does not answer.
    """
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", call(["scontrol", "show", "config"]), re.MULTILINE)
    return int(found[1]) if found else 1001  # Slurm's own default


def seconds(time: str) -> int | None:
    """A time limit as Slurm writes it (minutes, m:s, h:m:s, d-h, d-h:m, d-h:m:s); None: there is no limit.

    :raises UserError: if it is none.
    """
    if time.upper() in ("UNLIMITED", "INFINITE", "NONE"):
        return None
    match = _TIME.fullmatch(time)
    if match is None:
        raise UserError(f"{time!r} is not a time limit; write it as 24:00:00 or 2-00:00:00")
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        hours, minutes, rest = (*parts, 0, 0)[:3]
        return int(match["days"]) * 86400 + hours * 3600 + minutes * 60 + rest
    if len(parts) == 1:
        return parts[0] * 60
    hours, minutes, rest = (0, *parts)[-3:]
    return hours * 3600 + minutes * 60 + rest
