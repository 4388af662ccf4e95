"""How a stage is asked to stop before its end, and how it leaves: standard library only.

It is asked by whichever comes first of
- a file that appears, named by MEGATRON_BLISS_STOP_FILE,
- signal USR2 or TERM to any of its processes,
- the time MEGATRON_BLISS_STOP_AT, in seconds since 1970.

It then goes to the next boundary of its work, puts on disk what it has, and ends with exit code 3: called again, it
goes on from there, to the same files. Ranks agree on the boundary by `mcore.stopping.Vote`.
"""

import os
import signal
import time
from types import FrameType
from typing import NoReturn

STOP_FILE, STOP_AT = "MEGATRON_BLISS_STOP_FILE", "MEGATRON_BLISS_STOP_AT"
EXIT_CODE = 3
SIGNALS = (signal.SIGUSR2, signal.SIGTERM)

_received: list[int] = []


def listen() -> None:
    """From now on take the signals for a wish to stop, which `requested` tells; to be called in the main thread."""
    for number in SIGNALS:
        signal.signal(number, _note)


def _note(number: int, _: FrameType | None) -> None:
    _received.append(number)


def requested() -> bool:
    """Whether this process was asked to stop. Of a node's ranks only the first looks for the file."""
    if _received or time.time() >= float(os.environ.get(STOP_AT) or "inf"):
        return True
    path = os.environ.get(STOP_FILE)
    return bool(path) and os.environ.get("LOCAL_RANK", "0") == "0" and os.path.exists(str(path))


def leave(stage: str, done: int, total: int, unit: str = "steps") -> NoReturn:
    """End this process as one that was stopped; the first rank says so, in the form of `progress`.

    :param done: what is on disk.
    """
    if os.environ.get("RANK", "0") == "0":
        print(f"[{stage}] {done}/{total} {unit} | stopped; called again, it goes on from there", flush=True)
    raise SystemExit(EXIT_CODE)
