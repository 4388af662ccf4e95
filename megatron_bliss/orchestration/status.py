"""`megatron-bliss status`: one table from the files of a run, while it runs or afterwards."""

import socket
import sys
import time
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_bliss.artifacts import RunPaths, read_json
from megatron_bliss.config import read_saved_config
from megatron_bliss.errors import UserError
from megatron_bliss.orchestration import processes, slurm, slurm_queue, state
from megatron_bliss.orchestration.logs import clock, last_reading, tail
from megatron_bliss.orchestration.plan import Stage, plan
from megatron_bliss.orchestration.state import Record
from megatron_bliss.wording import counted

_WIDTH = 140  # of the table where there is no terminal
_STYLES = {
    "done": "green",
    "running": "cyan",
    "failed": "bold red",
    "interrupted": "yellow",
    "stuck": "bold red",
    "out of date": "yellow",
}


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
    jobs, silence = _ask_slurm(run_dir)
    records = state.read_state(run_dir)  # after the queue: what ended in between is seen as ended
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("stage", "state", "started", "took"):
        table.add_column(column, no_wrap=True)
    table.add_column("figures", overflow="fold")
    states = []
    for stage in stages:
        record = records.get(stage.name, Record())
        standing, note = _standing(run_dir, stage, record, jobs)
        states.append(standing)
        figures = " | ".join(part for part in (note, _figures(run_dir, stage, record), _target(stage)) if part)
        table.add_row(stage.name, Text(standing, style=_STYLES.get(standing, "dim")), *_times(record), Text(figures))
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    console.print(table)
    show_report(console, run_dir)
    counts = [f"{states.count(standing)} {standing}" for standing in dict.fromkeys(states)]
    console.print(f"{run_dir}: {', '.join(counts)}", soft_wrap=True, highlight=False)
    for stage, standing in zip(stages, states, strict=True):
        if standing in ("failed", "interrupted") and (log := records[stage.name].log):
            console.print(f"{stage.name} {standing}; its log is {run_dir / log}", style="red", soft_wrap=True)
    if silence:
        console.print(f"what Slurm knows of the run's jobs is missing above: {silence}", soft_wrap=True)
    if jobs is not None and not jobs.alive and states.count("done") < len(stages):
        console.print(
            "none of the run's jobs is left in Slurm's queue; `megatron-bliss submit` goes on", soft_wrap=True
        )


def show_report(console: Console, run_dir: Path) -> None:
    """Where the report is, and what it begins with: the doubts."""
    page = RunPaths(run_dir).report
    facts = page.with_suffix(".json")
    if not page.exists() or not facts.exists():
        return
    console.print(f"report: {page}", soft_wrap=True, highlight=False, markup=False)
    for warning in read_json(facts).get("warnings", []):
        console.print(f"  {warning['sentence']}", style="yellow", soft_wrap=True, highlight=False, markup=False)


def _standing(run_dir: Path, stage: Stage, record: Record, jobs: "_Jobs | None") -> tuple[str, str]:
    """The stage's state in a word, and what there is to say about it."""
    if record.status == "done":
        why = state.why_not_done(run_dir, stage, record)
        if why is None or jobs is None:
            return ("done", record.note) if why is None else ("out of date", why)
    if jobs is not None and record.status != "failed" and (found := jobs.standing(stage.name, record)):
        return found
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


def _target(stage: Stage) -> str:
    """The checkpoint of the LLM that a bilevel loop beside the LLM's training learns with."""
    if stage.command[0] != "bilevel":
        return ""
    path = RunPaths(stage.run_dir).pinned_target(int(stage.command[-1]))
    if not path.exists():
        return ""
    pin = read_json(path)
    return f"target of iteration {pin['iteration']}, {counted(pin['staleness'], 'step')} before the round"


def _ask_slurm(run_dir: Path) -> tuple["_Jobs | None", str]:
    """A run's jobs, if it has any and Slurm answers; else why it does not."""
    if not RunPaths(run_dir).slurm.exists() or not slurm_queue.is_here():
        return None, ""
    try:
        return _Jobs(run_dir), ""
    except UserError as error:
        return None, str(error)


class _Jobs:
    """What Slurm says of a run's jobs."""

    def __init__(self, run_dir: Path) -> None:
        jobs = slurm_queue.jobs(run_dir)
        self.alive = [job for job in jobs if job.is_alive]
        self._ended = {job.array: job.state for job in jobs if not job.is_alive}
        self._submitted = slurm.submitted(run_dir)
        numbers = [number for known in self._submitted.values() for number in known.jobs]
        remembered = {job.array for job in jobs}
        self._ended |= slurm_queue.ended_states([number for number in numbers if number not in remembered])

    def standing(self, stage: str, record: Record) -> tuple[str, str] | None:
        """State and note of a stage that has a job, or had one; None if that says nothing."""
        alive = [job for job in self.alive if job.stage == stage]
        running = [job for job in alive if job.state != "PENDING"]
        if running:
            where = ", ".join(f"job {job.id} on {job.nodes}" for job in running)
            waiting = f", {len(alive) - len(running)} tasks wait" if len(alive) > len(running) else ""
            return "running", where + waiting
        if alive:
            job = alive[0]
            if job.reason == "DependencyNeverSatisfied":
                return "stuck", f"job {job.array} waits for one that failed; `megatron-bliss submit` replaces it"
            if job.is_held:
                return (
                    "stuck",
                    f"job {job.array} is held since its launch failed; `megatron-bliss submit` releases it",
                )
            again = f"again, as {record.note}: " if record.note else ""
            return "queued", f"{again}job {job.array} waits ({job.reason})"
        if stage not in self._submitted:
            return None
        number = self._submitted[stage].jobs[-1]
        how = f"job {number} is gone ({self._ended.get(number, 'Slurm has forgotten it')})"
        return ("interrupted" if record.status == "running" else "pending"), how
