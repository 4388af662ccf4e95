"""Starts a command on several ranks as torchrun would, with ranks that hang killed, and reads Megatron's log."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.distributed import free_port

ROOT = Path(__file__).parent.parent


def start(module: str, words: Sequence[str | Path], log: Path, num_ranks: int = 1) -> list[subprocess.Popen[bytes]]:
    """Processes of `python -m module words…`, one a rank, that write to log.RANK; a single one is told no rank."""
    processes = []
    port = str(free_port())
    for rank in range(num_ranks):
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
        if num_ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
            environment |= {"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with open(f"{log}.{rank}", "wb") as stream:
            command = [sys.executable, "-m", module, *map(str, words)]
            processes.append(subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment))
    return processes


def finish(processes: list[subprocess.Popen[bytes]], timeout: float) -> list[int | None]:
    """Exit codes; None for ranks that were killed because they did not end in time, or a fellow of theirs failed."""
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.poll() for process in processes):
            deadline = min(deadline, time.monotonic() + 2)
        time.sleep(0.02)
    codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
        process.wait()
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
