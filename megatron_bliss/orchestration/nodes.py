"""One plan on several machines without a scheduler: each was started with `megatron-bliss run --launcher torchrun`.

The first node runs the plan as on one machine, with the same files. What it does for the others is to write, beside the
state, which distributed stage begins and at which port its ranks meet:

    RUN/nodes.json  {"schema": 1, "session": ID, "beat": N, "code": null, "calls": {STAGE: {"number": N, "port": P}}}

`beat` goes up every few seconds, so that the others notice when the first is gone; `code` is its exit code in the end.
The others read that and the state, and join each stage that runs with their part of the ranks. Stages of one process
are the first node's alone. A node that was restarted joins the next call.
"""

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_bliss import stopping
from megatron_bliss.artifacts import RunPaths, read_json, write_json
from megatron_bliss.config import RunConfig
from megatron_bliss.errors import StageError, StoppedError, UserError
from megatron_bliss.orchestration import processes, state
from megatron_bliss.orchestration.local import run, signals, stage_command, stage_environment
from megatron_bliss.orchestration.plan import Stage, plan

_BEAT_INTERVAL, _POLL_INTERVAL = 5.0, 0.5  # seconds
_LOST_AFTER = 180.0  # seconds without a beat; network file systems may show a change a minute late
_NUM_PORTS = 64  # after the first, taken in turn


