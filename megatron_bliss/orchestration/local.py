"""Runs a plan on this machine: each stage a process, several side by side where the settings allow."""

import os
import re
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

from megatron_bliss import stopping
from megatron_bliss.artifacts import RunPaths, run_lock
from megatron_bliss.config import RunConfig
from megatron_bliss.errors import StageError, StoppedError, UserError
from megatron_bliss.orchestration import logs, processes, state
from megatron_bliss.orchestration.attempts import judged, verdict
from megatron_bliss.orchestration.check import check
from megatron_bliss.orchestration.display import View, view
from megatron_bliss.orchestration.heartbeat import Heartbeat, sentence
from megatron_bliss.orchestration.plan import Stage, by_urgency, plan
from megatron_bliss.orchestration.status import show_report

_POLL_INTERVAL = 0.1  # seconds
_ERROR_LINES = 20  # of a failed stage's log
_TOLD_BY_TORCHRUN = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_ADDR|MASTER_PORT|PET_\w+|TORCHELASTIC_\w+"
)
_SIGNALS = (signal.SIGINT, signal.SIGHUP, *stopping.SIGNALS)


def stage_command(stage: Stage) -> list[str]:
    """The process of a stage: this interpreter, under torchrun where there are ranks."""
    return [*module_launcher(stage.num_ranks), "megatron_bliss.cli", *stage.command]


def module_launcher(num_ranks: int) -> list[str]:
    """Words before a module's name and its arguments that run it as so many ranks."""
    if num_ranks == 1:
        return [sys.executable, "-m"]
    torchrun = [sys.executable, "-m", "megatron_bliss.torchrun", "--standalone", "--nproc-per-node", str(num_ranks)]
    return [*torchrun, "-m", "--"]  # without the last, it takes the module's --run for an option of its own


