"""Stage processes that end with the launcher, whatever ends it.

A launcher may be killed in a way it cannot answer, and what it started must then not go on writing into the run:

- the process it starts asks the kernel to be killed with it, and so does every rank, whose parent is torchrun: `bound`;
- whatever slips through, such as writers that a rank has forked, carries the run's name in its environment, and the
  next launcher on this machine kills it before it starts anything: `end_leftovers`.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from megatron_bliss.errors import UserError
from megatron_bliss.orchestration import bound

RUN_VARIABLE, STAGE_VARIABLE = "MEGATRON_BLISS_RUN", "MEGATRON_BLISS_STAGE"
_PATIENCE = 15.0  # seconds that killed processes get to be gone
_POLL_INTERVAL = 0.05  # seconds


def start(
    command: list[str], log: Path, environment: dict[str, str], run_dir: Path, stage: str
) -> subprocess.Popen[bytes]:
    """Start a stage in a session of its own, both outputs appended to `log`. Call it from the main thread: the kernel
    takes the end of the calling thread for the parent's."""
    marks = {RUN_VARIABLE: str(run_dir), STAGE_VARIABLE: stage}
    with open(log, "ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-S", "-E", bound.__file__, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment | marks,
            start_new_session=True,
        )


def ask_to_stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Ask stages to save what they have and end (`stopping`); those that do not listen end at once."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)


def end(
    processes: dict[str, subprocess.Popen[bytes]],
    run_dir: Path,
    patience: float = 0.0,
    is_over: Callable[[], bool] = lambda: False,
) -> None:
    """Wait for stages that were asked to stop, then kill what is left of them and of all they have started.

    :param processes: by stage.
    :param patience: seconds to wait.
    :param is_over: whether not to wait any longer.
    """
    deadline = time.monotonic() + patience
    while any(process.poll() is None for process in processes.values()):
        if time.monotonic() > deadline or is_over():
            break
        time.sleep(_POLL_INTERVAL)
    for stage, process in processes.items():
        _kill_marked(run_dir, stage)
        process.wait()


def end_leftovers(run_dir: Path) -> list[str]:
    """Kill what an earlier launcher of this run has left behind on this machine; only for the holder of the run's lock.

    :returns: one `process PID (STAGE)` for each.
    :raises UserError: if one of them cannot be killed.
    """
    return _kill_marked(run_dir, None)


def is_alive(run_dir: Path, stage: str) -> bool:
    """Whether a process of a stage is running on this machine."""
    return bool(_marked(run_dir, stage))


def _marked(run_dir: Path, stage: str | None) -> list[tuple[psutil.Process, str]]:
    """Processes of a run (of one of its stages), each with its stage."""
    found = []
    for process in psutil.process_iter():
        try:
            variables = process.environ()
        except (psutil.Error, OSError):  # ended meanwhile, or somebody else's
            continue
        name = variables.get(STAGE_VARIABLE, "")
        if variables.get(RUN_VARIABLE) == str(run_dir) and stage in (None, name):
            found.append((process, name))
    return [(process, name) for process, name in found if process.pid != os.getpid()]


def _kill_marked(run_dir: Path, stage: str | None) -> list[str]:
    killed: dict[str, None] = {}
    deadline = time.monotonic() + _PATIENCE
    while left := _marked(run_dir, stage):  # again, for a process may have started another between look and kill
        for process, name in left:
            killed[f"process {process.pid} ({name})"] = None
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs([process for process, _ in left], timeout=1)
        if time.monotonic() > deadline:
            raise UserError(f"{', '.join(killed)} of {run_dir} cannot be ended; end it, then run again")
    return list(killed)
