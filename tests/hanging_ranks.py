"""Functions for the test of the runner of ranks; they import nothing, so that they start at once."""

import time


def hang(rank: int) -> str:
    if rank == 1:
        time.sleep(600)
    return "done"


def fail(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank one is broken")
    time.sleep(600)