def stage_environment(config: RunConfig, stage: Stage, run_dir: Path) -> dict[str, str]:
    """This process's environment, but for what torchrun told it, with the CPU's cores shared out among ranks and the
    file that asks the run's stages to stop. An OMP_NUM_THREADS of the user's own is kept unless `launch.threads` is
    set. Tensor and context parallelism need kernels to be started in order on GPUs before Blackwell; a
    CUDA_DEVICE_MAX_CONNECTIONS of the user's own is kept.
    """
    launch, num_ranks = config.launch, -(-stage.num_ranks // config.launch.nnodes)
    own = {name: value for name, value in os.environ.items() if not _TOLD_BY_TORCHRUN.fullmatch(name)}
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    shared = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // (launch.concurrency * num_ranks)))
    in_order = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if config.is_model_parallel else {}
    said = {"OMP_NUM_THREADS": str(launch.threads or shared), stopping.STOP_FILE: str(RunPaths(run_dir).stop)}
    return in_order | own | said


def run(
    config: RunConfig,
    run_dir: Path,
    *,
    command: Callable[[Stage], list[str]] = stage_command,
    console: Console | None = None,
) -> None:
    """Do whatever the run still lacks.

    :raises UserError: if the run is in use, its settings cannot work or changed, or a stage refused its input.
    :raises StageError: if a stage failed.
    :raises StoppedError: if this was asked to stop, by a signal or as stages are. All processes are ended by then.
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
    :raises StageError: if a stage failed.
    :raises StoppedError: if this was asked to stop. All processes are ended by then.
    """
    runs, root, console = (
        {path.absolute(): config for path, config in runs.items()},
        root.absolute(),
        console or Console(),
    )
    for run_dir, config in runs.items():
        check(config, run_dir)
    launch = next(iter(runs.values())).launch
    if launch.mode == "overlap" and launch.concurrency < 2:
        raise UserError("launch.mode is overlap, which runs stages side by side; set launch.concurrency to 2 or more")
    with ExitStack() as locks:
        for run_dir in runs:
            locks.enter_context(run_lock(RunPaths(run_dir).lock))
        for run_dir, config in runs.items():
            for leftover in processes.end_leftovers(run_dir):
                console.print(f"ended {leftover}, left behind by an earlier call", soft_wrap=True)
            state.prepare(config, run_dir)
            RunPaths(run_dir).stop.unlink(missing_ok=True)
        with view(console, root) as shown, signals() as received:
            works = [
                _Work(run_dir, config, _prefix(run_dir, root), by_urgency(plan(config, run_dir)), shown, command)
                for run_dir, config in runs.items()
            ]
            num_stages = sum(len(work.waiting) for work in works)
            try:
                while _advance(works, launch.concurrency, shown):
                    if received or stopping.requested():
                        by = signal.Signals(received[0]).name if received else "request"
                        raise StoppedError(f"stopped by {by}; run again to go on")
                    time.sleep(_POLL_INTERVAL)
            except BaseException as error:
                running = [name for work in works for name in work.running]
                if running:
                    console.print(f"{', '.join(running)} may save what they have; a signal kills them", soft_wrap=True)
                for work in works:
                    work.ask_to_stop()
                seen, deadline = len(received), time.monotonic() + 60 * launch.stop_minutes
                for work in works:
                    patience = deadline - time.monotonic()
                    work.stop(str(error).split(";")[0] or "stopped", patience, lambda: len(received) > seen)
                raise
        if not any(work.num_started for work in works):
            console.print(f"nothing to do: all {num_stages} stages of {root} are done", soft_wrap=True)
        show_report(console, root)


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


@dataclass(frozen=True)
class _Running:
    """A stage's process."""

    stage: Stage
    process: subprocess.Popen[bytes]
    heartbeat: Heartbeat


@dataclass
class _Work:
    """The stages of a run that are waiting, running and done."""

    run_dir: Path
    config: RunConfig
    prefix: str
    waiting: list[Stage]
    shown: View
    command: Callable[[Stage], list[str]]
    running: dict[str, _Running] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    num_started: int = 0

    def take_note(self) -> None:
        """Of stages that ended, and of those that hang."""
        for each in list(self.running.values()):
            if (exit_code := each.process.poll()) is not None:
                self._ended(each, exit_code)
            elif each.heartbeat.is_silent():
                self._end(each)
                what = sentence(self.config.launch.hang_minutes)
                self._fail(each.stage, what, last_words=f"it {what}")

    def shown_running(self) -> list[tuple[Stage, state.Record]]:
        """What runs, for the display."""
        records = state.read_state(self.run_dir) if self.running else {}
        return [self._shown(each.stage, records[name]) for name, each in self.running.items()]

    def _shown(self, stage: Stage, record: state.Record) -> tuple[Stage, state.Record]:
        """Named as the display of several runs needs it."""
        log = None if record.log is None else str(self.run_dir / record.log)
        return replace(stage, name=self.prefix + stage.name), replace(record, log=log)

    def ask_to_stop(self) -> None:
        """All that runs."""
        if self.running:
            RunPaths(self.run_dir).stop.touch()
            processes.ask_to_stop(each.process for each in self.running.values())

    def stop(self, reason: str, patience: float, is_over: Callable[[], bool]) -> None:
        """Wait for what was asked to stop, kill the rest (`processes.end`), and say so in the state."""
        running = dict(self.running)
        self.running.clear()
        processes.end({name: each.process for name, each in running.items()}, self.run_dir, patience, is_over)
        for each in running.values():
            stage, ended_well = each.stage, each.process.returncode == 0 and not _missing(each.stage)
            record = state.finish(self.run_dir, stage) if ended_well else state.stop(self.run_dir, stage, reason)
            self.shown.ended(*self._shown(stage, record))

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
        surroundings = stage_environment(self.config, stage, self.run_dir)
        process = processes.start(words, log, surroundings, self.run_dir, stage.name)
        heartbeat = Heartbeat(log, stage.outputs, self.config.launch.hang_minutes)
        self.running[stage.name] = _Running(stage, process, heartbeat)
        self.num_started += 1
        record = state.begin(self.run_dir, stage, process.pid, log, offset, inputs)
        self.shown.started(*self._shown(stage, record), why if record.attempts > 1 else "")

    def _ended(self, each: _Running, exit_code: int) -> None:
        stage, missing = each.stage, _missing(each.stage)
        if exit_code == 0 and not missing:
            del self.running[stage.name]
            self.done.add(stage.name)
            self.shown.ended(*self._shown(stage, state.finish(self.run_dir, stage)))
            return
        self._end(each)
        if exit_code == stopping.EXIT_CODE:
            record = judged(self.run_dir, stage, state.read_state(self.run_dir)[stage.name])
            state.set_record(self.run_dir, stage.name, record)
            if record.fruitless >= self.config.launch.max_attempts:
                what = f"stopped before its end; {verdict(record)} (launch.max_attempts)"
                self._fail(stage, what, last_words=f"it {what}")
            self.shown.ended(*self._shown(stage, state.stop(self.run_dir, stage, "it was stopped before its end")))
            self.waiting.insert(0, stage)
            return
        record = state.read_state(self.run_dir)[stage.name]
        log = self.run_dir / (record.log or "")
        what = f"ended without {', '.join(missing)}" if exit_code == 0 else f"failed with exit code {exit_code}"
        refusal = logs.user_error(logs.tail(log, record.log_offset), exit_code)
        self._fail(stage, what, refusal)

    def _end(self, each: _Running) -> None:
        """Whatever is left of a stage."""
        del self.running[each.stage.name]
        processes.end({each.stage.name: each.process}, self.run_dir)

    def _fail(self, stage: Stage, what: str, refusal: str | None = None, last_words: str = "") -> None:
        """Note that a stage failed, and give up.

        :param refusal: the sentence it left about its input.
        :param last_words: to stand below its log in the state.
        """
        record = state.read_state(self.run_dir)[stage.name]
        log, name = self.run_dir / (record.log or ""), self.prefix + stage.name
        end = "\n".join(logs.tail(log, record.log_offset)[-_ERROR_LINES:])
        self.shown.ended(*self._shown(stage, state.fail(self.run_dir, stage, f"{end}\n{last_words}".strip())))
        if refusal:
            raise UserError(f"{name}: {refusal} (log: {log})")
        raise StageError(f"{name} {what}; the end of its log {log}:\n{end}")


def _missing(stage: Stage) -> list[str]:
    """Outputs that are not there."""
    return [str(path) for path in stage.outputs if not path.exists()]


@contextmanager
def signals() -> Iterator[list[int]]:
    """Signals that ask for an end, in a list as they arrive."""
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
