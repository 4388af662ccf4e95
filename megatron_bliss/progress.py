"""Progress of long work: one line that a person can read, a user can grep and the launcher can parse."""

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_bliss.artifacts import atomic_write

_LINE = re.compile(r"^\[(?P<stage>[\w-]+)\] (?P<done>\d+)/(?P<total>\d+) (?P<unit>\S+)(?: \| (?P<rest>.*))?$")
_MEGATRON_LINE = re.compile(r"\biteration\s+(?P<done>\d+)/\s*(?P<total>\d+) \|", re.ASCII)


@dataclass
class Progress:
    """Prints at most one line every `interval` seconds, and always the last one. Only rank 0 should hold one."""

    stage: str
    total: int
    unit: str = "steps"
    start: int = 0  # units already done before this process
    interval: float = 2.0  # seconds
    _began: float = field(default_factory=time.monotonic)
    _last: float = 0.0

    def report(self, done: int, tokens: int | None = None, **figures: float) -> None:
        """:param done: units done in all.
        :param tokens: tokens handled by this process so far, for the rate.
        :param figures: further numbers to show, by name.
        """
        now = time.monotonic()
        if done < self.total and now - self._last < self.interval:
            return
        self._last = now
        elapsed = max(now - self._began, 1e-9)
        parts = [f"[{self.stage}] {done}/{self.total} {self.unit}"]
        if tokens is not None:
            parts.append(f"{tokens / elapsed / 1e3:.1f}k tokens/s")
        if done > self.start:
            left = (self.total - done) * elapsed / (done - self.start)
            parts.append(f"ETA {int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}")
        parts += [f"{name} {value:.4g}" for name, value in figures.items()]
        print(" | ".join(parts), flush=True)


@dataclass(frozen=True)
class Reading:
    """What a log line says of a stage's progress."""

    done: int
    total: int
    rest: str


def parse(line: str) -> Reading | None:
    """The progress in a line of a stage's log (ours or Megatron's), or None."""
    if match := _LINE.match(line.strip()):
        return Reading(int(match["done"]), int(match["total"]), match["rest"] or "")
    if match := _MEGATRON_LINE.search(line):
        loss = re.search(r"lm loss: (\S+)", line)
        return Reading(int(match["done"]), int(match["total"]), f"loss {float(loss[1]):.4g}" if loss else "")
    return None


class MetricsLog:
    """metrics.jsonl: a line of numbers a step or so. Only rank 0 should hold one.

    :param done: steps that are done before this process; lines beyond them, which a killed process left, are dropped.
    :param also: is called with what is written, step and figures.
    """

    def __init__(
        self, path: Path, done: int = 0, also: Callable[[int, Mapping[str, float | None]], None] | None = None
    ) -> None:
        self.path, self._also = path, also
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        with atomic_write(path, "w") as stream:
            stream.writelines(f"{line}\n" for line in lines if (step := _step(line)) is not None and step <= done)

    def write(self, step: int, **figures: float) -> None:
        """:param step: steps done in all. Numbers that are not finite become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        with open(self.path, "a") as stream:
            stream.write(json.dumps({"schema": 1, "step": step, **finite}, allow_nan=False) + "\n")
        if self._also is not None:
            self._also(step, finite)


def _step(line: str) -> int | None:
    """Of a whole line; a kill may have cut the last one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
