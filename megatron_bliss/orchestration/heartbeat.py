"""Whether a stage that runs still shows signs of life: new lines in its log, or changes in the files it writes.

As a process beside a stage, `python -m megatron_bliss.orchestration.heartbeat MINUTES LOG PATH…` ends, with a sentence
and exit code 1, when there were none for so long; it is for whoever started the stage to end that.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_POLL_INTERVAL = 10.0  # seconds


class Heartbeat:
    """:param log: the stage's.
    :param outputs: files or directories that it writes; of what is not there yet, the directory it will be in counts.
    :param minutes: how long it may be silent; 0: for ever.
    """

    def __init__(self, log: Path, outputs: Sequence[Path], minutes: float) -> None:
        self._log, self._outputs, self._limit = log, outputs, 60 * minutes
        self._heard = self._looked = time.monotonic()
        self._size, self._newest = _size(log), 0

    def is_silent(self) -> bool:
        """Whether there was no sign of life for too long. It may be asked often: the outputs, which may be many files,
        are looked at only where the log says nothing, ten times in the limit."""
        now = time.monotonic()
        if not self._limit:
            return False
        if (size := _size(self._log)) != self._size:
            self._size, self._heard = size, now
        elif now - max(self._heard, self._looked) > self._limit / 10:
            self._looked = now
            newest = max(_times(self._outputs), default=0)
            if newest > self._newest:
                self._newest, self._heard = newest, now
        return now - self._heard > self._limit


def sentence(minutes: float) -> str:
    """What is to be said of a stage that was ended for it."""
    return f"gave no sign of life for {minutes:g} minutes and was ended (launch.hang_minutes)"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _times(paths: Sequence[Path]) -> Iterator[int]:
    """When the files were changed, in ns."""
    for path in paths:
        top = path if path.exists() else path.parent
        yield _time(top)
        for directory, _, names in os.walk(top):
            yield from (_time(Path(directory, name)) for name in names)


def _time(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # it was renamed meanwhile
        return 0


def main(minutes: float, log: Path, outputs: Sequence[Path]) -> None:
    """:raises SystemExit: when there was no sign of life for so long."""
    heartbeat = Heartbeat(log, outputs, minutes)
    while not heartbeat.is_silent():
        time.sleep(_POLL_INTERVAL)
    raise SystemExit(f"the stage {sentence(minutes)}")


if __name__ == "__main__":
    main(float(sys.argv[1]), Path(sys.argv[2]), [Path(word) for word in sys.argv[3:]])
