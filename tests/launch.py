"""Starts a command on several ranks as torchrun would, with ranks that hang killed, and reads Megatron's log.

In its processes torch and Megatron are imported already (`tests.distributed`). Whole runs (`tests.tiny_run`), and one
training in tests/test_pretrain.py, are started as users start them.
"""

import atexit
import os
import re
import runpy
import sys
import time
import warnings
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from weakref import WeakKeyDictionary

from torch.distributed import TCPStore

from tests.distributed import forked, meeting_place

ROOT = Path(__file__).parent.parent
_STORES: WeakKeyDictionary[ForkServerProcess, TCPStore] = WeakKeyDictionary()  # held for as long as its ranks are


def start(module: str, words: Sequence[str | Path], log: Path, num_ranks: int = 1) -> list[ForkServerProcess]:
    """Processes of `python -m module words…`, one a rank, that write to log.RANK; a single one is told no rank."""
    processes = []
    store, told = meeting_place()
    for rank in range(num_ranks):
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
        if num_ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
            environment |= {"LOCAL_WORLD_SIZE": str(num_ranks)} | told
        processes.append(forked(_run_module, module, list(map(str, words)), f"{log}.{rank}", environment))
        _STORES[processes[-1]] = store
    return processes


def _run_module(module: str, words: list[str], log: str, environment: dict[str, str]) -> None:
    """`python -m module words…`."""
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "wb") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    warnings.simplefilter("ignore")
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # a forked process does not of itself


def finish(processes: list[ForkServerProcess], timeout: float) -> list[int | None]:
    """Exit codes; None for ranks that were killed because they did not end in time, or a fellow of theirs failed."""
    deadline = time.monotonic() + timeout
    while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + 2)
        time.sleep(0.02)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def run(module: str, words: Sequence[str | Path], log: Path, num_ranks: int = 1, timeout: float = 180) -> str:
    """Run to a successful end; returns the text of all ranks' logs, in order of rank.

    :raises AssertionError: with the ends of the logs, if a rank fails or hangs.
    """
    codes = finish(start(module, words, log, num_ranks), timeout)
    text = "".join(Path(f"{log}.{rank}").read_text() for rank in range(num_ranks))
    assert codes == [0] * num_ranks, f"exit codes {codes}:\n{text[-6000:]}"
    return text


def losses(text: str) -> dict[int, str]:
    """Training loss by iteration, as Megatron printed it (7 digits), but for the second iteration of each process:
    what Megatron prints there is the mean of the first two."""
    lines = re.findall(r"iteration +(\d+)/ *\d+ \|.*?lm loss: (\S+) \|", text)
    return {int(iteration): loss for index, (iteration, loss) in enumerate(lines) if index != 1}
