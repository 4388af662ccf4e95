"""torchrun that tells how its ranks ended and hands a wish to stop on to them; it takes torchrun's own arguments:

    python -m megatron_bliss.torchrun --nproc-per-node 8 -m -- megatron_bliss.cli STAGE --run DIR

Plain torchrun exits with 1 whatever code a rank ended with, and kills ranks soon after it gets a SIGTERM itself. This
one exits with 2 (bad input) or 3 (stopped, call again) where the rank that ended first did.
"""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from megatron_bliss import stopping

_TELLING = (2, stopping.EXIT_CODE)


def main(arguments: Sequence[str]) -> None:
    """:raises SystemExit: with the code, if a rank did not end well."""
    handed_on: list[int] = []

    def hand_on(number: int, _: FrameType | None) -> None:
        handed_on.append(number)
        os.environ[stopping.STOP_AT] = "0"  # for ranks that are not there yet
        for rank in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    for number in stopping.SIGNALS:
        signal.signal(number, hand_on)
    try:
        run(parse_args(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *arguments]))
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        if -code in handed_on:  # it was just starting, and had nothing to put on disk
            code = stopping.EXIT_CODE
        if code in _TELLING:
            raise SystemExit(code) from None
        print(failed, file=sys.stderr, flush=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main(sys.argv[1:])
