"""Runs a plan on this machine: each stage a process, several side by side where the settings allow."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from rich.console import Console

from megatron_bliss.artifacts import RunPaths, run_lock
from megatron_bliss.config import LaunchConfig, RunConfig
from megatron_bliss.errors import StageError, UserError
from megatron_bliss.orchestration import logs, processes, state
from megatron_bliss.orchestration.check import check
from megatron_bliss.orchestration.display import View, view
from megatron_bliss.orchestration.plan import Stage, by_urgency, plan

_POLL_INTERVAL = 0.1  # seconds
_ERROR_LINES = 20  # of a failed stage's log
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stage_command(stage: Stage) -> list[str]:
    """The process of a stage: this interpreter, under torchrun where there are ranks."""
    return [*module_launcher(stage.num_ranks), "megatron_bliss.cli", *stage.command]


def module_launcher(num_ranks: int) -> list[str]:
    """Words before a module's name and its arguments that run it as so many ranks."""
    if num_ranks == 1:
        return [sys.executable, "-m"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return [*torchrun, "-m", "--"]  # without the last, it takes the module's --run for an option of its own


def stage_environment(launch: LaunchConfig, num_ranks: int, is_model_parallel: bool = False) -> dict[str, str]:
    """This process's environment with the CPU's cores shared out among ranks; an OMP_NUM_THREADS of the user's own is
    kept unless `launch.threads` is set.

    :param is_model_parallel: tensor or context parallelism, which need kernels to be started in order on GPUs before
        Blackwell; a CUDA_DEVICE_MAX_CONNECTIONS of the user's own is kept.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    shared = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // (launch.concurrency * num_ranks)))
    in_order = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if is_model_parallel else {}
    return in_order | dict(os.environ) | {"OMP_NUM_THREADS": str(launch.threads or shared)}


def run(
    config: RunConfig,
    run_dir: Path,
    *,
    command: Callable[[Stage], list[str]] = stage_command,
    console: Console | None = None,
) -> None:
    """Do whatever the run still lacks.

    :raises UserError: if the run is in use, its settings cannot work or changed, or a stage refused its input.
    :raises StageError: if a stage failed, or this was interrupted; its processes are ended by then.
    """
    run_all({run_dir: config}, run_dir, command=command, console=console)


def run_all(
    runs: Mapping[Path, RunConfig],
    root: Path,
    *,
    command: Callable[[Stage], list[str]] = stage_command,
    console: Console | None = None,
) -> None:
    """Do whatever some runs still lack, as many stages side by side as one of them may have: a stage of a later run is
    started where the earlier ones leave room.

    :param runs: settings by directory; `launch` of the first holds for all together.
    :param root: directory that they lie in, or the only one's own.
    :raises UserError: if a run is in use, its settings cannot work or changed, or a stage refused its input.
    :raises StageError: if a stage failed, or this was interrupted; all processes are ended by then.
    """
    runs, root, console = (
        {path.absolute(): config for path, config in runs.items()},
        root.absolute(),
        console or Console(),
    )
    for run_dir, config in runs.items():
        check(config, run_dir)
    concurrency = next(iter(runs.values())).launch.concurrency
    with ExitStack() as locks:
        for run_dir in runs:
            locks.enter_context(run_lock(RunPaths(run_dir).lock))
        for run_dir, config in runs.items():
            for leftover in processes.end_leftovers(run_dir):
                console.print(f"ended {leftover}, left behind by an earlier call", soft_wrap=True)
            state.prepare(config, run_dir)
        with view(console, root) as shown, _signals() as received:
            works = [
                _Work(run_dir, config, _prefix(run_dir, root), by_urgency(plan(config, run_dir)), shown, command)
                for run_dir, config in runs.items()
            ]
            num_stages = sum(len(work.waiting) for work in works)
            try:
                while _advance(works, concurrency, shown):
                    if received:
                        raise StageError(f"stopped by {signal.Signals(received[0]).name}; run again to go on")
                    time.sleep(_POLL_INTERVAL)
            except BaseException as error:
                for work in works:
                    work.stop(str(error).split(";")[0] or "stopped")
                raise
        if not any(work.num_started for work in works):
            console.print(f"nothing to do: all {num_stages} stages of {root} are done", soft_wrap=True)


def _prefix(run_dir: Path, root: Path) -> str:
    """Of the names of a run's stages in the display."""
    return "" if run_dir == root else f"{run_dir.relative_to(root)}/"


def _advance(works: "list[_Work]", concurrency: int, shown: View) -> bool:
    """Take note of stages that ended, start those that can; False when all is done."""
    for work in works:
        work.take_note()
    for work in works:
        work.start_ready(concurrency - sum(len(each.running) for each in works))
    shown.tick(
        [pair for work in works for pair in work.shown_running()],
        [work.prefix + stage.name for work in works for stage in work.waiting],
        sum(len(work.done) for work in works),
    )
    return any(work.running or work.waiting for work in works)


@dataclass
class _Work:
    """The stages of a run that are waiting, running and done."""

    run_dir: Path
    config: RunConfig
    prefix: str
    waiting: list[Stage]
    shown: View
    command: Callable[[Stage], list[str]]
    running: dict[str, tuple[Stage, subprocess.Popen[bytes]]] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    num_started: int = 0

    def take_note(self) -> None:
        """Of stages that ended."""
        for stage, process in list(self.running.values()):
            if (exit_code := process.poll()) is not None:
                self._ended(stage, exit_code)

    def shown_running(self) -> list[tuple[Stage, state.Record]]:
        """What runs, for the display."""
        records = state.read_state(self.run_dir) if self.running else {}
        return [self._shown(stage, records[name]) for name, (stage, _) in self.running.items()]

    def _shown(self, stage: Stage, record: state.Record) -> tuple[Stage, state.Record]:
        """Named as the display of several runs needs it."""
        log = None if record.log is None else str(self.run_dir / record.log)
        return replace(stage, name=self.prefix + stage.name), replace(record, log=log)

    def stop(self, reason: str) -> None:
        """End all that runs and say so in the state."""
        processes.end({name: process for name, (_, process) in self.running.items()}, self.run_dir)
        for stage, _ in self.running.values():
            self.shown.ended(*self._shown(stage, state.stop(self.run_dir, stage, reason)))
        self.running.clear()

    def start_ready(self, count: int) -> None:
        """Start at most so many of the stages that can be."""
        most = len(self.running) + count
        found = True
        while found:  # a stage that turns out to be done may make others ready
            found = False
            for stage in list(self.waiting):
                if len(self.running) >= most:
                    return
                if self.done.issuperset(stage.needs):
                    self.waiting.remove(stage)
                    found = True
                    self._start_or_skip(stage)

    def _start_or_skip(self, stage: Stage) -> None:
        record = state.read_state(self.run_dir).get(stage.name)
        why = state.why_not_done(self.run_dir, stage, record)
        if why is None:
            self.done.add(stage.name)
            return
        log = RunPaths(self.run_dir).logs / f"{stage.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        words = self.command(stage)
        with open(log, "a") as stream:
            offset = stream.tell()
            stream.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')}: {' '.join(words)}\n")
        inputs = state.digests(self.run_dir, stage.inputs)
        surroundings = stage_environment(self.config.launch, stage.num_ranks, self.config.is_model_parallel)
        process = processes.start(words, log, surroundings, self.run_dir, stage.name)
        self.running[stage.name] = stage, process
        self.num_started += 1
        record = state.begin(self.run_dir, stage, process.pid, log, offset, inputs)
        self.shown.started(*self._shown(stage, record), why if record.attempts > 1 else "")

    def _ended(self, stage: Stage, exit_code: int) -> None:
        record = state.read_state(self.run_dir)[stage.name]
        log = self.run_dir / (record.log or "")
        missing = [str(path) for path in stage.outputs if not path.exists()]
        if exit_code == 0 and not missing:
            del self.running[stage.name]
            self.done.add(stage.name)
            self.shown.ended(*self._shown(stage, state.finish(self.run_dir, stage)))
            return
        processes.end({stage.name: self.running.pop(stage.name)[1]}, self.run_dir)
        lines = logs.tail(log, record.log_offset)
        end = "\n".join(lines[-_ERROR_LINES:])
        self.shown.ended(*self._shown(stage, state.fail(self.run_dir, stage, end)))
        if sentence := logs.user_error(lines, exit_code):
            raise UserError(f"{self.prefix}{stage.name}: {sentence} (log: {log})")
        what = f"ended without {', '.join(missing)}" if exit_code == 0 else f"failed with exit code {exit_code}"
        raise StageError(f"{self.prefix}{stage.name} {what}; the end of its log {log}:\n{end}")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals that ask for an end, in a list as they arrive. A second one while the stages are being ended is noted
    as well, and changes nothing: they are killed soon enough."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)

    heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
