"""What the end of a stage's log says: how far it is, and why it failed."""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_bliss.progress import Reading, parse

_TAIL_BYTES = 1 << 16
_ERROR = re.compile(r"^(?:\[\w+\]:)?error: (.+)$")  # torchrun may put the rank before a line
_RANK_EXIT_CODE = re.compile(r"^\s*exitcode\s*:\s*(-?\d+)")  # torchrun's summary; it exits with 1 itself


def tail(log: Path, offset: int = 0) -> list[str]:
    """The last lines of a log, none of them from before `offset` bytes."""
    try:
        with open(log, "rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(offset, size - _TAIL_BYTES))
            return stream.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def last_reading(lines: list[str], iterations: tuple[int, int] | None = None) -> Reading | None:
    """The newest progress among the lines.

    :param iterations: first and last iteration of the stage; Megatron counts through all rounds.
    """
    reading = next((reading for line in reversed(lines) if (reading := parse(line))), None)
    if reading is None or iterations is None:
        return reading
    first, last = iterations
    return Reading(max(reading.done - first, 0), last - first, reading.rest)


def user_error(lines: list[str], exit_code: int) -> str | None:
    """The sentence a stage left if it exited with 2 (bad input), itself or as a rank of torchrun."""
    codes = {exit_code} | {int(match[1]) for line in lines if (match := _RANK_EXIT_CODE.match(line))}
    if 2 not in codes:
        return None
    return next((match[1] for line in reversed(lines) if (match := _ERROR.match(line))), None)


@dataclass
class Pace:
    """How fast a running stage goes, from two looks at its progress."""

    first: Reading | None = None
    first_seen: float = 0.0  # seconds

    def remaining(self, reading: Reading, now: float) -> float | None:
        """Seconds to go, or None until there is something to go by."""
        if self.first is None or reading.done < self.first.done:
            self.first, self.first_seen = reading, now
        done = reading.done - self.first.done
        return (reading.total - reading.done) * (now - self.first_seen) / done if done else None


def clock(seconds: float) -> str:
    """h:mm:ss"""
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"
