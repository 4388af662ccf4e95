"""What a call of a stage took: time, processes and peak memory, as a line in the run's directory."""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_bliss.errors import UserError

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of ru_maxrss


@contextmanager
def recorded(path: Path) -> Iterator[None]:
    """Append a line to `path` when the block ends, however it ends; the first rank does it.

    seconds             of the block
    ranks, devices      processes of the job; how many of them have a GPU
    peak_host_bytes     resident memory, of the rank that took most
    peak_device_bytes   allocated by torch, of the rank that took most; null without a GPU

    Peaks are those of all ranks where the block ends without an error, else of the first rank. Nothing is recorded of a
    call that was refused, nor where the directory cannot be written: a stage does not fail for it.
    """
    began = time.monotonic()
    try:
        yield
    except UserError:
        raise
    except BaseException:
        _append(path, time.monotonic() - began, *_peaks())
        raise
    _append(path, time.monotonic() - began, *_over_ranks(*_peaks()))


def _append(path: Path, seconds: float, host: int, device: int) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    line = {
        "schema": 1,
        "seconds": seconds,
        "ranks": ranks,
        "devices": ranks if device else 0,
        "peak_host_bytes": host,
        "peak_device_bytes": device or None,
    }
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        with open(path, "a") as stream:
            stream.write(json.dumps(line) + "\n")


def _peaks() -> tuple[int, int]:
    """Of this process: bytes of resident memory and of GPU memory, 0 without a GPU."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
    torch = _torch()
    return host, torch.cuda.max_memory_allocated() if torch and torch.cuda.is_initialized() else 0


def _over_ranks(host: int, device: int) -> tuple[int, int]:
    """The largest of all ranks; this process's own where it has left the job, or was never in one."""
    torch = _torch()
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return host, device
    on_gpu = torch.distributed.get_backend() == "nccl"
    peaks = torch.tensor([host, device], device=torch.cuda.current_device() if on_gpu else "cpu")
    torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
    host, device = peaks.tolist()
    return host, device


def _torch() -> Any:
    """The module, if the stage has imported it: those that do without stay quick to start."""
    return sys.modules.get("torch")
