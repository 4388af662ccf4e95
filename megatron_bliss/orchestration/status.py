"""`megatron-bliss status`: one table from the files of a run, while it runs or afterwards."""

import socket
import sys
import time
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.config import read_saved_config
from megatron_bliss.errors import UserError
from megatron_bliss.orchestration import processes, state
from megatron_bliss.orchestration.logs import clock, last_reading, tail
from megatron_bliss.orchestration.plan import Stage, plan
from megatron_bliss.orchestration.state import Record

_WIDTH = 140  # of the table where there is no terminal
_STYLES = {"done": "green", "running": "cyan", "failed": "bold red", "interrupted": "yellow", "out of date": "yellow"}


def show(run_dir: Path) -> None:
    """Print the table.

    :raises UserError: if there is no run.
    """
    run_dir = run_dir.absolute()
    config = read_saved_config(RunPaths(run_dir).config)
    above = run_dir.parent.parent
    if run_dir.parent.name == "controls" and RunPaths(above).state.exists():
        raise UserError(f"{run_dir} is a control arm; ask for the status of the run it belongs to, {above}")
    stages = plan(config, run_dir)
    records = state.read_state(run_dir)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("stage", "state", "started", "took"):
        table.add_column(column, no_wrap=True)
    table.add_column("figures", overflow="fold")
    states = []
    for stage in stages:
        record = records.get(stage.name, Record())
        standing, note = _standing(run_dir, stage, record)
        states.append(standing)
        figures = " | ".join(part for part in (note, _figures(run_dir, stage, record)) if part)
        table.add_row(stage.name, Text(standing, style=_STYLES.get(standing, "dim")), *_times(record), Text(figures))
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    console.print(table)
    counts = [f"{states.count(standing)} {standing}" for standing in dict.fromkeys(states)]
    console.print(f"{run_dir}: {', '.join(counts)}", soft_wrap=True, highlight=False)
    for name, record in records.items():
        if record.status == "failed":
            console.print(f"{name} failed; its log is {run_dir / (record.log or '')}", style="red", soft_wrap=True)


def _standing(run_dir: Path, stage: Stage, record: Record) -> tuple[str, str]:
    """The stage's state in a word, and what there is to say about it."""
    if record.status == "done":
        why = state.why_not_done(run_dir, stage, record)
        return ("done", "") if why is None else ("out of date", why)
    if record.status == "running":
        if record.host != socket.gethostname():
            return "running", f"on {record.host}"
        return ("running", "") if processes.is_alive(run_dir, stage.name) else ("interrupted", "its process is gone")
    if record.status == "failed":
        reason = record.error.strip().splitlines()
        return "failed", reason[-1] if reason else "no output"
    return "pending", record.note


def _times(record: Record) -> tuple[str, str]:
    if record.started is None:
        return "", ""
    end = record.finished if record.status != "running" else time.time()
    began = time.strftime("%m-%d %H:%M", time.localtime(record.started))
    return began, clock((end or record.started) - record.started)


def _figures(run_dir: Path, stage: Stage, record: Record) -> str:
    """Progress while it runs, with the time to go; the last numbers afterwards."""
    if record.log is None:
        return ""
    reading = last_reading(tail(run_dir / record.log, record.log_offset), stage.iterations)
    if reading is None:
        return ""
    if record.status != "running":
        return " | ".join(part for part in reading.rest.split(" | ") if not part.startswith("ETA"))
    parts = [f"{reading.done}/{reading.total}", reading.rest]
    if "ETA" not in reading.rest and reading.done and record.started:
        remaining = (time.time() - record.started) * (reading.total - reading.done) / reading.done
        parts.insert(1, f"ETA {clock(remaining)}")
    return " | ".join(part for part in parts if part)
