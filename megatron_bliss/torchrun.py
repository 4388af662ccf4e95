"""`python -m megatron_bliss.torchrun …` is torchrun that exits as its ranks did.

torchrun itself exits with 1 whatever a rank exited with, so that a stage that stopped to go on later (3) or refused its
input (2) could not be told from one that failed.
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run(arguments: list[str]) -> int:
    """:returns: 0, or the exit code of the rank that failed first; 1 where a signal ended it."""
    try:
        main(arguments)
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        _, failure = error.get_first_failure()
        return max(failure.exitcode, 1)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
