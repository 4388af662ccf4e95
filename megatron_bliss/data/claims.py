"""Who works on what, agreed on by processes that share nothing but a directory.

NAME.claim exists while somebody works on NAME. It names its owner (host, process, Slurm job) and its time is renewed
while the work goes on. Work whose owner is gone may be taken over: at once where it can be seen that the process ended,
else when the claim was not renewed for a while. All times are the file system's own, so clocks of hosts need not agree.

A claim saves double work; it does not exclude it. An owner that was only slow goes on, so work must come out the same
whoever does it, and doing it twice must do no harm.
"""

import json
import os
import socket
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from megatron_bliss.artifacts import atomic_write

_SUFFIX = ".claim"
_CLOCK = "clock"


class Claims:
    """The claims of one directory, which exists.

    :param timeout: seconds without a renewal after which an owner counts as gone.
    """

    def __init__(self, directory: Path, timeout: float) -> None:
        self._directory = directory
        self._timeout = timeout
        self._owner = _owner(os.getpid())
        self._renewed = 0.0

    def take(self, name: str) -> bool:
        """Whether the work is ours now: nobody had it, whoever had it is gone, or this process has it already."""
        path = self._path(name)
        self._renewed = time.monotonic()
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            if self._read(path) == self._owner:
                return True
            if not self._is_stale(path):
                return False
            with atomic_write(path, "w") as stream:
                stream.write(self._owner)
            return self._read(path) == self._owner  # of several that took it over, the last has it
        with os.fdopen(handle, "w") as stream:
            stream.write(self._owner)
        return True

    def renew(self, name: str) -> None:
        """Say that the work goes on; to be called often, it touches the file now and then only."""
        if time.monotonic() - self._renewed < self._timeout / 10:
            return
        self._renewed = time.monotonic()
        with suppress(FileNotFoundError):  # somebody took it over, and is done already
            os.utime(self._path(name))

    def release(self, name: str) -> None:
        """Give work back, done or not, if it is still ours."""
        if self._read(self._path(name)) == self._owner:
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}{_SUFFIX}"

    def _read(self, path: Path) -> str | None:
        try:
            return path.read_text()
        except FileNotFoundError:
            return None

    def _is_stale(self, path: Path) -> bool:
        try:
            with open(path) as stream:  # opening asks a network file system for the newest state
                owner, renewed = _parse(stream.read()), os.fstat(stream.fileno()).st_mtime
        except FileNotFoundError:
            return False  # given back just now: whoever asks again may get it
        return _is_gone(owner, json.loads(self._owner)) or self._now() - renewed > self._timeout

    def _now(self) -> float:
        """The file system's time: that of a file which is touched for it."""
        clock = self._directory / _CLOCK
        clock.touch()
        return clock.stat().st_mtime


@cache
def _owner(pid: int) -> str:
    """JSON that no other process has, nor a later one with the same number."""
    return json.dumps(
        {
            "schema": 1,
            "host": socket.gethostname(),
            "pid": pid,
            "started": psutil.Process(pid).create_time(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        }
    )


def _parse(text: str) -> dict[str, Any]:
    """The owner in a claim; nothing of one that is just being written."""
    try:
        owner = json.loads(text)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_gone(owner: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether an owner is known to have ended: its process on this host, or its job, which was requeued as ours."""
    if owner.get("host") == me["host"] and not _is_running(owner["pid"], owner["started"]):
        return True
    is_own_job = owner.get("job") is not None and owner["job"] == me["job"]
    return is_own_job and int(owner["restart"]) < int(me["restart"])


def _is_running(pid: int, started: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - started) < 2  # seconds
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # another user's, so somebody lives there
        return True
