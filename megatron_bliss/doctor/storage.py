"""The file systems of a run: whether what a run relies on works there, and whether there is room."""

import fcntl
import mmap
import os
import shutil
import tempfile
import time
from pathlib import Path

import psutil

from megatron_bliss.artifacts import atomic_write, fsync_directory
from megatron_bliss.doctor.findings import Finding
from megatron_bliss.errors import UserError

_SLOW_WRITE = 1.0  # seconds for a small file that is fsynced and renamed
_FEW_SCRATCH_BYTES = 5 << 30


def existing(path: Path) -> Path:
    """A path, or the nearest above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def file_system(path: Path) -> str:
    """Its type, such as ext4, nfs4 or lustre."""
    place = str(existing(path).resolve())
    mounts = [part for part in psutil.disk_partitions(all=True) if Path(place).is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"


def check_run_directory(run_dir: Path) -> list[Finding]:
    """Whether files can be written as a run writes them: fsynced, renamed over one another, mapped, locked.

    Works in a directory of its own, which it removes.
    """
    folder = existing(run_dir)
    elsewhere = "--run DIR on a file system that can"
    try:
        probe = Path(tempfile.mkdtemp(prefix=".doctor-", dir=folder))
    except OSError as error:
        value = f"{folder} cannot be written to ({error.strerror})"
        return [Finding("run directory", "broken", value, "a run cannot keep anything there", "--run DIR elsewhere")]
    try:
        name = f"{folder} ({file_system(folder)})"
        try:
            seconds = _try_writes(probe)
        except (OSError, UserError) as error:
            costs = "a run that is killed could be left with half a file"
            return [Finding("atomic writes", "broken", f"{name}: {error}", costs, elsewhere)]
        found = [_writes(name, seconds)]
        try:
            _try_lock(probe / "lock")
            found.append(Finding("file locks", "ok", "flock works"))
        except OSError as error:
            costs = "two launchers on one run would not notice each other, so none is started"
            found.append(Finding("file locks", "broken", f"{name}: {error.strerror}", costs, elsewhere))
        return found
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _writes(name: str, seconds: float) -> Finding:
    value = f"{name}: fsync, rename and mmap work, {1000 * seconds:.0f} ms a small file"
    if seconds < _SLOW_WRITE:
        return Finding("atomic writes", "ok", value)
    costs = "stages that write many small files wait for the file system"
    return Finding("atomic writes", "gap", value, costs, "--run DIR on a faster file system")


def _try_writes(folder: Path) -> float:
    """:returns: seconds of one atomic write.
    :raises OSError: if something does not work.
    """
    began = time.monotonic()
    for content in (b"one", b"two"):
        with atomic_write(folder / "file") as stream:
            stream.write(content)
    seconds = (time.monotonic() - began) / 2
    if (folder / "file").read_bytes() != b"two":
        raise OSError("a file that was renamed over another still has the old content")
    with open(folder / "file", "r+b") as stream, mmap.mmap(stream.fileno(), 3) as mapped:
        mapped[:3] = b"map"
        mapped.flush()
    if (folder / "file").read_bytes() != b"map":
        raise OSError("what is written through a memory map does not reach the file")
    (folder / "a").mkdir()
    os.rename(folder / "a", folder / "b")
    fsync_directory(folder)
    return seconds


def _try_lock(path: Path) -> None:
    """:raises OSError: if files cannot be locked, or a lock does not hold others off."""
    with open(path, "w") as first, open(path, "w") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        raise OSError(0, "a lock does not hold others off")


def check_space(run_dir: Path, needed: int | None, is_lower_bound: bool = False) -> Finding:
    """Free space against what a plan writes.

    :param needed: bytes of the whole plan; None: nothing is planned.
    :param is_lower_bound: whether the pool's share of it is not known.
    """
    free = shutil.disk_usage(existing(run_dir)).free
    value = f"{free / 2**30:.1f} GiB free"
    if needed is None:
        return Finding("free space", "ok", value)
    left = max(needed - _used(run_dir), 0)
    value += f", {'at least ' if is_lower_bound else ''}{left / 2**30:.1f} GiB still to be written"
    if left <= free:
        return Finding("free space", "ok", value)
    remedy = "--run DIR where there is room, or raise target.save_interval: all checkpoints of the LLM are kept"
    return Finding("free space", "broken", value, "the run stops when the disk is full", remedy)


def _used(run_dir: Path) -> int:
    """Bytes a run has written already."""
    return sum(path.lstat().st_size for path in run_dir.rglob("*") if path.is_file() and not path.is_symlink())


def check_scratch() -> Finding:
    """The node's own temporary directory, as Slurm's or TMPDIR names it."""
    folder = Path(os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        value, costs = f"{folder} cannot be written to", "compiled kernels have no place, and torch may fail"
        return Finding("node-local path", "gap", value, costs, "export TMPDIR=/path/on/the/node")
    free = shutil.disk_usage(folder).free
    value = f"{folder} ({file_system(folder)}), {free / 2**30:.1f} GiB free"
    if free >= _FEW_SCRATCH_BYTES:
        return Finding("node-local path", "ok", value)
    costs = "compiled kernels and shared files of workers may fill it"
    return Finding("node-local path", "gap", value, costs, "export TMPDIR=/path/with/room")
