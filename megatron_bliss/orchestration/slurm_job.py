"""The two ends of a stage inside its Slurm job: what launch/common.sh asks before it starts one and after it ended.

`begin` says `go` or `done`; `end` says `done`, `requeue` or `fail`. Both note it in the run's state. A stage that
stopped before its end, or failed, is done again in the same job, which is requeued so that jobs that depend on it keep
waiting; after some attempts in a row that came no further than those before, the job fails, and with it the chain.
"""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from megatron_bliss import stopping
from megatron_bliss.artifacts import RunPaths
from megatron_bliss.config import read_saved_config
from megatron_bliss.errors import StageError, UserError
from megatron_bliss.orchestration import heartbeat, logs, slurm_queue, state
from megatron_bliss.orchestration.attempts import judged, verdict
from megatron_bliss.orchestration.plan import Stage, plan
from megatron_bliss.orchestration.state import Record

_ERROR_LINES = 20  # of a failed stage's log


def begin(words: Sequence[str], log: Path, max_attempts: int, environment: Mapping[str, str] = os.environ) -> str:
    """Note that this job starts on a stage.

    :param words: the stage's command.
    :param log: where its output goes.
    :returns: `go`, or `done` if there is nothing to do.
    :raises StageError: if it cannot work now: what it needs is not done, another job is at it, or it was tried often.
    """
    run_dir, stage = find(words)
    records = state.read_state(run_dir)
    record = records.get(stage.name, Record())
    if state.why_not_done(run_dir, stage, record) is None:
        return "done"
    _check_needs(run_dir, stage, records)
    job, is_task = _job(environment), "SLURM_ARRAY_TASK_ID" in environment
    if record.status == "running" and not is_task:  # the attempt ended without a word
        if record.job not in (None, job) and _is_alive(run_dir, str(record.job)):
            raise StageError(f"{stage.name}: job {record.job} is at it; end that one first (scancel {record.job})")
        record = replace(judged(run_dir, stage, record), status="pending")
        state.set_record(run_dir, stage.name, record)
        if record.fruitless >= max_attempts:
            failed = _give_up(run_dir, stage, record, "it was killed")
            raise StageError(f"{stage.name}: {failed.error.splitlines()[-1]}")
    offset = log.stat().st_size if log.exists() else 0
    state.begin(run_dir, stage, os.getpid(), log, offset, state.digests(run_dir, stage.inputs), job)
    return "go"


def end(
    words: Sequence[str], exit_code: int, log: Path, max_attempts: int, environment: Mapping[str, str] = os.environ
) -> str:
    """Note how a stage ended that `begin` said `go` to.

    :param exit_code: of its processes, the highest.
    :param log: where the output of this job went.
    :returns: `done`; `requeue` if it is to be tried again; `fail`.
    """
    run_dir, stage = find(words)
    is_task = "SLURM_ARRAY_TASK_ID" in environment
    record = state.read_state(run_dir).get(stage.name, Record())
    missing = [str(path) for path in stage.outputs if not path.exists()]
    if (exit_code == 0 and not missing) or (is_task and _all_is_scored(stage)):
        if record.status != "done":  # of an array, each task that finds all done comes here
            state.finish(run_dir, stage)
        if is_task:  # nothing is left for those that still wait
            with suppress(UserError):  # none do, or a container is without Slurm's commands: they look themselves
                slurm_queue.call(["scancel", "--state=PENDING", _job(environment)])
        return "done"
    lines = logs.tail(log, record.log_offset if record.log and run_dir / record.log == log else 0)
    stopped, sentence = exit_code == stopping.EXIT_CODE, logs.user_error(lines, exit_code)
    if stopped:
        reason = "it was stopped before its end"
    elif exit_code == 0:
        reason = f"it ended without {', '.join(missing)}"
    else:
        reason = sentence or f"it failed with exit code {exit_code}"
    error = "" if stopped else "\n".join(lines[-_ERROR_LINES:])
    if is_task:
        often = int(environment.get("SLURM_RESTART_COUNT", 0)) + 1 >= max_attempts
        task = f"{_job(environment)}_{environment['SLURM_ARRAY_TASK_ID']}"
        is_final = not stopped and (often or sentence is not None)
        return _task_ended(run_dir, stage, record, is_final, f"{error}\n{reason}".strip(), task)
    record = replace(judged(run_dir, stage, record), status="pending", finished=time.time(), note=reason, error=error)
    state.set_record(run_dir, stage.name, record)
    if sentence is not None:
        state.fail(run_dir, stage, f"error: {sentence}")
    elif record.fruitless >= max_attempts:
        _give_up(run_dir, stage, record, reason)
    else:
        return "requeue"
    return "fail"


