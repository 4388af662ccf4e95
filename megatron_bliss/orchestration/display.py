"""The launcher's one display for people: live bars on a terminal, plain lines elsewhere."""

import time
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_bliss.orchestration.logs import Pace, clock, last_reading, tail
from megatron_bliss.orchestration.plan import Stage
from megatron_bliss.orchestration.state import Record
from megatron_bliss.progress import Reading

_PLAIN_INTERVAL = 15.0  # seconds between two lines on a running stage
_REFRESH_INTERVAL = 0.5  # seconds
_UPCOMING = 4  # stages named as next


class View(Protocol):
    """What the launcher tells its display."""

    def __enter__(self) -> "View": ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def started(self, stage: Stage, record: Record, why: str) -> None: ...
    def ended(self, stage: Stage, record: Record) -> None: ...
    def tick(self, running: list[tuple[Stage, Record]], waiting: list[str], num_done: int) -> None: ...


def view(console: Console, run_dir: Path) -> View:
    return LiveView(console, run_dir) if console.is_terminal else PlainView(console, run_dir)


class _Watch:
    """Progress of running stages, read from the ends of their logs."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._paces: dict[tuple[str, int], Pace] = {}

    def look(self, stage: Stage, record: Record) -> tuple[Reading | None, str]:
        """The stage's progress and the same in words."""
        reading = last_reading(tail(self._run_dir / (record.log or ""), record.log_offset), stage.iterations)
        if reading is None:
            return None, "starting"
        words = reading.rest
        remaining = self._paces.setdefault((stage.name, record.attempts), Pace()).remaining(reading, time.monotonic())
        if "ETA" not in words and remaining is not None:
            words = " | ".join(part for part in (f"ETA {clock(remaining)}", words) if part)
        return reading, words


def _ending(stage: Stage, record: Record, run_dir: Path) -> str:
    took = clock((record.finished or 0) - (record.started or 0))
    if record.status != "done":
        return f"{stage.name} {'stopped' if record.status == 'pending' else record.status} after {took}"
    reading = last_reading(tail(run_dir / (record.log or ""), record.log_offset))
    figures = [part for part in (reading.rest if reading else "").split(" | ") if part and not part.startswith("ETA")]
    return " | ".join([f"{stage.name} done in {took}", *figures, *filter(None, [record.note])])


class PlainView:
    """A line when a stage starts or ends, and now and then one on each that runs."""

    def __init__(self, console: Console, run_dir: Path) -> None:
        self._run_dir, self._watch = run_dir, _Watch(run_dir)
        self._began = self._last = time.monotonic()
        self._console = console

    def __enter__(self) -> "PlainView":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def _print(self, line: str) -> None:
        # not wrapped: a line is what other programs read
        self._console.print(f"{clock(time.monotonic() - self._began)} {line}", soft_wrap=True, markup=False)

    def started(self, stage: Stage, record: Record, why: str) -> None:
        self._print(f"{stage.name} started ({why})" if why else f"{stage.name} started")

    def ended(self, stage: Stage, record: Record) -> None:
        self._print(_ending(stage, record, self._run_dir))

    def tick(self, running: list[tuple[Stage, Record]], waiting: list[str], num_done: int) -> None:
        if time.monotonic() - self._last < _PLAIN_INTERVAL:
            return
        self._last = time.monotonic()
        total = num_done + len(running) + len(waiting)
        for stage, record in running:
            reading, words = self._watch.look(stage, record)
            done = f" {reading.done}/{reading.total}" if reading else ""
            self._print(f"[{num_done}/{total} stages] {stage.name}{done} | {words}")


class LiveView:
    """Bars for what runs, what is to come below, what is done above."""

    def __init__(self, console: Console, run_dir: Path) -> None:
        self._run_dir, self._watch = run_dir, _Watch(run_dir)
        self._began, self._last = time.monotonic(), 0.0
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> "LiveView":
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def started(self, stage: Stage, record: Record, why: str) -> None:
        self._last = 0.0
        if why:
            self._live.console.print(Text(f"  {stage.name}: {why}", style="yellow"))

    def ended(self, stage: Stage, record: Record) -> None:
        mark, style = {"done": ("✓", "green"), "failed": ("✗", "bold red")}.get(record.status, ("-", "yellow"))
        self._live.console.print(Text(f"{mark} {_ending(stage, record, self._run_dir)}", style=style))

    def tick(self, running: list[tuple[Stage, Record]], waiting: list[str], num_done: int) -> None:
        if time.monotonic() - self._last < _REFRESH_INTERVAL:
            return
        self._last = time.monotonic()
        bars = Table.grid(padding=(0, 1))
        for _ in range(4):
            bars.add_column(no_wrap=True)
        bars.add_column(no_wrap=True, overflow="ellipsis")
        for stage, record in running:
            reading, words = self._watch.look(stage, record)
            bar = ProgressBar(reading.total if reading else None, reading.done if reading else 0, width=24)
            count = f"{reading.done}/{reading.total}" if reading else ""
            took = clock(time.time() - (record.started or time.time()))
            bars.add_row(stage.name, bar, count, took, words)
        elapsed = clock(time.monotonic() - self._began)
        total = num_done + len(running) + len(waiting)
        more = f" and {len(waiting) - _UPCOMING} more" if len(waiting) > _UPCOMING else ""
        upcoming = f"next: {', '.join(waiting[:_UPCOMING])}{more}" if waiting else "nothing else to come"
        header = Text(f"{self._run_dir}: {num_done} of {total} stages done, {elapsed} elapsed", style="bold")
        self._live.update(Group(header, bars, Text(upcoming, style="dim")), refresh=True)
