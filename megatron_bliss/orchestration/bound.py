"""Binds a process to its parent: `python bound.py PARENT COMMAND…` becomes COMMAND, which the kernel kills when the
process PARENT ends. Run as a file, for it starts before every stage and imports next to nothing."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends. Linux has it; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    die_with_parent()
    if os.getppid() != int(sys.argv[1]):  # it ended before the kernel was asked
        raise SystemExit(1)
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606
