"""What a run has done so far: `state.json`, and whether a stage still counts as done.

    {"schema": 1, "stages": {NAME: {"status": "done", "started": ..., "inputs": {PATH: DIGEST}, ...}}}

Every change is a read, an edit and an atomic write under a file lock, so that jobs on several machines may each report
their own stage.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from megatron_bliss.artifacts import RunPaths, digest_file, digest_json, digest_tree, read_json, write_json
from megatron_bliss.config import RunConfig, differences, read_saved_config, save_config
from megatron_bliss.data.contamination import contaminated_share
from megatron_bliss.errors import UserError
from megatron_bliss.orchestration.plan import Arm, Stage, arms, plan
from megatron_bliss.stages.guards import describe, guarded


@dataclass(frozen=True)
class Record:
    """What is known of one stage. Times are seconds since 1970."""

    status: str = "pending"  # pending | running | done | failed
    note: str = ""  # why it is run again, or was stopped
    started: float | None = None
    finished: float | None = None
    attempts: int = 0
    host: str | None = None
    pid: int | None = None
    log: str | None = None
    log_offset: int = 0  # bytes; where the last attempt begins
    inputs: dict[str, str | None] = field(default_factory=dict)  # digests, by path inside the run where it is inside
    outputs: dict[str, str | None] = field(default_factory=dict)
    error: str = ""  # the last lines of the log of a failed stage
    job: str | None = None  # number of the Slurm job, or array, that it runs in
    furthest: int = 0  # progress that an attempt came to, in the units of its log
    fruitless: int = 0  # attempts in a row that came no further


def read_state(run_dir: Path) -> dict[str, Record]:
    """The stages that have a record, by name; empty before the first one starts."""
    path = RunPaths(run_dir).state
    if not path.exists():
        return {}
    return {name: Record(**record) for name, record in read_json(path)["stages"].items()}


def set_record(run_dir: Path, name: str, record: Record) -> Record:
    """Replace the record of a stage."""
    with _locked(run_dir):
        records = read_state(run_dir) | {name: record}
        stages = {name: asdict(record) for name, record in records.items()}
        write_json(RunPaths(run_dir).state, {"schema": 1, "stages": stages})
    return record


def begin(
    run_dir: Path,
    stage: Stage,
    pid: int,
    log: Path,
    log_offset: int,
    inputs: dict[str, str | None],
    job: str | None = None,
) -> Record:
    """Note that a stage runs as process `pid` of this machine.

    :param inputs: what `digests` said of its inputs before the process was started.
    :param job: of Slurm, if it runs in one.
    """
    earlier = read_state(run_dir).get(stage.name, Record())
    record = Record(
        status="running",
        started=time.time(),
        attempts=earlier.attempts + 1,
        host=socket.gethostname(),
        pid=pid,
        log=_name(run_dir, log),
        log_offset=log_offset,
        inputs=inputs,
        job=job,
    )
    if earlier.status == "pending":  # it goes on
        record = replace(record, furthest=earlier.furthest, fruitless=earlier.fruitless)
    return set_record(run_dir, stage.name, record)


def finish(run_dir: Path, stage: Stage) -> Record:
    """Note that a stage ended well, and what it found."""
    record = read_state(run_dir)[stage.name]
    outputs = digests(run_dir, stage.outputs)
    done = replace(record, status="done", finished=time.time(), outputs=outputs, note=_finding(stage))
    return set_record(run_dir, stage.name, done)


def _finding(stage: Stage) -> str:
    """What a finished stage has found that its user should know."""
    paths, number = RunPaths(stage.run_dir), stage.round_number
    if stage.command[0] == "inventory" and paths.contamination.exists():
        limit = read_saved_config(paths.config).guards.contamination
        sets = read_json(paths.contamination)["sets"]
        shares = {name: contaminated_share(found) for name, found in sets.items()}
        found = [f"{share:.0%} of the set {name}" for name, share in shares.items() if share and share > limit]
        return f"{', '.join(found)} stand word for word in the pool" if found else ""
    if stage.command[0] != "score" or number is None:
        return ""
    guard = guarded(paths, number)
    return f"guards: {describe(guard, number)}" if guard else ""


def fail(run_dir: Path, stage: Stage, error: str) -> Record:
    """Note that a stage failed.

    :param error: the end of its log.
    """
    record = read_state(run_dir)[stage.name]
    return set_record(run_dir, stage.name, replace(record, status="failed", finished=time.time(), error=error))


def stop(run_dir: Path, stage: Stage, reason: str) -> Record:
    """Note that a running stage was ended and is to be run again."""
    record = read_state(run_dir)[stage.name]
    return set_record(run_dir, stage.name, replace(record, status="pending", finished=time.time(), note=reason))


def why_not_done(run_dir: Path, stage: Stage, record: Record | None) -> str | None:
    """None if the stage is done, its outputs are what it wrote and its inputs what it read; else the reason."""
    if record is None or record.status == "pending":
        return (record.note if record else "") or "not run yet"
    if record.status == "running":
        return "it was interrupted"
    if record.status == "failed":
        return "it failed"
    for path in stage.outputs:
        if not path.exists():
            return f"{_name(run_dir, path)} is gone"
    now = digests(run_dir, stage.inputs)
    for name in sorted(now.keys() | record.inputs.keys()):
        if now.get(name) != record.inputs.get(name):
            is_gone = name in now and now[name] is None
            # paths in the settings are taken from where the command is called
            return f"{name} is not there, seen from {Path.cwd()}" if is_gone else f"{name} changed"
    changed = changed_outputs(run_dir, stage, record)
    return f"{changed[0]} is not what it wrote" if changed else None


def changed_outputs(run_dir: Path, stage: Stage, record: Record) -> list[str]:
    """What a stage that is done wrote and something else changed since; what is gone is not among it.

    A stage's outputs are its own (one checkpoint of `target`, one file of an evaluation), so later stages do not change
    them. Only the report's are left out: `megatron-bliss report` writes them again at any time.
    """
    if record.status != "done" or stage.command[0] == "report":
        return []
    now = digests(run_dir, tuple(path for path in stage.outputs if path.exists()))
    return [name for name, found in now.items() if name in record.outputs and found != record.outputs[name]]


def digests(run_dir: Path, paths: tuple[Path, ...]) -> dict[str, str | None]:
    """What `digest` says of each path."""
    return {_name(run_dir, path): digest(path) for path in paths}


def digest(path: Path) -> str | None:
    """Content of a directory's manifest, else names and sizes in the directory; size and time of a shard, whose content
    the inventory vouches for; content of any other file; None if there is nothing."""
    if not path.exists():
        return None
    if path.is_dir():
        manifest = path / "manifest.json"
        return digest_file(manifest) if manifest.exists() else digest_tree(path)
    if path.suffix in (".bin", ".idx"):
        status = path.stat()
        return digest_json([status.st_size, status.st_mtime_ns])
    return digest_file(path)


def prepare(config: RunConfig, run_dir: Path) -> None:
    """Write `run.yaml` of the run and of its control arms, or make sure that they say what they said before.

    How stages are launched (`launch.*`) and where curves go (`tracking.*`) is not what a run is, and may change; guards
    (`guards.*`), `fidelity.*` and `launch.mode` may, for stages that are still to be done. Control arms may be added,
    and those left out are no longer looked at: none of them depends on another.

    :raises UserError: naming every other setting that changed, or an output that is not what its stage wrote: called
        again, a stage would take it for its own and leave it.
    """
    all_arms = arms(config, run_dir)
    for arm in all_arms:
        if changed := _changed_settings(arm):
            raise UserError(
                f"{arm.paths.root} was started with other settings ({'; '.join(changed)}): undo the change, or start "
                "a new run with --run DIR"
            )
    for arm in all_arms:
        if not arm.paths.config.exists() or _is_to_be_saved(arm):
            save_config(arm.config, arm.paths.config)
    records = read_state(run_dir)
    for stage in plan(config, run_dir):
        if changed := changed_outputs(run_dir, stage, records.get(stage.name, Record())):
            raise UserError(
                f"{run_dir / changed[0]} is not what {stage.name} wrote; put that back, or start a new run with "
                "--run DIR"
            )


def _is_to_be_saved(arm: Arm) -> bool:
    """Whether a setting that may change has, and stages read it."""
    before, after = (
        (each.controls, each.guards, each.fidelity, each.tracking, each.launch.mode)
        for each in (read_saved_config(arm.paths.config), arm.config)
    )
    return before != after


def _changed_settings(arm: Arm) -> list[str]:
    """What is no longer as an arm was started with."""
    if not arm.paths.config.exists():
        return []
    saved = read_saved_config(arm.paths.config)
    now = arm.config
    changeable = replace(
        saved,
        launch=now.launch,
        tracking=now.tracking,
        controls=now.controls,
        guards=now.guards,
        fidelity=now.fidelity,
    )
    return differences(changeable, now)


def _name(run_dir: Path, path: Path) -> str:
    """The path inside the run where it is inside, so that a run without controls may be moved."""
    return str(path.relative_to(run_dir) if path.is_relative_to(run_dir) else path)


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    handle = os.open(RunPaths(run_dir).state.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