@dataclass(frozen=True)
class Nodes:
    """Machines that run one plan, as one of them sees it."""

    count: int
    rank: int
    host: str  # of the first, as the others reach it
    port: int  # the first of those that ranks meet at

    @classmethod
    def of(cls, count: int | None, rank: int | None, endpoint: str | None) -> "Nodes":
        """:raises UserError: if something is missing, or the endpoint is none."""
        given = {"--nnodes": count, "--node-rank": rank, "--rdzv-endpoint": endpoint}
        if missing := [name for name, value in given.items() if value is None]:
            raise UserError(
                f"--launcher torchrun needs {' and '.join(missing)}; give the same of torchrun's on each node"
            )
        assert count is not None
        assert rank is not None
        assert endpoint is not None
        host, _, port = endpoint.rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(f"--rdzv-endpoint is {endpoint!r}; give HOST:PORT of the first node")
        if not 0 <= rank < count:
            raise UserError(f"--node-rank is {rank}, with --nnodes {count}; it goes from 0 to {count - 1}")
        return cls(count, rank, host, int(port))

    def command(self, stage: Stage, port: int) -> list[str]:
        """The ranks of a distributed stage on this machine."""
        words = ["--nnodes", str(self.count), "--node-rank", str(self.rank), "--rdzv-backend", "static"]
        words += ["--nproc-per-node", str(stage.num_ranks // self.count)]
        words += ["--master-addr", self.host, "--master-port", str(port), "-m", "--"]
        return [sys.executable, "-m", "megatron_bliss.torchrun", *words, "megatron_bliss.cli", *stage.command]


def endpoint_of_torchrun() -> str | None:
    """Where torchrun, if it has started this process, said that ranks meet; that port itself is taken."""
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        return None
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def lead(config: RunConfig, run_dir: Path, nodes: Nodes) -> None:
    """Run the plan as the first node. Raises what `local.run` does."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with _told(run_dir, nodes) as board:
        run(config, run_dir, command=board.command)


class _Board:
    """What the first node tells the others."""

    def __init__(self, run_dir: Path, nodes: Nodes) -> None:
        self._path, self._nodes, self._lock = RunPaths(run_dir).nodes, nodes, threading.Lock()
        self._facts: dict[str, Any] = {"schema": 1, "session": uuid.uuid4().hex, "beat": 0, "code": None, "calls": {}}
        self._number = 0

    def command(self, stage: Stage) -> list[str]:
        """The processes of a stage on the first node, of which the others learn."""
        if stage.num_ranks == 1:
            return stage_command(stage)
        self._number += 1
        port = self._nodes.port + 1 + self._number % _NUM_PORTS
        with self._lock:
            self._facts["calls"][stage.name] = {"number": self._number, "port": port}
        self.tell()
        return self._nodes.command(stage, port)

    def tell(self, code: int | None = None) -> None:
        """Write it all again.

        :param code: the first node's exit code, if it ends.
        """
        with self._lock:
            self._facts["beat"] += 1
            self._facts["code"] = code
            write_json(self._path, self._facts)


@contextmanager
def _told(run_dir: Path, nodes: Nodes) -> Iterator[_Board]:
    """A board with a beat, and the exit code in the end."""
    board, over = _Board(run_dir, nodes), threading.Event()

    def beat() -> None:
        while not over.wait(_BEAT_INTERVAL):
            board.tell()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    code = 1
    try:
        yield board
        code = 0
    except UserError:
        code = 2
        raise
    except StoppedError:
        code = stopping.EXIT_CODE
        raise
    finally:
        over.set()
        thread.join()
        board.tell(code)


def follow(config: RunConfig, run_dir: Path, nodes: Nodes) -> None:
    """Join the stages that the first node begins, until it ends.

    :raises UserError: if it began a stage that this node's settings do not have, or refused its input.
    :raises StageError: if it failed, or is gone.
    :raises StoppedError: if it or this node was asked to stop.
    """
    follower = _Follower(config, run_dir.absolute(), nodes)
    follower.console.print(f"node {nodes.rank} of {nodes.count}: waiting for the first", soft_wrap=True)
    with signals() as received:
        try:
            while (code := follower.look()) is None:
                if received or stopping.requested():
                    follower.stop(60 * config.launch.stop_minutes)
                    raise StoppedError(f"node {nodes.rank} was stopped; start it again to go on")
                time.sleep(_POLL_INTERVAL)
        finally:
            follower.stop(0)
    if code == stopping.EXIT_CODE:
        raise StoppedError("the first node was stopped; start all again to go on")
    if code:
        raise StageError(f"the first node ended with exit code {code}; it says why")


class _Follower:
    """A node that is not the first, and what runs on it."""

    def __init__(self, config: RunConfig, run_dir: Path, nodes: Nodes) -> None:
        self.console = Console()
        self._config, self._run_dir, self._nodes = config, run_dir, nodes
        self._stages = {stage.name: stage for stage in plan(config, run_dir) if stage.num_ranks > 1}
        self._mark = run_dir / f"node-{nodes.rank}"  # of its processes, to tell them from the first node's
        processes.end_leftovers(self._mark)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._joined: set[tuple[str, int]] = set()
        self._session, self._beat, self._heard = "", self._read().get("beat", 0), 0.0  # heard of: never

    def look(self) -> int | None:
        """Do what there is to do now; the first node's exit code when it has ended.

        :raises StageError: if it has not been heard of for too long.
        """
        board, now = self._read(), time.monotonic()
        if board.get("beat", 0) != self._beat:
            self._beat, self._heard = board["beat"], now
        if not self._heard:
            return None  # what is there may be of an earlier call
        if now - self._heard > _LOST_AFTER:
            raise StageError(f"nothing was heard of the first node for {_LOST_AFTER:g} seconds; start all again")
        if board["session"] != self._session:
            self.stop(0)
            self._session = board["session"]
        if board["code"] is not None:
            return int(board["code"])
        for name, process in list(self._running.items()):
            if (code := process.poll()) is not None:
                self.console.print(f"{name}: this node's part ended with exit code {code}", soft_wrap=True)
                del self._running[name]
        self._join(board["calls"])
        return None

    def _join(self, calls: Mapping[str, Any]) -> None:
        records = state.read_state(self._run_dir)
        for name, call in calls.items():
            key = (self._session, call["number"])
            if key in self._joined or name not in records or records[name].status != "running":
                continue
            if name not in self._stages:
                raise UserError(
                    f"the first node runs {name}, which is not in this node's settings; give the same CONFIG"
                )
            self._joined.add(key)
            if name in self._running:
                processes.end({name: self._running.pop(name)}, self._mark)
            self._running[name] = self._start(self._stages[name], call["port"])

    def _start(self, stage: Stage, port: int) -> subprocess.Popen[bytes]:
        # the first node's too: Megatron's last rank, which says how far it is, may be here
        log = RunPaths(self._run_dir).logs / f"{stage.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        surroundings = stage_environment(self._config, stage, self._run_dir)
        self.console.print(f"{stage.name}: log {log}", soft_wrap=True)
        return processes.start(self._nodes.command(stage, port), log, surroundings, self._mark, stage.name)

    def stop(self, patience: float) -> None:
        """End what runs: asked to first, then killed."""
        running, self._running = self._running, {}
        if patience:
            processes.ask_to_stop(running.values())
        processes.end(running, self._mark, patience)

    def _read(self) -> dict[str, Any]:
        path = RunPaths(self._run_dir).nodes
        return dict(read_json(path)) if path.exists() else {}