def watch(words: Sequence[str], log: Path, hang_minutes: float) -> None:
    """Stay until the stage gave no sign of life for so long.

    :raises SystemExit: then.
    """
    _, stage = find(words)
    heartbeat.main(hang_minutes, log, stage.outputs)


def find(words: Sequence[str]) -> tuple[Path, Stage]:
    """The run that a stage's command belongs to, and the stage in its plan.

    :raises UserError: if there is no such run or stage.
    """
    options = dict(pairwise(words))
    arm = Path(options.get("--run") or words[1]).absolute()
    above = arm.parent.parent
    run_dir = above if arm.parent.name == "controls" and RunPaths(above).config.exists() else arm
    config = read_saved_config(RunPaths(run_dir).config)
    asked = (words[0], arm, options.get("--round"))
    for stage in plan(config, run_dir):
        known = dict(pairwise(stage.command))
        if asked == (stage.command[0], Path(known.get("--run") or stage.command[1]), known.get("--round")):
            return run_dir, stage
    raise UserError(f"{run_dir} has no stage `{' '.join(words)}`; `megatron-bliss status {run_dir}` lists those it has")


def _job(environment: Mapping[str, str]) -> str:
    """Number of this job; of the whole array for a task of one."""
    return environment.get("SLURM_ARRAY_JOB_ID") or environment["SLURM_JOB_ID"]


def _is_alive(run_dir: Path, job: str) -> bool:
    return any(other.array == job and other.is_alive for other in slurm_queue.jobs(run_dir))


def _check_needs(run_dir: Path, stage: Stage, records: Mapping[str, Record]) -> None:
    stages = {each.name: each for each in plan(read_saved_config(RunPaths(run_dir).config), run_dir)}
    for name in stage.needs:
        record = records.get(name, Record())
        if record.status == "running" and _all_is_scored(stages[name]):
            state.finish(run_dir, stages[name])  # a task that came late was ended before it could say so
        elif record.status != "done":
            log = f"; its log is {run_dir / record.log}" if record.log else ""
            raise StageError(f"{stage.name} cannot start: {name} is not done ({record.note or record.status}){log}")


def _all_is_scored(stage: Stage) -> bool:
    """Whether a scoring stage has written its manifest, which it does last, whoever scored."""
    return stage.command[0] == "score" and all((path / "manifest.json").exists() for path in stage.outputs)


def _give_up(run_dir: Path, stage: Stage, record: Record, reason: str) -> Record:
    """Fail a stage that was tried often enough."""
    why = f"{verdict(record)}; of the last: {reason}"
    return state.fail(run_dir, stage, f"{record.error}\n{why}".strip())


def _task_ended(run_dir: Path, stage: Stage, record: Record, is_final: bool, error: str, task: str) -> str:
    """A task of an array that did not end well. Others may still do its share, so it alone does not fail the stage.

    :param is_final: whether it is of no use to try again.
    """
    if not is_final:
        return "requeue"
    if not any(job.stage == stage.name and job.is_alive and job.id != task for job in slurm_queue.jobs(run_dir)):
        state.set_record(run_dir, stage.name, replace(record, status="failed", finished=time.time(), error=error))
    return "fail"
