"""How far the attempts at a stage came: one that is stopped and called again must come further, or it never ends."""

from dataclasses import replace
from pathlib import Path

from megatron_bliss.orchestration import logs
from megatron_bliss.orchestration.plan import Stage
from megatron_bliss.orchestration.state import Record
from megatron_bliss.wording import counted


def judged(run_dir: Path, stage: Stage, record: Record) -> Record:
    """The record with the last attempt counted: by how far its log says it came."""
    lines = logs.tail(run_dir / record.log, record.log_offset) if record.log else []
    reading = logs.last_reading(lines, stage.iterations)
    done = reading.done if reading else 0
    if done > record.furthest:
        return replace(record, furthest=done, fruitless=0)
    return replace(record, fruitless=record.fruitless + 1)


def verdict(record: Record) -> str:
    """What is to be said of a stage that was tried often enough."""
    came = f"came no further than {record.furthest}" if record.furthest else "came to nothing"
    return f"{counted(record.fruitless, 'attempt')} in a row {came}"
